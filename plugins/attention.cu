// Deformable attention as one kernel: softmax, sampling positions, bilinear reads, and the sum over the cameras that see a query.
//
// Contract: plugins/README.md. Truth: qdbev/ops/msda.py and qdbev/ops/sca.py. Compiled by NVRTC (plugins/compile.py) behind #defines of
// SPATIAL (1: SpatialCrossAttention, 0: MultiScaleDeformableAttention, the same with one camera that sees everything), HEADS, CHANNELS,
// LEVELS, POINTS, PILLARS, LEVEL_HW ({h0, w0}, {h1, w1}, ...), VALUE and OUT (FLOAT, HALF or INT8). The tests compile the same text as
// host C++, where tests/kernel_on_host.h stands for the first section.
//
// A team of LANES threads computes one query and head; each lane holds the CHANNELS / LANES channels that one load of up to 128 bits
// brings. For every level, each lane prepares its OWN of the points (position, softmax weight, weights of the four corners) once; all
// lanes then read all points, taking what another lane prepared by warp shuffle. The warp never diverges: what it skips, it skips by vote.

#define FLOAT 0
#define HALF 1
#define INT8 2

constexpr int STEP = HEADS * CHANNELS;  // elements from a key to the next
constexpr int VALUE_BYTES = VALUE == FLOAT ? 4 : VALUE == HALF ? 2 : 1;
constexpr int WIDTH = CHANNELS * VALUE_BYTES < 16 ? CHANNELS : 16 / VALUE_BYTES;  // channels a lane
constexpr int LANES = CHANNELS / WIDTH;
constexpr int OWN = (POINTS + LANES - 1) / LANES;  // points of a level that a lane prepares
constexpr int THREADS = 128;                       // a block
constexpr int BLOCKS = OWN <= 2 ? 5 : OWN <= 4 ? 4 : 3;  // a multiprocessor, at least: leaves each thread the registers it needs
constexpr int BAND = 4;                            // rows of the query grid that a block walks together
constexpr int BATCH = 2;                           // points whose corners are all asked for before the first is used
constexpr float LOWEST = -3.402823466e38f;

static_assert(CHANNELS % WIDTH == 0 && (LANES & (LANES - 1)) == 0 && LANES <= 32, "a team is 1, 2, 4, ... 32 lanes");
static_assert(WIDTH * VALUE_BYTES % 4 == 0, "a lane reads whole words");
static_assert(POINTS <= 32, "a level's points are bits of a word");
static_assert(POINTS % PILLARS == 0, "points are shared out evenly among the pillar points");

#ifdef __CUDACC__

// A thread is one lane: HELD lanes are in its hands. On the host one call holds a whole team.
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define INLINE static __device__ __forceinline__
#define FROM_LANE(lanes, owner, member) __shfl_sync(0xffffffffu, lanes[0].member, owner, LANES)

constexpr int HELD = 1;

INLINE int lane_at(int) { return threadIdx.x % LANES; }

INLINE bool any_team(bool ours) { return __any_sync(0xffffffffu, ours); }  // of the warp's teams

INLINE bool any(const unsigned (&bits)[HELD]) { return any_team(bits[0] != 0); }

INLINE float largest_of_team(const float (&mine)[HELD]) {
    float all = mine[0];
    for (int step = LANES / 2; step; step /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, step));
    return all;
}

INLINE float sum_of_team(const float (&mine)[HELD]) {
    float all = mine[0];
    for (int step = LANES / 2; step; step /= 2) all += __shfl_xor_sync(0xffffffffu, all, step);
    return all;
}

INLINE float float_of_half(unsigned word, bool high) {
    float number;
    if (high) {
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(number) : "r"(word));
    } else {
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(number) : "r"(word));
    }
    return number;
}

INLINE unsigned halves_of_floats(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

#endif

__constant__ int LEVEL_SIZES[LEVELS][2] = {LEVEL_HW};

struct Point {
    int offset;       // of the corner at low x and y, in elements from the head's first key; may lie outside
    float weight[4];  // of the corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1); zero outside the level
};

struct Lane {
    int index;                 // in its team
    float2 reference[OWN];     // of its points, in this camera
    float offset[2 * OWN];     // of its points in the level to come: x, y, x, y, ...
    float logit[OWN];
    Point point[OWN];          // prepared for the level at hand
    unsigned outside;          // bit p: it owns point p, of which a corner lies outside the level
    unsigned touched;          // bit p: it owns point p, of which a corner lies inside
    float given;               // sum of all corner weights it prepared
    float sum[WIDTH];          // of its channels
};

struct Inputs {
    const void* value;              // (B, N, S, M, C)
    const float* reference_points;  // (B, N, Q, D, 2)
    const float* visible;           // (B, N, Q), or null where the one camera sees every query
    const float* sampling_offsets;  // (B, Q, M, L, P, 2)
    const float* attention_logits;  // (B, Q, M, L, P)
    int num_query, num_cameras, row_length;
};

template <int COUNT> INLINE void load(const void* from, unsigned (&to)[COUNT]) {
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

template <int COUNT> INLINE void store(void* to, const unsigned (&from)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
        for (int i = 0; i < COUNT; i += 4) static_cast<uint4*>(to)[i / 4] = uint4{from[i], from[i + 1], from[i + 2], from[i + 3]};
    } else if constexpr (COUNT % 2 == 0) {
        for (int i = 0; i < COUNT; i += 2) static_cast<uint2*>(to)[i / 2] = uint2{from[i], from[i + 1]};
    } else {
        for (int i = 0; i < COUNT; ++i) static_cast<unsigned*>(to)[i] = from[i];
    }
}

// The numbers a lane owns of one level, EACH a point; `missing` where the level has no such point.
template <int EACH> INLINE void load_own(const float* level, int lane, float missing, float (&to)[EACH * OWN]) {
    const float* from = level + lane * OWN * EACH;
    if constexpr (POINTS % LANES == 0) {
        unsigned words[EACH * OWN];
        load(from, words);
        for (int i = 0; i < EACH * OWN; ++i) to[i] = __uint_as_float(words[i]);
    } else {
        for (int i = 0; i < EACH * OWN; ++i) to[i] = lane * OWN + i / EACH < POINTS ? __ldg(from + i) : missing;
    }
}

// A number of `value` as float: BIAS + number / UNIT. For INT8, the byte moved into the mantissa of 128, which takes one instruction
// where a conversion takes two; all biases together are taken off at the end.
constexpr float BIAS = VALUE == INT8 ? 128.5f : 0.0f;
constexpr float UNIT = VALUE == INT8 ? 256.0f : 1.0f;

INLINE void add(unsigned word, float weight, float* sum) {
    if constexpr (VALUE == FLOAT) {
        sum[0] = fmaf(weight, __uint_as_float(word), sum[0]);
    } else if constexpr (VALUE == HALF) {
        sum[0] = fmaf(weight, float_of_half(word, false), sum[0]);
        sum[1] = fmaf(weight, float_of_half(word, true), sum[1]);
    } else {
        const unsigned bytes = word ^ 0x80808080u;  // 0 to 255
        sum[0] = fmaf(weight, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7504)), sum[0]);
        sum[1] = fmaf(weight, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7514)), sum[1]);
        sum[2] = fmaf(weight, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7524)), sum[2]);
        sum[3] = fmaf(weight, __uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7534)), sum[3]);
    }
}

// The query that comes `index`-th: grids of rows of `row_length` are walked in bands of BAND rows, column by column, so that the queries
// of a block are neighbours and read the same cache lines; 0 leaves the order as it is.
INLINE int query_at(int index, int num_query, int row_length) {
    if (row_length == 0) return index;
    const int band = index / (BAND * row_length), first = band * BAND;
    const int rows = min(BAND, num_query / row_length - first), within = index - first * row_length;
    return (first + within % rows) * row_length + within / rows;
}

INLINE float prepare(Lane& lane, int height, int width, int first_key, float scale, float largest) {
    float given = 0;
    lane.outside = lane.touched = 0;
    for (int k = 0; k < OWN; ++k) {
        float x = fmaf(lane.reference[k].x, float(width), lane.offset[2 * k] - 0.5f);
        float y = fmaf(lane.reference[k].y, float(height), lane.offset[2 * k + 1] - 0.5f);
        const bool touched = scale != 0 && x > -1 && x < width && y > -1 && y < height;  // false for NaN, too
        x = touched ? x : -1.0f, y = touched ? y : -1.0f;
        const float left = floorf(x), top = floorf(y);
        const int column = int(left), row = int(top);
        const float weight = touched ? exp2f((lane.logit[k] - largest) * 1.442695041f) * scale : 0.0f;
        const float right_share = column + 1 < width ? x - left : 0.0f, left_share = column >= 0 ? 1 - (x - left) : 0.0f;
        const float low_share = row + 1 < height ? (y - top) * weight : 0.0f, high_share = row >= 0 ? (1 - (y - top)) * weight : 0.0f;
        Point& point = lane.point[k];
        point.offset = (first_key + row * width + column) * STEP;
        point.weight[0] = high_share * left_share, point.weight[1] = high_share * right_share;
        point.weight[2] = low_share * left_share, point.weight[3] = low_share * right_share;
        given += (point.weight[0] + point.weight[1]) + (point.weight[2] + point.weight[3]);
        const bool interior = column >= 0 && column + 1 < width && row >= 0 && row + 1 < height;
        const int bit = lane.index * OWN + k;
        lane.outside |= unsigned(bit < POINTS && !interior) << bit;
        lane.touched |= unsigned(bit < POINTS && touched) << bit;
    }
    return given;
}

// Add up to BATCH points to the sums. INTERIOR: all corners lie inside, for all teams of the warp. Else a corner without weight is not
// read, be it outside or not, so that nothing outside is ever touched.
template <bool INTERIOR> INLINE void read(Lane (&lanes)[HELD], int first, const char* head, int row_bytes) {
    for (int held = 0; held < HELD; ++held) {
        const char* channels = head + lanes[held].index * (WIDTH * VALUE_BYTES);
        float weight[BATCH][4];
        unsigned corner[BATCH][4][WIDTH * VALUE_BYTES / 4];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i >= POINTS) break;
            const int owner = (first + i) / OWN, k = (first + i) % OWN;
            const char* at = channels + (long long)(FROM_LANE(lanes, owner, point[k].offset)) * VALUE_BYTES;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                weight[i][c] = FROM_LANE(lanes, owner, point[k].weight[c]);
                for (unsigned& word : corner[i][c]) word = 0;
                if (INTERIOR || weight[i][c] != 0) load(at + (c & 1) * STEP * VALUE_BYTES + (c >> 1) * row_bytes, corner[i][c]);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i >= POINTS) break;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int w = 0; w < WIDTH * VALUE_BYTES / 4; ++w) add(corner[i][c][w], weight[i][c], lanes[held].sum + w * 4 / VALUE_BYTES);
            }
        }
    }
}

INLINE void read_level(Lane (&lanes)[HELD], const char* head, int row_bytes) {
#pragma unroll
    for (int first = 0; first < POINTS; first += BATCH) {
        const unsigned batch = ((1u << BATCH) - 1) << first;
        unsigned outside[HELD], touched[HELD];
        for (int held = 0; held < HELD; ++held) {
            outside[held] = lanes[held].outside & batch;
            touched[held] = lanes[held].touched & batch;
        }
        if (!any(touched)) continue;
        if (any(outside)) {
            read<false>(lanes, first, head, row_bytes);
        } else {
            read<true>(lanes, first, head, row_bytes);
        }
    }
}

// One camera's share of a query and head, added to the lanes' sums.
INLINE void read_camera(Lane (&lanes)[HELD], const char* head, const float* offsets, const float* logits, float scale, float largest) {
    for (int held = 0; held < HELD; ++held) {
        load_own<2>(offsets, lanes[held].index, 0.0f, lanes[held].offset);
        load_own<1>(logits, lanes[held].index, LOWEST, lanes[held].logit);
    }
    int first_key = 0;
#pragma unroll 1
    for (int level = 0; level < LEVELS; ++level) {
        const int height = LEVEL_SIZES[level][0], width = LEVEL_SIZES[level][1];
        for (int held = 0; held < HELD; ++held) {
            Lane& lane = lanes[held];
            lane.given += prepare(lane, height, width, first_key, scale, largest);
            if (level + 1 < LEVELS) {  // asked for now, needed when this level is read
                load_own<2>(offsets + (level + 1) * 2 * POINTS, lane.index, 0.0f, lane.offset);
                load_own<1>(logits + (level + 1) * POINTS, lane.index, LOWEST, lane.logit);
            }
        }
        read_level(lanes, head, width * STEP * VALUE_BYTES);
        first_key += height * width;
    }
}

// Largest logit of the query and head over all levels and points, and the sum of exponentials below it.
INLINE void softmax(Lane (&lanes)[HELD], const float* logits, float& largest, float& total) {
    float mine[HELD][LEVELS * OWN], of_lane[HELD];
    for (int held = 0; held < HELD; ++held) {
        of_lane[held] = LOWEST;
        for (int level = 0; level < LEVELS; ++level) {
            float read[OWN];
            load_own<1>(logits + level * POINTS, lanes[held].index, LOWEST, read);
            for (int k = 0; k < OWN; ++k) {
                mine[held][level * OWN + k] = read[k];
                of_lane[held] = fmaxf(of_lane[held], read[k]);
            }
        }
    }
    largest = largest_of_team(of_lane);
    for (int held = 0; held < HELD; ++held) {
        of_lane[held] = 0;
        for (float logit : mine[held]) of_lane[held] += exp2f((logit - largest) * 1.442695041f);
    }
    total = sum_of_team(of_lane);
}
INLINE unsigned cameras_of(const Inputs& in, size_t sample, int query, float& views) {
    unsigned seen = 0;
    views = 0;
    for (int camera = 0; camera < in.num_cameras; ++camera) {
        const float visible = __ldg(in.visible + (sample * in.num_cameras + camera) * in.num_query + query);
        views += visible;
        seen |= unsigned(visible > 0) << camera;
    }
    return seen;
}

INLINE void write(const Lane& lane, float given, float scale, char* to) {
    float number[WIDTH];
    for (int c = 0; c < WIDTH; ++c) number[c] = fmaf(-BIAS, given, lane.sum[c]) * (UNIT * scale);
#if OUT == HALF
    unsigned words[WIDTH / 2];
    for (int c = 0; c < WIDTH; c += 2) words[c / 2] = halves_of_floats(number[c], number[c + 1]);
#else
    unsigned words[WIDTH];
    for (int c = 0; c < WIDTH; ++c) words[c] = __float_as_uint(number[c]);
#endif
    store(to + lane.index * sizeof(words), words);
}

// All that a team does: the query that is `order`-th, one head, one sample of the batch.
INLINE void attend(const Inputs& in, float value_scale, int order, int head, size_t sample, void* out) {
    const bool active = order < in.num_query;
    const int query = active ? query_at(order, in.num_query, in.row_length) : 0;
    const size_t pair = (sample * in.num_query + query) * HEADS + head;
    const float* offsets = in.sampling_offsets + pair * (LEVELS * POINTS * 2);
    const float* logits = in.attention_logits + pair * (LEVELS * POINTS);
    size_t keys = 0;
    for (int level = 0; level < LEVELS; ++level) keys += LEVEL_SIZES[level][0] * LEVEL_SIZES[level][1];

    float views = 1;
    unsigned cameras = 1;
    if (in.visible) cameras = cameras_of(in, sample, query, views);
    if (!active) cameras = 0;

    Lane lanes[HELD];
    for (int held = 0; held < HELD; ++held) {
        lanes[held].index = lane_at(held);
        lanes[held].given = 0;
        for (float& sum : lanes[held].sum) sum = 0;
    }
    float largest, total;
    softmax(lanes, logits, largest, total);
    while (any_team(cameras)) {
        const int camera = cameras ? __ffs(cameras) - 1 : 0;
        const size_t view = sample * in.num_cameras + camera;
        float scale = 0;
        if (cameras) scale = (in.visible ? __ldg(in.visible + view * in.num_query + query) : 1) / (fmaxf(views, 1) * total);
        cameras &= cameras - 1;
        const float2* references = reinterpret_cast<const float2*>(in.reference_points) + (view * in.num_query + query) * PILLARS;
        for (int held = 0; held < HELD; ++held) {
            for (int k = 0; k < OWN; ++k) lanes[held].reference[k] = __ldg(references + (lanes[held].index * OWN + k) % PILLARS);
        }
        const char* keys_of_head = static_cast<const char*>(in.value) + (view * keys * STEP + head * CHANNELS) * VALUE_BYTES;
        read_camera(lanes, keys_of_head, offsets, logits, scale, largest);
    }
    float given[HELD];
    for (int held = 0; held < HELD; ++held) given[held] = lanes[held].given;
    const float all_given = BIAS != 0 ? sum_of_team(given) : 0;
    char* to = static_cast<char*>(out) + pair * CHANNELS * (OUT == HALF ? 2 : 4);
    for (int held = 0; held < HELD && active; ++held) write(lanes[held], all_given, value_scale, to);
}

// Grid: x over blocks of THREADS / LANES queries, y over heads, z over the batch. Heads come one after the other, so that what all
// blocks read at a time is an eighth of `value` and stays in the L2 cache.
#if SPATIAL
KERNEL spatial_cross_attention(
#else
KERNEL multi_scale_deformable_attention(
#endif
    const void* value,
#if VALUE == INT8
    const float* value_scale,
#endif
    const float* reference_points,
#if SPATIAL
    const float* visible,
#endif
    const float* sampling_offsets, const float* attention_logits, int num_query,
#if SPATIAL
    int num_cameras,
#endif
    int row_length, void* out) {
#if !SPATIAL
    const float* visible = nullptr;
    const int num_cameras = 1;
#endif
#if VALUE == INT8
    const float scale = *value_scale;
#else
    const float scale = 1;
#endif
    const Inputs in{value, reference_points, visible, sampling_offsets, attention_logits, num_query, num_cameras, row_length};
    const int order = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    attend(in, scale, order, blockIdx.y, blockIdx.z, out);
}
