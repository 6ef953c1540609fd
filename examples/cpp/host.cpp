// Detects objects in frames that are stored in folders: host ENGINE FRAME...
//
// Each FRAME is a folder with images.bin, lidar2img.bin and can_bus.bin, which are raw float32 values in the layout of
// docs/engine.md. The frames are of one scene, in order. The program writes cls_logits.bin and box_code.bin into the
// same folder. With QDBEV_CPU defined the engine is one for a CPU.
#ifdef QDBEV_CPU
#include "cpu_stream.h"
#else
#include "bev_stream.h"
#endif

std::vector<float> read(std::string const& path, std::size_t bytes) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    check(file.good(), path + " cannot be opened");
    auto const found = static_cast<std::size_t>(file.tellg());
    check(found == bytes, path + " has " + std::to_string(found) + " bytes, not " + std::to_string(bytes));
    std::vector<float> values(bytes / sizeof(float));
    file.seekg(0).read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(bytes));
    check(file.good(), path + " cannot be read");
    return values;
}

void write(std::string const& path, std::vector<float> const& values) {
    std::ofstream file(path, std::ios::binary);
    auto const bytes = static_cast<std::streamsize>(values.size() * sizeof(float));
    file.write(reinterpret_cast<char const*>(values.data()), bytes);
    check(file.flush().good(), path + " cannot be written");
}

int main(int count, char** arguments) try {
    check(count >= 3, "usage: host ENGINE FRAME...");
    BevStream stream(arguments[1]);
    std::vector<float> logits(stream.bytes("cls_logits") / sizeof(float));
    std::vector<float> boxes(stream.bytes("box_code") / sizeof(float));
    for (int i = 2; i < count; ++i) {
        std::string const folder = arguments[i];
        auto const images = read(folder + "/images.bin", stream.bytes("images"));
        auto const lidar2img = read(folder + "/lidar2img.bin", stream.bytes("lidar2img"));
        auto const canBus = read(folder + "/can_bus.bin", stream.bytes("can_bus"));
        stream.frame(images.data(), lidar2img.data(), canBus.data(), i == 2, logits.data(), boxes.data());
        write(folder + "/cls_logits.bin", logits);
        write(folder + "/box_code.bin", boxes);
    }
} catch (std::exception const& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
}
