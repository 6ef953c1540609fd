// Deformable attention in one kernel: softmax, sampling positions, bilinear reads, and the mean over the cameras that see a query.
//
// Contract: plugins/README.md. Truth: qdbev/ops/msda.py and qdbev/ops/sca.py. plugins/variant.py puts plugins/numbers.cuh before this text
// and before that #defines of SPATIAL (1: SpatialCrossAttention; 0: MultiScaleDeformableAttention, the same with one camera that sees
// everything), HEADS, CHANNELS, LEVELS, POINTS, PILLARS, LEVEL_HW as {h0, w0}, {h1, w1}, ..., KEYS of all levels together, VALUE and OUT as
// FLOAT, HALF or INT8, and THREADS of a block. The tests compile the same text as host C++; tests/kernel_on_host.h then stands for the
// sections of __CUDACC__.
//
// A team of LANES threads computes one query and head, each the WIDTH channels that one load of up to 128 bits brings. Of every level
// each lane prepares OWN points once: position, softmax weight, weights of the four corners. Then all lanes read all points and take
// what another lane prepared by warp shuffle. A warp never diverges: what it skips, it skips by vote.

constexpr int OWN = (POINTS + LANES - 1) / LANES;
constexpr int BATCH = 2;  // points whose corners are all asked for before the first is used
constexpr int BAND = 8;   // rows of the query grid that are walked together
constexpr float LOWEST = -3.402823466e38f, LOG2_E = 1.44269504f;

// Blocks that a multiprocessor holds at least, which bounds the registers of a thread: as many as leave nothing to spill.
constexpr int BLOCKS = OWN > 4 ? 1 : OWN > 2 || VALUE == INT8 ? 2 : 3;

static_assert(POINTS <= 32 && POINTS % PILLARS == 0, "a level's points are bits of a word, shared out evenly among the pillar points");
static_assert(1ll * KEYS * STEP * VALUE_BYTES < 1ll << 31, "a camera's keys are reached by a 32-bit offset");

#ifdef __CUDACC__

// A thread is one lane of a team, so it holds one; a call on the host holds a whole team.
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define FROM_LANE(lanes, owner, member) __shfl_sync(0xffffffffu, lanes[0].member, owner, LANES)

constexpr int HELD = 1;

INLINE int lane_at(int) { return threadIdx.x % LANES; }

INLINE bool any_team(bool ours) { return __any_sync(0xffffffffu, ours); }  // of the warp

INLINE bool any_lane(const unsigned (&bits)[HELD]) { return __any_sync(0xffffffffu, bits[0] != 0); }  // of the warp

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

#endif

__constant__ int LEVEL_SIZES[LEVELS][2] = {LEVEL_HW};

struct Point {
    int offset;  // of the corner (y, x), in numbers from the head's first key; may lie outside
    Weights weights;
};

struct Lane {
    int index;              // in its team
    float2 reference[OWN];  // of its points, in the camera at hand
    Point point[OWN];       // prepared for the level at hand
    unsigned outside;       // bit p: it owns point p, and a corner lies outside the level
    unsigned touched;       // bit p: it owns point p, and a corner lies inside
    Sum sum[WIDTH];         // of its channels
};

struct Inputs {
    const void* value;              // (B, N, S, M, C)
    const float* reference_points;  // (B, N, Q, D, 2)
    const float* visible;           // (B, N, Q), or null where the one camera sees every query
    const float* sampling_offsets;  // (B, Q, M, L, P, 2)
    const float* attention_logits;  // (B, Q, M, L, P)
    int num_query, num_cameras, row_length;
};

INLINE Weights weights_from_lane(const Lane (&lanes)[HELD], int owner, int k) {
#if VALUE == INT8
    return {FROM_LANE(lanes, owner, point[k].weights.upper), FROM_LANE(lanes, owner, point[k].weights.lower)};
#else
    return {{FROM_LANE(lanes, owner, point[k].weights.of[0]), FROM_LANE(lanes, owner, point[k].weights.of[1]),
             FROM_LANE(lanes, owner, point[k].weights.of[2]), FROM_LANE(lanes, owner, point[k].weights.of[3])}};
#endif
}

// EACH numbers of each point of a level that a lane owns; `missing` where the level has no such point.
template <int EACH>
INLINE void load_own(const float* level, int lane, float missing, float (&to)[EACH * OWN]) {
    const float* from = level + lane * OWN * EACH;
    if constexpr (POINTS % LANES == 0) {
        unsigned words[EACH * OWN];
        load(from, words);
        for (int i = 0; i < EACH * OWN; ++i) to[i] = __uint_as_float(words[i]);
    } else {
        for (int i = 0; i < EACH * OWN; ++i) to[i] = lane * OWN + i / EACH < POINTS ? __ldg(from + i) : missing;
    }
}

// Where a point lies along one axis of `size` cells: the cell before it, -1 to size - 1, and its share of the way to the next one.
// False if it touches no cell, or is no number.
INLINE bool place(float reference, float offset, int size, int& cell, float& share) {
    const float shift = offset - 0.5f, at = fmaf(reference, float(size), shift);
    const bool touched = at > -1 && at < size;
    const float low = floorf(touched ? at : -1.0f);
    cell = int(low);
    // Rounded at the size of the share, not at that of the position.
    share = touched ? __saturatef(fmaf(reference, float(size), -low) + shift) : 0.0f;
    return touched;
}

// Positions and weights of a lane's points in one level. `scale` is what the camera's softmax weights are multiplied by, 0 for a team
// that only waits for others of its warp.
INLINE void prepare(Lane& lane, const float* offsets, const float* logits, int level, int first_key, float scale, float largest) {
    const int height = LEVEL_SIZES[level][0], width = LEVEL_SIZES[level][1];
    float offset[2 * OWN], logit[OWN];
    load_own<2>(offsets, lane.index, 0.0f, offset);
    load_own<1>(logits, lane.index, LOWEST, logit);
    lane.outside = lane.touched = 0;
    for (int k = 0; k < OWN; ++k) {
        int column, row;
        float x, y;
        const bool x_touched = place(lane.reference[k].x, offset[2 * k], width, column, x);
        const bool touched = place(lane.reference[k].y, offset[2 * k + 1], height, row, y) && x_touched && scale != 0;
        const float weight = touched ? exp2f((logit[k] - largest) * LOG2_E) * scale : 0.0f;
        const float x_low = column >= 0 ? 1 - x : 0.0f, x_high = column + 1 < width ? x : 0.0f;
        const float y_low = row >= 0 ? (1 - y) * weight : 0.0f, y_high = row + 1 < height ? y * weight : 0.0f;
        lane.point[k].offset = (first_key + row * width + column) * STEP;
        lane.point[k].weights = corner_weights(x_low, x_high, y_low, y_high);
        const bool inside = touched && column >= 0 && column + 1 < width && row >= 0 && row + 1 < height;
        const int bit = lane.index * OWN + k;
        lane.outside |= unsigned(bit < POINTS && !inside) << bit % 32;
        lane.touched |= unsigned(bit < POINTS && touched) << bit % 32;
    }
}

// Add up to BATCH points to the sums. INSIDE: all their corners lie in the level, for all teams of the warp. Else a corner without
// weight is not read, be it outside or not, so that nothing outside is ever touched.
template <bool INSIDE>
INLINE void read_batch(Lane (&lanes)[HELD], int first, const char* head, int row_bytes) {
    for (int held = 0; held < HELD; ++held) {
        const char* channels = head + lanes[held].index * (WIDTH * VALUE_BYTES);
        Weights weights[BATCH];
        unsigned corner[BATCH][4][WORDS];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i >= POINTS) break;
            const int owner = (first + i) / OWN, k = (first + i) % OWN;
            const char* at = channels + (long long)(FROM_LANE(lanes, owner, point[k].offset)) * VALUE_BYTES;
            weights[i] = weights_from_lane(lanes, owner, k);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                for (unsigned& word : corner[i][c]) word = 0;
                if (INSIDE || has_weight(weights[i], c)) load(at + c % 2 * (STEP * VALUE_BYTES) + c / 2 * row_bytes, corner[i][c]);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i < POINTS) add(corner[i], weights[i], lanes[held].sum);
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
        if (!any_lane(touched)) continue;
        if (any_lane(outside)) {
            read_batch<false>(lanes, first, head, row_bytes);
        } else {
            read_batch<true>(lanes, first, head, row_bytes);
        }
    }
}

// One camera's part, added to the sums. `head` is the head's first key there.
INLINE void read_camera(Lane (&lanes)[HELD], const char* head, const float* offsets, const float* logits, float scale, float largest) {
    int first_key = 0;
#pragma unroll 1
    for (int level = 0; level < LEVELS; ++level) {
        const int height = LEVEL_SIZES[level][0], width = LEVEL_SIZES[level][1];
        for (int held = 0; held < HELD; ++held) {
            prepare(lanes[held], offsets + level * 2 * POINTS, logits + level * POINTS, level, first_key, scale, largest);
        }
        read_level(lanes, head, width * STEP * VALUE_BYTES);
        first_key += height * width;
    }
}

// Largest logit over all levels and points, and the sum of exponentials of what the others lie below it.
INLINE void softmax(const Lane (&lanes)[HELD], const float* logits, float& largest, float& total) {
    float read[HELD][LEVELS][OWN], mine[HELD];
    for (int held = 0; held < HELD; ++held) {
        mine[held] = LOWEST;
        for (int level = 0; level < LEVELS; ++level) {
            load_own<1>(logits + level * POINTS, lanes[held].index, LOWEST, read[held][level]);
            for (float logit : read[held][level]) mine[held] = fmaxf(mine[held], logit);
        }
    }
    largest = largest_of_team(mine);
    for (int held = 0; held < HELD; ++held) {
        mine[held] = 0;
        for (int level = 0; level < LEVELS; ++level) {
            for (float logit : read[held][level]) mine[held] += exp2f((logit - largest) * LOG2_E);
        }
    }
    total = sum_of_team(mine);
}

// The query that comes `order`-th. Where queries are the cells of a grid, rows of `row_length`, the grid is walked in bands of BAND rows
// and a band column by column, so that the queries of a block are neighbours and find in the L1 cache what others have read.
INLINE int query_at(int order, int num_query, int row_length) {
    if (row_length == 0) return order;
    const int first_row = order / (BAND * row_length) * BAND, rows = min(BAND, num_query / row_length - first_row);
    const int within = order - first_row * row_length;
    return (first_row + within % rows) * row_length + within / rows;
}

// Bit n: camera n sees the query; `views` is the sum of all its visibilities.
INLINE unsigned cameras_of(const Inputs& in, size_t sample, int query, float& views) {
    unsigned cameras = 0;
    views = 0;
#pragma unroll 4
    for (int camera = 0; camera < in.num_cameras; ++camera) {
        const float visible = __ldg(in.visible + (sample * in.num_cameras + camera) * in.num_query + query);
        views += visible;
        cameras |= unsigned(visible > 0) << camera;
    }
    return cameras;
}

INLINE void write(const Lane& lane, float scale, char* to) {
    unsigned words[WIDTH * OUT_BYTES / 4];
#if OUT == HALF
    for (int c = 0; c < WIDTH; c += 2) words[c / 2] = halves_of_floats(number_of(lane.sum[c], scale), number_of(lane.sum[c + 1], scale));
#else
    for (int c = 0; c < WIDTH; ++c) words[c] = __float_as_uint(number_of(lane.sum[c], scale));
#endif
    store(to + lane.index * sizeof(words), words);
}

// All that a team does: one query, one head, one sample of the batch.
INLINE void attend(const Inputs& in, float value_scale, int order, int head, size_t sample, void* out) {
    const bool active = order < in.num_query;
    const int query = active ? query_at(order, in.num_query, in.row_length) : 0;
    const size_t pair = (sample * in.num_query + query) * HEADS + head;
    const float* offsets = in.sampling_offsets + pair * (LEVELS * POINTS * 2);
    const float* logits = in.attention_logits + pair * (LEVELS * POINTS);

    Lane lanes[HELD] = {};
    for (int held = 0; held < HELD; ++held) lanes[held].index = lane_at(held);
    float views = 1, largest, total;
    unsigned cameras = active;
    if (in.visible && active) cameras = cameras_of(in, sample, query, views);
    softmax(lanes, logits, largest, total);
    while (any_team(cameras != 0)) {
        const int camera = cameras ? __ffs(cameras) - 1 : 0;
        const size_t view = sample * in.num_cameras + camera;
        const float visible = in.visible ? __ldg(in.visible + view * in.num_query + query) : 1.0f;
        const float scale = cameras ? visible / (fmaxf(views, 1.0f) * total) : 0.0f;
        cameras &= cameras - 1;
        const float2* references = reinterpret_cast<const float2*>(in.reference_points) + (view * in.num_query + query) * PILLARS;
        for (int held = 0; held < HELD; ++held) {
            for (int k = 0; k < OWN; ++k) lanes[held].reference[k] = __ldg(references + (lanes[held].index * OWN + k) % PILLARS);
        }
        const char* keys = static_cast<const char*>(in.value) + (view * KEYS * STEP + head * CHANNELS) * VALUE_BYTES;
        read_camera(lanes, keys, offsets, logits, scale, largest);
    }
    char* to = static_cast<char*>(out) + pair * CHANNELS * OUT_BYTES;
    for (int held = 0; held < HELD && active; ++held) write(lanes[held], value_scale, to);
}

// The grid: x over blocks of THREADS / LANES queries, y over heads, z over the batch. Heads come one after the other, so that what is
// read at a time is the HEADS-th part of `value` and stays in the L2 cache. row_length divides num_query, or is 0; see `query_at`.
#if SPATIAL
KERNEL spatial_cross_attention(const void* value,
#else
KERNEL multi_scale_deformable_attention(const void* value,
#endif
#if VALUE == INT8
                               const OutNumber* value_scale,  // one number
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
    const float scale = float_of(*value_scale);
#else
    const float scale = 1;
#endif
    const Inputs in{value, reference_points, visible, sampling_offsets, attention_logits, num_query, num_cameras, row_length};
    const int order = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    attend(in, scale, order, blockIdx.y, blockIdx.z, out);
}
