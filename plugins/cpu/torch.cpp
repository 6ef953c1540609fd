// The kernels on PyTorch's threads. plugins/cpu/torch_ops.py calls these functions with ctypes, which releases Python's lock.
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"

namespace {

// Number of multiplications and additions that are worth a thread of their own.
constexpr int64_t WORTH_A_THREAD = 1 << 15;

int64_t grain(int64_t operations_each) { return std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, operations_each)); }

int64_t operations_of_query(const qdbev::Attention& in) { return 8 * in.M * in.C * in.L * in.P; }

}  // namespace

extern "C" {

void qdbev_attend(const qdbev::Attention* in, float* output) {
    at::parallel_for(0, in->B * in->Q, grain(operations_of_query(*in)),
                     [&](int64_t first, int64_t last) { qdbev::kernels().attend(*in, first, last, output); });
}

void qdbev_attend_backward(const qdbev::Attention* in, const qdbev::AttentionGradients* gradients) {
    at::parallel_for(0, in->B * in->M, grain(operations_of_query(*in) * in->Q / in->M),
                     [&](int64_t first, int64_t last) { qdbev::kernels().attend_backward(*in, *gradients, first, last); });
}

void qdbev_im2col(const qdbev::Im2col* in, float* output) {
    at::parallel_for(0, in->B * 9 * in->h, grain(8 * in->C * in->w),
                     [&](int64_t first, int64_t last) { qdbev::kernels().im2col(*in, first, last, output); });
}

const char* qdbev_instruction_set() { return qdbev::kernels().instruction_set; }
}
