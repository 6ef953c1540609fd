// How fast reads are that hit the L2 cache: blocks walk through a buffer that fits there, past the L1 cache, each from a start of its own.
// bench/kernels.py takes it as one of two ceilings of the attention kernels.

extern "C" __global__ void __launch_bounds__(512) read_through_l2(const uint4* buffer, int words, int rounds, unsigned* out) {
    constexpr int AT_ONCE = 8;
    const int step = blockDim.x * AT_ONCE;  // divides words
    int first = int(blockIdx.x * 97ll * step % words);
    unsigned sum = 0;
    for (int round = 0; round < rounds; ++round) {
        uint4 read[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) read[i] = __ldcg(buffer + first + i * blockDim.x + threadIdx.x);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) sum += read[i].x ^ read[i].y ^ read[i].z ^ read[i].w;
        first = first + step < words ? first + step : 0;
    }
    if (sum == 0x9e3779b9u) *out = sum;  // so that the reads are needed
}
