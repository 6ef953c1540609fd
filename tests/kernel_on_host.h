// CUDA's types and functions that the kernels use, implemented for a host compiler. In the attention kernels, one call on the host
// computes what a whole team of threads computes on a GPU; the state of the team's lanes is an array. This header is included once; the
// kernels follow, each in a namespace and each attention kernel after its own constant HELD, the number of lanes of a team.
#pragma once
#include <algorithm>
#include <math.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct Index {
    unsigned x, y, z;
};
static thread_local Index blockIdx, threadIdx;

#define __constant__ static const
#define KERNEL static void
#define INLINE static inline
#define FROM_LANE(lanes, owner, member) lanes[owner].member

template <typename T>
T __ldg(const T* from) {
    return *from;
}
template <typename To, typename From>
To same_bits(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from));
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float number) { return same_bits<unsigned>(number); }
inline float __saturatef(float number) { return fminf(fmaxf(number, 0.0f), 1.0f); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return chosen;
}
inline float2 floats_of_halves(unsigned word) {
    return {float(same_bits<_Float16>(uint16_t(word))), float(same_bits<_Float16>(uint16_t(word >> 16)))};
}
inline unsigned halves_of_floats(float low, float high) {
    return same_bits<uint16_t>(_Float16(low)) | unsigned(same_bits<uint16_t>(_Float16(high))) << 16;
}
inline int dot_of_bytes(unsigned weights, unsigned numbers, int sum) {
    for (int shift = 0; shift < 32; shift += 8) sum += int(weights >> shift & 0xff) * int8_t(numbers >> shift & 0xff);
    return sum;
}

inline int lane_at(int held) { return held; }
inline bool any_team(bool ours) { return ours; }  // on the host a warp has one team only
template <size_t HELD>
bool any_lane(const unsigned (&bits)[HELD]) {
    return std::any_of(bits, bits + HELD, [](unsigned lane) { return lane != 0; });
}
template <size_t HELD>
float largest_of_team(const float (&mine)[HELD]) {
    return *std::max_element(mine, mine + HELD);
}
template <size_t HELD>
float sum_of_team(const float (&mine)[HELD]) {
    float all = 0;
    for (float number : mine) all += number;
    return all;
}

// Call `kernel` once for every group of `lanes` threads of every block of a grid.
template <typename Kernel>
void launch(Index grid, unsigned threads, unsigned lanes, Kernel kernel) {
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x += lanes) kernel();
            }
        }
    }
}
