// Runs one engine of qdbev frame after frame. The BEV of a frame stays on the GPU and is the `prev_bev` of the next.
//
// The tensors and the rules for frames are described in docs/engine.md. Needs TensorRT 10.1 or newer, CUDA and C++17.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <array>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

inline void check(bool ok, std::string const& what) {
    if (!ok) throw std::runtime_error(what);
}
inline void check(cudaError_t status) { check(status == cudaSuccess, cudaGetErrorString(status)); }

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << message << '\n';
    }
};

class BevStream {
public:
    // `plan` is an engine file that `python -m engine.build` wrote with this TensorRT version for this GPU model.
    explicit BevStream(std::string const& plan) {
        std::ifstream file(plan, std::ios::binary);
        check(file.good(), plan + " cannot be opened");
        std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
        check(cudaStreamCreate(&stream));  // fails without a GPU, where createInferRuntime may return a wild pointer
        runtime.reset(nvinfer1::createInferRuntime(logger));
        check(runtime != nullptr, "TensorRT's runtime cannot be created");
        engine.reset(runtime->deserializeCudaEngine(bytes.data(), bytes.size()));
        check(engine != nullptr, plan + " is for another TensorRT or GPU; build it again: python -m engine.build");
        for (int i = 0; i < engine->getNbIOTensors(); ++i) {
            std::string const name = engine->getIOTensorName(i);
            auto const shape = engine->getTensorShape(name.c_str());
            size[name] = sizeof(float);
            for (int d = 0; d < shape.nbDims; ++d) size[name] *= shape.d[d];
            check(cudaMalloc(&device[name], size[name]));
            check(cudaMemset(device[name], 0, size[name]));
        }
        auto const scratchSize = engine->getDeviceMemorySizeV2();
        check(cudaMalloc(&scratch, scratchSize ? scratchSize : 1));
        // Two execution contexts, which never run at the same time and so share their scratch memory. The first reads
        // `prev_bev` and writes `bev`; in the second the two buffers are exchanged. Frames use them in turn, so that
        // nothing is copied.
        for (int turn = 0; turn < 2; ++turn) {
            context[turn].reset(
                engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
            check(context[turn] != nullptr, "there is no memory for an execution context");
            context[turn]->setDeviceMemoryV2(scratch, scratchSize);
            for (auto const& [name, address] : device) {
                auto const& buffer = turn == 0 ? name : name == "bev" ? "prev_bev" : name == "prev_bev" ? "bev" : name;
                check(context[turn]->setTensorAddress(name.c_str(), device.at(buffer)), "refused buffer of " + name);
            }
            // TensorRT creates some resources in the first run, which must not happen while a CUDA graph is captured.
            check(context[turn]->enqueueV3(stream), "the first run failed");
            check(cudaStreamSynchronize(stream));
            cudaGraph_t captured;
            check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            check(context[turn]->enqueueV3(stream), "capture failed; call enqueueV3 for each frame instead");
            check(cudaStreamEndCapture(stream, &captured));
            check(cudaGraphInstantiate(&graph[turn], captured, 0));
            check(cudaGraphDestroy(captured));
        }
    }

    // Size of an input or output in bytes; all tensors are float32.
    std::size_t bytes(std::string const& name) const { return size.at(name); }

    // Runs one frame. `canBus` holds the motion relative to the last frame (docs/engine.md); `first` is true for the
    // first frame of a scene. Page-locked host memory copies fastest. After an exception the history is that of the
    // last good frame.
    void frame(float const* images, float const* lidar2img, float const* canBus, bool first, float* logits,
               float* boxes) {
        float const hasPrev = first ? 0.F : 1.F;
        send("images", images), send("lidar2img", lidar2img), send("can_bus", canBus), send("has_prev", &hasPrev);
        check(cudaGraphLaunch(graph[turn], stream));
        fetch("cls_logits", logits), fetch("box_code", boxes);
        check(cudaStreamSynchronize(stream));
        turn = 1 - turn;
    }

    BevStream(BevStream const&) = delete;
    BevStream& operator=(BevStream const&) = delete;

    ~BevStream() {
        cudaStreamSynchronize(stream);
        for (auto& captured : graph) cudaGraphExecDestroy(captured);
        for (auto& one : context) one.reset();
        engine.reset();
        for (auto& [name, address] : device) cudaFree(address);
        cudaFree(scratch);
        cudaStreamDestroy(stream);
    }

private:
    void send(char const* name, void const* host) {
        check(cudaMemcpyAsync(device.at(name), host, size.at(name), cudaMemcpyHostToDevice, stream));
    }
    void fetch(char const* name, void* host) {
        check(cudaMemcpyAsync(host, device.at(name), size.at(name), cudaMemcpyDeviceToHost, stream));
    }

    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::array<std::unique_ptr<nvinfer1::IExecutionContext>, 2> context;
    std::array<cudaGraphExec_t, 2> graph{};
    std::map<std::string, void*> device;
    std::map<std::string, std::size_t> size;
    cudaStream_t stream{};
    void* scratch{};
    int turn = 0;
};
