// Deformable attention in one kernel: softmax, sampling positions, bilinear reads, and the mean over the cameras that see a query.
//
// plugins/README.md describes the inputs and the output; qdbev/ops/msda.py and qdbev/ops/sca.py are the reference. variant.py puts
// numbers.cuh before this text, and before that #defines of
//   SPATIAL      1: SpatialCrossAttention; 0: MultiScaleDeformableAttention, which is the same with one camera that sees every query
//   HEADS, CHANNELS (per head), LEVELS, POINTS (per level), PILLARS (reference points per query and camera)
//   LEVEL_HW     sizes of the levels in cells, as {h0, w0}, {h1, w1}, ...
//   KEYS         number of keys of all levels together, per camera
//   VALUE, OUT   number types of `value` and of the output: FLOAT, HALF or INT8
//   THREADS      threads per block
// The tests compile the same text as host C++, where tests/kernel_on_host.h replaces the sections under __CUDACC__.
//
// A team is a group of LANES threads of one warp (its lanes) that computes one query and head. Each lane sums the WIDTH channels that
// one load of up to 128 bits reads. For each level, each lane first prepares OWN sampling points: position, softmax weight and the
// weights of the four corners. Then all lanes read all points of the team and get what another lane prepared by warp shuffle. All
// threads of a warp take the same branches: they skip work only if a vote shows that no thread of the warp needs it.

constexpr int OWN = (POINTS + LANES - 1) / LANES;
constexpr int BATCH = 2;  // number of points whose corners are all loaded before the first is used
constexpr int BAND = 8;   // number of rows of the query grid that are walked together
constexpr float LOWEST = -3.402823466e38f, LOG2_E = 1.44269504f;

// Smallest number of blocks that must fit on a multiprocessor, which limits the registers per thread. It is the largest number with
// which the compiler spills no register.
constexpr int BLOCKS = OWN > 4 ? 1 : OWN > 2 || VALUE == INT8 ? 2 : 3;

static_assert(POINTS <= 32 && POINTS % PILLARS == 0, "a level's points are bits of a word, shared out evenly among the pillar points");
static_assert(1ll * KEYS * STEP * VALUE_BYTES < 1ll << 31, "a camera's keys are reached by a 32-bit offset");

#ifdef __CUDACC__

// On a GPU a thread holds the state of one lane of a team. On the host one call holds the state of all lanes of a team.
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define FROM_LANE(lanes, owner, member) __shfl_sync(0xffffffffu, lanes[0].member, owner, LANES)

constexpr int HELD = 1;

INLINE int lane_at(int) { return threadIdx.x % LANES; }

INLINE bool any_team(bool ours) { return __any_sync(0xffffffffu, ours); }  // true for any team of the warp

INLINE bool any_lane(const unsigned (&bits)[HELD]) { return __any_sync(0xffffffffu, bits[0] != 0); }  // true for any lane of the warp

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
    int offset;  // index of the corner (y, x), counted in numbers from the head's first key; may be outside the level
    Weights weights;
};

struct Lane {
    int index;              // position in its team
    float2 reference[OWN];  // reference of each of its points, in the current camera
    Point point[OWN];       // its points, prepared for the current level
    unsigned outside;       // bit p: point p is its own and has a corner outside the level
    unsigned touched;       // bit p: point p is its own and has a corner inside the level
    Sum sum[WIDTH];         // the sums of its channels
};

struct Inputs {
    const void* value;              // (B, N, S, M, C)
    const float* reference_points;  // (B, N, Q, D, 2)
    const float* visible;           // (B, N, Q), or null if there is one camera that sees every query
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

// Load EACH numbers for each of a lane's points of a level. A point beyond the last one of the level gets `missing`.
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

// Position of a point along one axis of `size` cells: `cell` is the last cell center before it, -1 to size - 1, and `share` the
// distance from there in cells, 0 to 1. Returns false if neither neighboring cell exists, or the position is not a number.
INLINE bool place(float reference, float offset, int size, int& cell, float& share) {
    const float shift = offset - 0.5f, at = fmaf(reference, float(size), shift);
    const bool touched = at > -1 && at < size;
    const float low = floorf(touched ? at : -1.0f);
    cell = int(low);
    // Computed this way, the rounding error is that of a number below 1 and not that of a number as large as the position.
    share = touched ? __saturatef(fmaf(reference, float(size), -low) + shift) : 0.0f;
    return touched;
}

// Compute positions and corner weights of a lane's points in one level. `scale` is the factor of the camera's softmax weights; it is 0
// for a team that has no camera left and only takes part in the votes of its warp.
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

// Add up to BATCH points to the sums. INSIDE states that all their corners are inside the level, for all teams of the warp. If not
// INSIDE, only corners with a weight are read, so that nothing outside a level is ever read: corners outside have no weight.
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

// Add one camera's contribution to the sums. `head` points to the first key of this head and camera.
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

// Compute the largest logit over all levels and points, and `total`, the sum of exp(logit - largest).
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

// Index of the query that is computed at position `order`. If the queries are the cells of a grid with rows of `row_length`, the grid is
// walked in bands of BAND rows, and each band column by column. The queries of a block are then neighbors and share the L1 cache.
INLINE int query_at(int order, int num_query, int row_length) {
    if (row_length == 0) return order;
    const int first_row = order / (BAND * row_length) * BAND, rows = min(BAND, num_query / row_length - first_row);
    const int within = order - first_row * row_length;
    return (first_row + within % rows) * row_length + within / rows;
}

// Return the cameras that see the query, bit n for camera n. `views` is the sum of the query's visibility over all cameras.
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

// Compute one query of one head and one sample of the batch, by one team.
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

// The grid is x: groups of THREADS / LANES queries, y: heads, z: batch. Blocks of one head run together, so that only one head's part of
// `value` is read at a time, which can stay in the L2 cache. row_length divides num_query, or is 0; see `query_at`.
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
