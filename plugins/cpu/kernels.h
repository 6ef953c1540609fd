// Operators of qdbev/ops on a CPU: the interface between the kernels and the runtimes that call them (torch.cpp, openvino.cpp).
//
// A runtime divides the work into ranges and calls a function for each range on a thread of its own; ranges never write to the same
// memory. The functions allocate no output, start no thread and throw nothing. dispatch.cpp selects the code for the instruction set of
// the CPU when the library is loaded. All tensors are contiguous and float32, apart from an int8 `value`.
#pragma once
#include <cstdint>

namespace qdbev {

// MultiScaleDeformableAttention and SpatialCrossAttention (qdbev/ops/msda.py, sca.py). The former is the latter with one camera, one
// pillar point and no `visible`. Letters as in sca.py: B batch, N cameras, S keys of all levels, M heads, C channels of a head, Q queries,
// D pillar points, L levels, P points of a level.
struct Attention {
    int64_t B, N, S, M, C, Q, D, L, P;
    const int64_t* level_hw;        // (L, 2) height and width of each level in cells
    const void* value;              // (B, N, S, M, C) float32, or int8 if value_scale is not null
    const float* value_scale;       // one number, or null
    const float* reference_points;  // (B, N, Q, D, 2)
    const float* visible;           // (B, N, Q), or null: every camera sees every query
    const float* sampling_offsets;  // (B, Q, M, L, P, 2)
    const float* attention_logits;  // (B, Q, M, L, P)
};

// Gradients of an attention with a float32 `value`. A null pointer leaves a gradient out. `value` must be zero at the beginning.
struct AttentionGradients {
    const float* output;        // (B, Q, M * C) gradient of the output
    float* value;               // as the input
    float* reference_points;    // (B, N, Q, M, D, 2): the part of each head
    float* sampling_offsets;    // as the input
    float* attention_logits;    // as the input
};

// ModulatedDeformableIm2col (qdbev/ops/deform_conv.py).
struct Im2col {
    int64_t B, C, H, W, h, w, stride;
    const float* x;        // (B, C, H, W)
    const float* offsets;  // (B, 18, h, w)
    const float* mask;     // (B, 9, h, w)
};

struct Kernels {
    // Compute queries first to last - 1 of the B * Q queries; output is (B, Q, M * C).
    void (*attend)(const Attention& in, int64_t first, int64_t last, float* output);
    // Compute the gradients of pairs first to last - 1 of the B * M pairs of sample and head.
    void (*attend_backward)(const Attention& in, const AttentionGradients& gradients, int64_t first, int64_t last);
    // Compute rows first to last - 1 of the B * 9 * h rows of the columns; output is (B, C * 9, h, w) with the kernel position as fast axis.
    void (*im2col)(const Im2col& in, int64_t first, int64_t last, float* output);
    const char* instruction_set;
};

namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

const Kernels& kernels();  // those for this CPU

}  // namespace qdbev
