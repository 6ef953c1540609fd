// The kernels. This file is compiled once for each instruction set, which is the namespace INSTRUCTION_SET. Everything else is in an
// anonymous namespace and no function of the standard library is inlined, so that the linker cannot use code for a newer CPU elsewhere.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace {

using qdbev::Attention;
using qdbev::AttentionGradients;
using qdbev::Im2col;

#if defined(__AVX512F__)
constexpr int NATIVE = 16;  // floats of a register
#elif defined(__AVX2__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
constexpr int WIDEST = 64;  // channels that are summed at once

// WIDTH channels of a head. The compiler divides a vector that is wider than a register.
template <int WIDTH>
struct Vectors {
    typedef float Floats __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4)));
    typedef int32_t Ints __attribute__((vector_size(WIDTH * sizeof(int32_t)), aligned(4)));
};
template <int WIDTH>
using Floats = typename Vectors<WIDTH>::Floats;

template <int WIDTH>
inline Floats<WIDTH> load(const float* from) {
    Floats<WIDTH> loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

template <int WIDTH>
inline Floats<WIDTH> load(const int8_t* from) {
    typename Vectors<WIDTH>::Ints wide;
    for (int c = 0; c < WIDTH; ++c) wide[c] = from[c];
    return __builtin_convertvector(wide, Floats<WIDTH>);
}

template <int WIDTH>
inline void store(const Floats<WIDTH>& from, float* to) {
    std::memcpy(to, &from, sizeof from);
}

template <int WIDTH>
inline float total(const Floats<WIDTH>& of) {
    if constexpr (WIDTH == 1) {
        return of[0];
    } else {
        Floats<WIDTH / 2> low, high;
        std::memcpy(&low, &of, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&of) + sizeof low, sizeof high);
        return total<WIDTH / 2>(low + high);
    }
}

// An array of numbers without initial values.
template <typename T>
struct Array {
    explicit Array(int64_t size) : data(static_cast<T*>(std::malloc(size_t(size > 0 ? size : 1) * sizeof(T)))) {
        if (!data) std::abort();
    }
    ~Array() { std::free(data); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    T& operator[](int64_t i) { return data[i]; }
    T* data;
};

// e to the power of x <= 0, within 2 units in the last place, in a form that the compiler vectorizes. Source: Cephes, expf.c.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float power = (x * 1.44269504f + rounding) - rounding, rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const int32_t bits = (int32_t(power) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

// Softmax of `count` logits, times `factor`.
inline void softmax(const float* logits, int64_t count, float factor, float* weights) {
    float largest = logits[0], sum = 0;
    for (int64_t k = 1; k < count; ++k) largest = logits[k] > largest ? logits[k] : largest;
    for (int64_t k = 0; k < count; ++k) weights[k] = exponential(logits[k] - largest);
    for (int64_t k = 0; k < count; ++k) sum += weights[k];
    for (int64_t k = 0; k < count; ++k) weights[k] *= factor / sum;
}

// The sampling points of one query and head, k = level * P + point: cells and weights of the four corners of each. A corner outside the
// level has weight zero and the index of a cell inside.
struct Points {
    explicit Points(const Attention& in)
        : count(in.L * in.P), floats(14 * count), ints(8 * count), width(floats.data), height(width + count), reference_x(height + count),
          reference_y(reference_x + count), x_share(reference_y + count), y_share(x_share + count), left(y_share + count),
          right(left + count), top(right + count), bottom(top + count), columns(ints.data), rows(columns + count), first(rows + count),
          pillar(first + count) {
        for (int c = 0; c < 4; ++c) weight[c] = bottom + (c + 1) * count, cell[c] = pillar + (c + 1) * count;
        int32_t start = 0;
        for (int64_t level = 0, k = 0; level < in.L; ++level) {
            const int64_t level_rows = in.level_hw[2 * level], level_columns = in.level_hw[2 * level + 1];
            for (int64_t point = 0; point < in.P; ++point, ++k) {
                rows[k] = int32_t(level_rows), columns[k] = int32_t(level_columns), first[k] = start, pillar[k] = int32_t(point % in.D);
                height[k] = float(level_rows), width[k] = float(level_columns);
            }
            start += int32_t(level_rows * level_columns);
        }
    }

    // Set the reference point (D, 2) of each sampling point.
    void refer(const float* reference_points) {
        for (int64_t k = 0; k < count; ++k) {
            reference_x[k] = reference_points[2 * pillar[k]], reference_y[k] = reference_points[2 * pillar[k] + 1];
        }
    }

    // Place the points at reference + offset. A point's weight is attention * share, and zero where the point touches no cell. The share
    // of the next cell is computed from differences, whose rounding error is that of a number below 1.
    void place(const float* __restrict offsets, const float* __restrict attention, float share) {
        for (int64_t k = 0; k < count; ++k) {
            const float x_shift = offsets[2 * k] - 0.5f, y_shift = offsets[2 * k + 1] - 0.5f;
            const float x = reference_x[k] * width[k] + x_shift, y = reference_y[k] * height[k] + y_shift;
            const bool touched = x > -1.0f && y > -1.0f && x < width[k] && y < height[k];
            const float column = __builtin_floorf(touched ? x : 0.0f), row = __builtin_floorf(touched ? y : 0.0f);
            const float x_next = touched ? (reference_x[k] * width[k] - column) + x_shift : 0.0f;
            const float y_next = touched ? (reference_y[k] * height[k] - row) + y_shift : 0.0f;
            const float weight_here = touched ? attention[k] * share : 0.0f;
            const int32_t x0 = int32_t(column), y0 = int32_t(row), x1 = x0 + 1, y1 = y0 + 1;
            x_share[k] = x_next, y_share[k] = y_next;
            left[k] = touched && x0 >= 0 ? 1.0f : 0.0f, right[k] = touched && x1 < columns[k] ? 1.0f : 0.0f;
            top[k] = touched && y0 >= 0 ? 1.0f : 0.0f, bottom[k] = touched && y1 < rows[k] ? 1.0f : 0.0f;
            const float x_weight0 = (1.0f - x_next) * left[k], x_weight1 = x_next * right[k];
            const float y_weight0 = (1.0f - y_next) * top[k] * weight_here, y_weight1 = y_next * bottom[k] * weight_here;
            weight[0][k] = x_weight0 * y_weight0, weight[1][k] = x_weight1 * y_weight0;
            weight[2][k] = x_weight0 * y_weight1, weight[3][k] = x_weight1 * y_weight1;
            const int32_t x_low = x0 < 0 ? 0 : x0, x_high = x1 < columns[k] ? x1 : columns[k] - 1;
            const int32_t upper = first[k] + (y0 < 0 ? 0 : y0) * columns[k], lower = first[k] + (y1 < rows[k] ? y1 : rows[k] - 1) * columns[k];
            cell[0][k] = upper + x_low, cell[1][k] = upper + x_high, cell[2][k] = lower + x_low, cell[3][k] = lower + x_high;
        }
    }

    const int64_t count;
    Array<float> floats;
    Array<int32_t> ints;
    float *const width, *const height, *const reference_x, *const reference_y;
    float *const x_share, *const y_share;                            // distance from the corner before, in cells
    float *const left, *const right, *const top, *const bottom;      // 1 where that corner is inside the level, else 0
    int32_t *const columns, *const rows, *const first, *const pillar;
    float* weight[4];   // of the corners upper left, upper right, lower left, lower right
    int32_t* cell[4];
};

// What the cameras see of a query.
struct Visibility {
    Visibility(const Attention& in, int64_t sample, int64_t query) : first(in.visible), step(in.Q), views(0) {
        if (!first) return;
        first += sample * in.N * in.Q + query;
        for (int64_t n = 0; n < in.N; ++n) views += first[n * step];
    }
    float share(int64_t camera) const { return first ? first[camera * step] / (views > 1.0f ? views : 1.0f) : 1.0f; }
    const float* first;
    int64_t step;
    float views;
};

template <int WIDTH, typename T>
void attend(const Attention& in, int64_t begin, int64_t end, float* output) {
    constexpr int REGISTERS = WIDTH > NATIVE ? WIDTH / NATIVE : 1;
    constexpr int SUMS = REGISTERS >= 8 ? 1 : REGISTERS >= 4 ? 2 : 4;  // independent sums, so that an addition need not wait for the last
    const int64_t head = in.C, step = in.M * in.C;
    Points points(in);
    Array<float> attention(in.M * points.count);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / in.Q, query = i % in.Q;
        float* out = output + i * step;
        std::memset(out, 0, size_t(step) * sizeof(float));
        const float factor = in.value_scale ? *in.value_scale : 1.0f;
        for (int64_t m = 0; m < in.M; ++m) {
            softmax(in.attention_logits + (i * in.M + m) * points.count, points.count, factor, &attention[m * points.count]);
        }
        const Visibility visibility(in, sample, query);
        for (int64_t n = 0; n < in.N; ++n) {
            const float share = visibility.share(n);
            if (!(share > 0)) continue;
            const int64_t view = sample * in.N + n;
            points.refer(in.reference_points + (view * in.Q + query) * in.D * 2);
            for (int64_t m = 0; m < in.M; ++m) {
                points.place(in.sampling_offsets + (i * in.M + m) * points.count * 2, &attention[m * points.count], share);
                for (int64_t c = 0; c < head; c += WIDTH) {
                    const T* keys = static_cast<const T*>(in.value) + view * in.S * step + m * head + c;
                    Floats<WIDTH> sums[SUMS] = {};
                    for (int64_t k = 0; k < points.count; ++k) {
                        for (int corner = 0; corner < 4; ++corner) {
                            sums[corner % SUMS] += points.weight[corner][k] * load<WIDTH>(keys + points.cell[corner][k] * step);
                        }
                    }
                    Floats<WIDTH> sum = load<WIDTH>(out + m * head + c);
                    for (int s = 0; s < SUMS; ++s) sum += sums[s];
                    store<WIDTH>(sum, out + m * head + c);
                }
            }
        }
    }
}

// Gradients of the points of one query, head and camera. Adds that of `value`, and to `by_attention` (count) that of the softmax weights;
// adds to `by_offset` (count, 2) that of the offsets.
template <int WIDTH>
void differentiate_points(const Attention& in, const Points& points, int64_t first_number, const float* attention, float share,
                          const float* by_output, float* by_value, float* by_attention, float* by_offset) {
    const int64_t step = in.M * in.C;
    const float* keys = static_cast<const float*>(in.value) + first_number;
    for (int64_t k = 0; k < points.count; ++k) {
        float product[4] = {};  // of the output's gradient and each corner
        for (int64_t c = 0; c < in.C; c += WIDTH) {
            const Floats<WIDTH> slope = load<WIDTH>(by_output + c);
            for (int corner = 0; corner < 4; ++corner) {
                const int64_t at = points.cell[corner][k] * step + c;
                product[corner] += total<WIDTH>(slope * load<WIDTH>(keys + at));
                if (by_value && points.weight[corner][k] != 0) {
                    float* to = by_value + first_number + at;
                    store<WIDTH>(load<WIDTH>(to) + points.weight[corner][k] * slope, to);
                }
            }
        }
        product[0] *= points.top[k] * points.left[k], product[1] *= points.top[k] * points.right[k];
        product[2] *= points.bottom[k] * points.left[k], product[3] *= points.bottom[k] * points.right[k];
        const float x = points.x_share[k], y = points.y_share[k];
        const float upper = product[0] + x * (product[1] - product[0]), lower = product[2] + x * (product[3] - product[2]);
        const float weight = attention[k] * share;
        by_attention[k] += share * (upper + y * (lower - upper));
        by_offset[2 * k] = weight * ((1 - y) * (product[1] - product[0]) + y * (product[3] - product[2]));
        by_offset[2 * k + 1] = weight * (lower - upper);
    }
}

template <int WIDTH>
void attend_backward(const Attention& in, const AttentionGradients& by, int64_t begin, int64_t end) {
    Points points(in);
    const int64_t count = points.count;
    Array<float> numbers(4 * count);
    float *const attention = numbers.data, *const by_attention = attention + count, *const by_offset = by_attention + count;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / in.M, m = i % in.M;
        for (int64_t query = 0; query < in.Q; ++query) {
            const int64_t at = (sample * in.Q + query) * in.M + m;
            softmax(in.attention_logits + at * count, count, 1.0f, attention);
            std::memset(by_attention, 0, size_t(count) * sizeof(float));
            if (by.sampling_offsets) std::memset(by.sampling_offsets + at * count * 2, 0, size_t(count) * 2 * sizeof(float));
            const Visibility visibility(in, sample, query);
            for (int64_t n = 0; n < in.N; ++n) {
                const int64_t view = sample * in.N + n;
                float* by_reference = by.reference_points ? by.reference_points + ((view * in.Q + query) * in.M + m) * in.D * 2 : nullptr;
                if (by_reference) std::memset(by_reference, 0, size_t(in.D) * 2 * sizeof(float));
                const float share = visibility.share(n);
                if (!(share > 0)) continue;
                points.refer(in.reference_points + (view * in.Q + query) * in.D * 2);
                points.place(in.sampling_offsets + at * count * 2, attention, share);
                differentiate_points<WIDTH>(in, points, (view * in.S * in.M + m) * in.C, attention, share, by.output + at * in.C, by.value,
                                            by_attention, by_offset);
                for (int64_t k = 0; k < count; ++k) {
                    for (int axis = 0; axis < 2; ++axis) {
                        const float slope = by_offset[2 * k + axis];
                        if (by.sampling_offsets) by.sampling_offsets[(at * count + k) * 2 + axis] += slope;
                        if (by_reference) by_reference[2 * points.pillar[k] + axis] += slope * (axis ? points.height[k] : points.width[k]);
                    }
                }
            }
            if (!by.attention_logits) continue;
            float mean = 0;
            for (int64_t k = 0; k < count; ++k) mean += attention[k] * by_attention[k];
            for (int64_t k = 0; k < count; ++k) by.attention_logits[at * count + k] = attention[k] * (by_attention[k] - mean);
        }
    }
}

void im2col(const Im2col& in, int64_t begin, int64_t end, float* output) {
    Array<float> weights(4 * in.w);
    Array<int32_t> cells(4 * in.w);
    const int64_t plane = in.h * in.w, area = in.H * in.W;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / (9 * in.h), tap = i / in.h % 9, row = i % in.h;
        const float* y_offset = in.offsets + (sample * 18 + 2 * tap) * plane + row * in.w;
        const float *x_offset = y_offset + plane, *mask = in.mask + (sample * 9 + tap) * plane + row * in.w;
        const float y_start = float(row * in.stride + tap / 3 - 1), last_x = float(in.W), last_y = float(in.H);
        for (int64_t k = 0; k < in.w; ++k) {
            const float x = float(k * in.stride + tap % 3 - 1) + x_offset[k], y = y_start + y_offset[k];
            const bool touched = x > -1.0f && y > -1.0f && x < last_x && y < last_y;
            const float column = __builtin_floorf(touched ? x : 0.0f), line = __builtin_floorf(touched ? y : 0.0f);
            const float x_next = touched ? x - column : 0.0f, y_next = touched ? y - line : 0.0f, factor = touched ? mask[k] : 0.0f;
            const int32_t x0 = int32_t(column), y0 = int32_t(line), x1 = x0 + 1, y1 = y0 + 1;
            const float left = x0 >= 0 ? 1.0f - x_next : 0.0f, right = x1 < in.W ? x_next : 0.0f;
            const float top = y0 >= 0 ? (1.0f - y_next) * factor : 0.0f, bottom = y1 < in.H ? y_next * factor : 0.0f;
            weights[k] = left * top, weights[in.w + k] = right * top, weights[2 * in.w + k] = left * bottom, weights[3 * in.w + k] = right * bottom;
            const int32_t x_low = x0 < 0 ? 0 : x0, x_high = x1 < in.W ? x1 : int32_t(in.W) - 1;
            const int32_t upper = (y0 < 0 ? 0 : y0) * int32_t(in.W), lower = (y1 < in.H ? y1 : int32_t(in.H) - 1) * int32_t(in.W);
            cells[k] = upper + x_low, cells[in.w + k] = upper + x_high, cells[2 * in.w + k] = lower + x_low, cells[3 * in.w + k] = lower + x_high;
        }
        const float* __restrict weight = weights.data;
        const int32_t* __restrict cell = cells.data;
        for (int64_t c = 0; c < in.C; ++c) {
            const float* __restrict image = in.x + (sample * in.C + c) * area;
            float* __restrict to = output + ((sample * in.C + c) * 9 + tap) * plane + row * in.w;
            for (int64_t k = 0; k < in.w; ++k) {
                to[k] = weight[k] * image[cell[k]] + weight[in.w + k] * image[cell[in.w + k]] +
                        weight[2 * in.w + k] * image[cell[2 * in.w + k]] + weight[3 * in.w + k] * image[cell[3 * in.w + k]];
            }
        }
    }
}

// Call `function` with the largest WIDTH that divides the channels of a head.
template <int WIDTH = WIDEST, typename F>
inline void with_width(int64_t channels, const F& function) {
    if constexpr (WIDTH == 1) {
        function.template operator()<1>();
    } else if (channels % WIDTH == 0) {
        function.template operator()<WIDTH>();
    } else {
        with_width<WIDTH / 2>(channels, function);
    }
}

void attend_any(const Attention& in, int64_t first, int64_t last, float* output) {
    with_width(in.C, [&]<int WIDTH>() {
        in.value_scale ? attend<WIDTH, int8_t>(in, first, last, output) : attend<WIDTH, float>(in, first, last, output);
    });
}

void attend_backward_any(const Attention& in, const AttentionGradients& gradients, int64_t first, int64_t last) {
    with_width(in.C, [&]<int WIDTH>() { attend_backward<WIDTH>(in, gradients, first, last); });
}

}  // namespace

#define TEXT(name) #name
#define TEXT_OF(name) TEXT(name)
const qdbev::Kernels qdbev::INSTRUCTION_SET::kernels{attend_any, attend_backward_any, im2col, TEXT_OF(INSTRUCTION_SET)};
