// Runs the CPU kernels on small problems in buffers of exactly the documented sizes, for the sanitizers of tests/test_plugins_cpu.py.
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace {

std::vector<float> numbers(int64_t count, float scale) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& number : made) number = scale * (float(std::rand()) / float(RAND_MAX) - 0.5f);
    return made;
}

void attention(int64_t N, int64_t C, bool integer, float offset_scale) {
    const int64_t level_hw[] = {3, 4, 1, 2};
    qdbev::Attention in{2, N, 14, 2, C, 5, N > 1 ? 2 : 1, 2, 4, level_hw};
    const auto value = numbers(in.B * N * in.S * in.M * C, 2), references = numbers(in.B * N * in.Q * in.D * 2, 3);
    const auto offsets = numbers(in.B * in.Q * in.M * in.L * in.P * 2, offset_scale), logits = numbers(in.B * in.Q * in.M * in.L * in.P, 4);
    std::vector<float> visible(static_cast<size_t>(in.B * N * in.Q));
    for (float& sees : visible) sees = float(std::rand() % 2);
    std::vector<int8_t> integers(value.size());
    for (size_t i = 0; i < value.size(); ++i) integers[i] = int8_t(value[i] * 127);
    const float scale = 0.1f;
    in.value = integer ? static_cast<const void*>(integers.data()) : value.data();
    in.value_scale = integer ? &scale : nullptr;
    in.reference_points = references.data(), in.visible = N > 1 ? visible.data() : nullptr;
    in.sampling_offsets = offsets.data(), in.attention_logits = logits.data();
    std::vector<float> out(size_t(in.B * in.Q * in.M * C));
    qdbev::plain::kernels.attend(in, 0, 3, out.data());
    qdbev::plain::kernels.attend(in, 3, in.B * in.Q, out.data());
    if (integer) return;
    std::vector<float> by_value(value.size()), by_references(references.size() * size_t(in.M)), by_offsets(offsets.size()), by_logits(logits.size());
    qdbev::plain::kernels.attend_backward(in, {out.data(), by_value.data(), by_references.data(), by_offsets.data(), by_logits.data()}, 0, 4);
    qdbev::plain::kernels.attend_backward(in, {out.data(), nullptr, nullptr, nullptr, nullptr}, 0, 4);
}

}  // namespace

int main() {
    for (int64_t cameras : {1, 3}) {
        for (int64_t channels : {1, 4, 24, 64, 128}) {
            for (float offset_scale : {0.0f, 3.0f, 1e30f}) {
                attention(cameras, channels, false, offset_scale);
                attention(cameras, channels, true, offset_scale);
            }
        }
    }
    for (int64_t stride : {1, 2}) {
        const int64_t h = stride == 1 ? 7 : 4, w = stride == 1 ? 9 : 5;
        const auto x = numbers(2 * 3 * 7 * 9, 1), offsets = numbers(2 * 18 * h * w, 30), mask = numbers(2 * 9 * h * w, 1);
        std::vector<float> out(size_t(2 * 27 * h * w));
        qdbev::plain::kernels.im2col({2, 3, 7, 9, h, w, stride, x.data(), offsets.data(), mask.data()}, 0, 2 * 9 * h, out.data());
    }
    return 0;
}
