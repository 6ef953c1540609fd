// Runs one engine of qdbev for a CPU frame after frame, with OpenVINO. The BEV of a frame is the `prev_bev` of the next.
//
// The tensors and the rules for frames are described in docs/engine.md. Needs the OpenVINO that built the engine, and
// C++17. The environment variable QDBEV_OPENVINO_EXTENSION is the path of the library that `python -m plugins.cpu.install`
// prints for OpenVINO; an engine that was built without a compiler needs none.
#pragma once

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

inline void check(bool ok, std::string const& what) {
    if (!ok) throw std::runtime_error(what);
}

class BevStream {
public:
    // `plan` is an engine file that `python -m engine.build --backend cpu` wrote on this CPU.
    explicit BevStream(std::string const& plan) {
        std::ifstream file(plan, std::ios::binary);
        check(file.good(), plan + " cannot be opened");
        if (char const* extension = std::getenv("QDBEV_OPENVINO_EXTENSION")) core.add_extension(std::string(extension));
        request = core.import_model(file, "CPU", {}).create_infer_request();
        previous.resize(bytes("prev_bev") / sizeof(float));
    }

    std::size_t bytes(std::string const& name) { return request.get_tensor(name).get_byte_size(); }

    // Detects the objects of a frame. All arguments are float32 in the layout of docs/engine.md; `first` begins a scene.
    void frame(float const* images, float const* lidar2img, float const* canBus, bool first, float* logits, float* boxes) {
        float const hasPrevious = first ? 0.0f : 1.0f;
        set("images", images);
        set("lidar2img", lidar2img);
        set("can_bus", canBus);
        set("prev_bev", previous.data());
        set("has_prev", &hasPrevious);
        request.infer();
        get("cls_logits", logits);
        get("box_code", boxes);
        get("bev", previous.data());
    }

private:
    void set(std::string const& name, float const* from) {
        auto tensor = request.get_tensor(name);
        std::memcpy(tensor.data(), from, tensor.get_byte_size());
    }

    void get(std::string const& name, float* to) {
        auto const tensor = request.get_tensor(name);
        std::memcpy(to, tensor.data(), tensor.get_byte_size());
    }

    ov::Core core;
    ov::InferRequest request;
    std::vector<float> previous;
};
