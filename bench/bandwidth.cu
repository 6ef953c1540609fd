// Reads that hit the L2 cache, for measuring their speed. The buffer fits into the L2 cache, the reads bypass the L1 cache, and each block
// starts at another position. bench/kernels.py uses the speed as one of two upper limits for the attention kernels.

extern "C" __global__ void __launch_bounds__(512) read_through_l2(const uint4* buffer, int words, int rounds, unsigned* out) {
    constexpr int AT_ONCE = 8;
    const int step = blockDim.x * AT_ONCE;  // `words` is a multiple of this
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
    if (sum == 0x9e3779b9u) *out = sum;  // so that the compiler cannot remove the reads
}
