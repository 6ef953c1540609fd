// How a lane loads numbers of `value`, multiplies them by weights, sums them and stores the result, for each number type. This text is
// compiled before attention.cu, which describes the constants and what a lane is.

#define FLOAT 0
#define HALF 1
#define INT8 2

constexpr int STEP = HEADS * CHANNELS;  // distance from one key to the next, in numbers
constexpr int VALUE_BYTES = VALUE == FLOAT ? 4 : VALUE == HALF ? 2 : 1;
constexpr int OUT_BYTES = OUT == FLOAT ? 4 : 2;
constexpr int WIDTH = CHANNELS * VALUE_BYTES < 16 ? CHANNELS : 16 / VALUE_BYTES;  // channels per lane
constexpr int WORDS = WIDTH * VALUE_BYTES / 4;                                    // 32-bit words per load
constexpr int LANES = CHANNELS / WIDTH;                                           // lanes per team

static_assert(CHANNELS % WIDTH == 0 && (LANES & (LANES - 1)) == 0 && LANES <= 32, "a team is 1, 2, 4, 8, 16 or 32 lanes");
static_assert(WIDTH % 4 == 0, "a lane reads whole words");

#ifdef __CUDACC__

#define INLINE static __device__ __forceinline__

INLINE float2 floats_of_halves(unsigned word) {
    float2 both;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(both.x), "=f"(both.y)
        : "r"(word));
    return both;
}

INLINE unsigned halves_of_floats(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

INLINE int dot_of_bytes(unsigned weights, unsigned numbers, int sum) {  // weights are 0 to 255, numbers -128 to 127
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(weights), "r"(numbers));
    return sum;
}

#endif

#if OUT == HALF
using OutNumber = unsigned short;  // the bits of a float16
#else
using OutNumber = float;
#endif

INLINE float float_of(float number) { return number; }
INLINE float float_of(unsigned short half) { return floats_of_halves(half).x; }

template <int COUNT>
INLINE void load(const void* from, unsigned (&to)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
        for (int i = 0; i < COUNT; i += 4) {
            const uint4 read = __ldg(static_cast<const uint4*>(from) + i / 4);
            to[i] = read.x, to[i + 1] = read.y, to[i + 2] = read.z, to[i + 3] = read.w;
        }
    } else if constexpr (COUNT % 2 == 0) {
        for (int i = 0; i < COUNT; i += 2) {
            const uint2 read = __ldg(static_cast<const uint2*>(from) + i / 2);
            to[i] = read.x, to[i + 1] = read.y;
        }
    } else {
        for (int i = 0; i < COUNT; ++i) to[i] = __ldg(static_cast<const unsigned*>(from) + i);
    }
}

template <int COUNT>
INLINE void store(void* to, const unsigned (&from)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
        for (int i = 0; i < COUNT; i += 4) static_cast<uint4*>(to)[i / 4] = uint4{from[i], from[i + 1], from[i + 2], from[i + 3]};
    } else {
        for (int i = 0; i < COUNT; i += 2) static_cast<uint2*>(to)[i / 2] = uint2{from[i], from[i + 1]};
    }
}

// Weights holds the weights of a point's corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), which are zero outside the level. Sum is
// the weighted sum of one channel. For INT8, weights are rounded to multiples of 1 / 65535 and split into an upper and a lower byte, so
// that sums are integers: one instruction multiplies four corners by the upper or the lower bytes of their weights. Floats need eight
// instructions to convert and multiply four corners.
#if VALUE == INT8
constexpr float WEIGHT_ONE = 65535.0f;
struct Weights {
    unsigned upper, lower;  // one byte per corner
};
struct Sum {
    int upper, lower;
};
INLINE unsigned rounded_weight(float weight) {  // in the low 16 bits: adding 2^23 rounds to an integer and puts it there
    return __float_as_uint(fmaf(weight, WEIGHT_ONE, 8388608.0f));
}
#else
struct Weights {
    float of[4];
};
using Sum = float;
#endif

// Multiply the weights along x by those along y, which include the point's softmax weight.
INLINE Weights corner_weights(float x_low, float x_high, float y_low, float y_high) {
#if VALUE == INT8
    const unsigned a = rounded_weight(y_low * x_low), b = rounded_weight(y_low * x_high);
    const unsigned c = rounded_weight(y_high * x_low), d = rounded_weight(y_high * x_high);
    const unsigned ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);  // lower a, lower b, upper a, upper b
    return {__byte_perm(ab, cd, 0x7632), __byte_perm(ab, cd, 0x5410)};
#else
    return {{y_low * x_low, y_low * x_high, y_high * x_low, y_high * x_high}};
#endif
}

INLINE bool has_weight(const Weights& weights, int corner) {
#if VALUE == INT8
    return ((weights.upper | weights.lower) >> 8 * corner & 0xff) != 0;
#else
    return weights.of[corner] != 0;
#endif
}

// Add a point's corners, multiplied by their weights, to the sums of WIDTH channels.
INLINE void add(const unsigned (&corner)[4][WORDS], const Weights& weights, Sum (&sum)[WIDTH]) {
#if VALUE == INT8
    for (int w = 0; w < WORDS; ++w) {
        const unsigned ab01 = __byte_perm(corner[0][w], corner[1][w], 0x5140), ab23 = __byte_perm(corner[0][w], corner[1][w], 0x7362);
        const unsigned cd01 = __byte_perm(corner[2][w], corner[3][w], 0x5140), cd23 = __byte_perm(corner[2][w], corner[3][w], 0x7362);
        const unsigned channel[4] = {__byte_perm(ab01, cd01, 0x5410), __byte_perm(ab01, cd01, 0x7632), __byte_perm(ab23, cd23, 0x5410),
                                     __byte_perm(ab23, cd23, 0x7632)};
        for (int c = 0; c < 4; ++c) {
            Sum& of_channel = sum[4 * w + c];
            of_channel.upper = dot_of_bytes(weights.upper, channel[c], of_channel.upper);
            of_channel.lower = dot_of_bytes(weights.lower, channel[c], of_channel.lower);
        }
    }
#else
    for (int c = 0; c < 4; ++c) {
        for (int w = 0; w < WORDS; ++w) {
            if constexpr (VALUE == FLOAT) {
                sum[w] = fmaf(weights.of[c], __uint_as_float(corner[c][w]), sum[w]);
            } else {
                const float2 both = floats_of_halves(corner[c][w]);
                sum[2 * w] = fmaf(weights.of[c], both.x, sum[2 * w]);
                sum[2 * w + 1] = fmaf(weights.of[c], both.y, sum[2 * w + 1]);
            }
        }
    }
#endif
}

INLINE float number_of(const Sum& sum, float scale) {
#if VALUE == INT8
    return float(sum.upper * 256 + sum.lower) * (scale / WEIGHT_ONE);
#else
    return sum;
#endif
}
