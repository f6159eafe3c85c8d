// What happens to queries, keys and values between their projection and attention, in one pass over the fused rows
// [rows, (heads + 2 kv_heads) * head_dim]: bias, q/k norm per head, rotation by position (half-split layout: element i
// turns with element i + head_dim / 2), and the way into the paged cache; and back.
//
// A head is one group of lanes, a power of two; each lane holds WIDTH elements of the first half and the WIDTH that turn
// with them. head_dim is a multiple of 8, at most 256.
#include "rows.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 4;
// Positions of a page of the cache.
constexpr int PAGE = 16;
// Rows whose weight gradients one block of the backward pass adds up.
constexpr int ROWS = 16;

struct Shape {
    int heads, kv_heads, head_dim;

    __device__ __forceinline__ int units() const { return heads + 2 * kv_heads; }
    __device__ __forceinline__ size_t width() const { return size_t(units()) * head_dim; }
    // Lanes that share a head.
    __device__ __forceinline__ int group() const {
        int lanes = 1;
        while (lanes * WIDTH * 2 < head_dim) lanes *= 2;
        return lanes;
    }
};

struct Halves {
    Values<WIDTH> first, second;
};

// What a lane works with: its head and its place in it.
struct Place {
    int row, head, at, half;
    bool whole;

    template <typename T> __device__ __forceinline__ Halves of(const T* head_values) const {
        return {load<WIDTH>(head_values, at, half, whole), load<WIDTH>(head_values + half, at, half, whole)};
    }
    template <typename T> __device__ __forceinline__ void put(T* head_values, const Halves& halves) const {
        store(head_values, at, half, whole, halves.first);
        store(head_values + half, at, half, whole, halves.second);
    }
};

__device__ __forceinline__ void add_to(Halves& halves, const Halves& other) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        halves.first.at[i] += other.first.at[i];
        halves.second.at[i] += other.second.at[i];
    }
}

// Sum over a head of a * b.
__device__ __forceinline__ float head_product(const Halves& a, const Halves& b, int group) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        sum = fmaf(a.first.at[i], b.first.at[i], sum);
        sum = fmaf(a.second.at[i], b.second.at[i], sum);
    }
    for (int offset = group / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    return sum;
}

// Turns by a position's cosines and sines [2, half], or back where direction is -1.
__device__ __forceinline__ void turn(Halves& halves, const float* angles, const Place& place, float direction) {
    const auto cosines = load<WIDTH>(angles, place.at, place.half, place.whole);
    const auto sines = load<WIDTH>(angles + place.half, place.at, place.half, place.whole);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float a = halves.first.at[i], b = halves.second.at[i], sine = sines.at[i] * direction;
        halves.first.at[i] = a * cosines.at[i] - b * sine;
        halves.second.at[i] = b * cosines.at[i] + a * sine;
    }
}

template <typename T>
__device__ __forceinline__ void rotary_forward(Shape shape, const T* in, const T* bias, const T* query_weight,
                                               const T* key_weight, float epsilon, const float* angles,
                                               const int* positions, const int* slots, T* out, T* key_pages,
                                               T* value_pages, int rows) {
    if (in == nullptr) in = out;
    const int group = shape.group(), dim = shape.head_dim;
    const unsigned unit = blockIdx.x * unsigned(THREADS / group) + threadIdx.x / group, units = shape.units();
    Place place{int(unit / units), int(unit % units), int(threadIdx.x % group) * WIDTH, dim / 2, false};
    const bool live = place.row < rows && place.at < place.half;
    place.whole = whole_vectors<WIDTH>(dim / 2, dim / 2, in, bias, query_weight, key_weight, out) &&
                  whole_vectors<WIDTH>(dim / 2, dim / 2, key_pages, value_pages) &&
                  whole_vectors<WIDTH>(dim / 2, dim / 2, angles);
    const bool is_query = place.head < shape.heads, is_value = place.head >= shape.heads + shape.kv_heads;
    const size_t start = place.row * shape.width() + size_t(place.head) * dim;

    Halves values{};
    if (live) {
        values = place.of(in + start);
        if (bias != nullptr) add_to(values, place.of(bias + size_t(place.head) * dim));
    }
    if (query_weight != nullptr) {
        const float scale = 1.0f / sqrtf(head_product(values, values, group) / float(dim) + epsilon);
        if (live && !is_value) {
            const Halves weight = place.of(is_query ? query_weight : key_weight);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                values.first.at[i] = values.first.at[i] * scale * weight.first.at[i];
                values.second.at[i] = values.second.at[i] * scale * weight.second.at[i];
            }
        }
    }
    if (!live) return;
    if (!is_value) turn(values, angles + size_t(positions[place.row]) * dim, place, 1.0f);
    place.put(out + start, values);
    if (!is_query && slots != nullptr && slots[place.row] >= 0) {
        const int slot = slots[place.row], kv_head = (place.head - shape.heads) % shape.kv_heads;
        const size_t cached = (size_t(slot / PAGE) * shape.kv_heads + kv_head) * PAGE + slot % PAGE;
        place.put((is_value ? value_pages : key_pages) + cached * dim, values);
    }
}

// out = in + bias, then for queries and keys the norm per head, then the rotation by angles[positions[row]]; keys and
// values also go to the pages [page, kv_heads, 16, head_dim] at slots[row] = page * 16 + lane, where that is not negative.
// angles[position] holds head_dim / 2 cosines and as many sines. May be null: in (then it is out); bias; query_weight and
// key_weight (both); slots (then the pages too).
// Launch: grid (ceil(rows * (heads + 2 kv_heads) / (256 / lanes))) with lanes = head_dim / 8 raised to a power of two,
// block (256).
#define ROTARY_FORWARD(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const T* in, const T* bias, const T* query_weight, const T* key_weight, float epsilon, const float* angles, \
             const int* positions, const int* slots, T* out, T* key_pages, T* value_pages, int rows, int heads,          \
             int kv_heads, int head_dim) {                                                                               \
        rotary_forward({heads, kv_heads, head_dim}, in, bias, query_weight, key_weight, epsilon, angles, positions,      \
                       slots, out, key_pages, value_pages, rows);                                                        \
    }
ROTARY_FORWARD(rotary_forward_f32, float)
ROTARY_FORWARD(rotary_forward_bf16, bf16)

// Replaces the gradient of a normalised head by that of the head, and adds the weight's gradient.
__device__ __forceinline__ void norm_backward(Halves& grad, const Halves& x, const Halves& weight, float epsilon,
                                              int dim, int group, Halves& grad_weight) {
    const float scale = 1.0f / sqrtf(head_product(x, x, group) / float(dim) + epsilon);
    Halves scaled;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        scaled.first.at[i] = grad.first.at[i] * weight.first.at[i];
        scaled.second.at[i] = grad.second.at[i] * weight.second.at[i];
    }
    const float correction = scale * scale * scale * head_product(scaled, x, group) / float(dim);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        grad_weight.first.at[i] += grad.first.at[i] * x.first.at[i] * scale;
        grad_weight.second.at[i] += grad.second.at[i] * x.second.at[i] * scale;
        grad.first.at[i] = scale * scaled.first.at[i] - correction * x.first.at[i];
        grad.second.at[i] = scale * scaled.second.at[i] - correction * x.second.at[i];
    }
}

// Adds up what the groups of the block have, group by group, into partial[2, head_dim].
__device__ __forceinline__ void add_groups(const Halves (&sums)[2], const Place& place, int group, int dim,
                                           float* partial) {
    // 256 / group groups of at most 8 group elements each.
    __shared__ float parts[2 * THREADS * 2 * WIDTH];
    const int groups = THREADS / group;
    for (int which = 0; which < 2; ++which) {
        float* part = parts + (which * groups + int(threadIdx.x) / group) * dim;
        if (place.at < place.half) place.put(part, sums[which]);
    }
    __syncthreads();
    for (int at = threadIdx.x; at < 2 * dim; at += THREADS) {
        const float* part = parts + size_t(at / dim) * groups * dim + at % dim;
        float sum = 0.0f;
        for (int other = 0; other < groups; ++other) sum += part[other * dim];
        partial[at] = sum;
    }
}

template <typename G, typename T>
__device__ __forceinline__ void rotary_backward(Shape shape, const G* grad_out, const T* before, const T* bias,
                                                const T* query_weight, const T* key_weight, float epsilon,
                                                const float* angles, const int* positions, T* grad, float* partial,
                                                int rows) {
    const int group = shape.group(), groups = THREADS / group, dim = shape.head_dim, units = shape.units();
    const int first = blockIdx.x * ROWS, count = min(ROWS, rows - first) * units;
    Place place{0, 0, int(threadIdx.x % group) * WIDTH, dim / 2, false};
    place.whole = whole_vectors<WIDTH>(dim / 2, dim / 2, grad_out) && whole_vectors<WIDTH>(dim / 2, dim / 2, angles) &&
                  whole_vectors<WIDTH>(dim / 2, dim / 2, before, bias, query_weight, key_weight, grad);
    Halves grad_weights[2]{};
    for (int start = 0; start < count; start += groups) {
        const int unit = start + int(threadIdx.x) / group;
        place.row = first + unit / units;
        place.head = unit % units;
        const bool live = unit < count && place.at < place.half;
        const bool is_query = place.head < shape.heads, is_value = place.head >= shape.heads + shape.kv_heads;
        const size_t offset = place.row * shape.width() + size_t(place.head) * dim;
        Halves values{};
        if (live) {
            values = place.of(grad_out + offset);
            if (!is_value) turn(values, angles + size_t(positions[place.row]) * dim, place, -1.0f);
        }
        if (query_weight != nullptr) {
            Halves x{}, weight{}, none{};
            const bool normed = live && !is_value;
            if (normed) {
                x = place.of(before + offset);
                if (bias != nullptr) add_to(x, place.of(bias + size_t(place.head) * dim));
                weight = place.of(is_query ? query_weight : key_weight);
            }
            Halves changed = values;
            norm_backward(changed, x, weight, epsilon, dim, group, none);
            if (normed) {
                values = changed;
                if (is_query) add_to(grad_weights[0], none);
                if (!is_query) add_to(grad_weights[1], none);
            }
        }
        if (live) place.put(grad + offset, values);
    }
    if (query_weight != nullptr) add_groups(grad_weights, place, group, dim, partial + size_t(blockIdx.x) * 2 * dim);
}

// grad = the gradient of rotary_forward's `in` from that of its `out`. With q/k norm `before` is that `in`, and
// partial[block, 2 head_dim] receives the block's gradients of query_weight and key_weight, for add_partial_sums. The
// bias's gradient is grad summed over rows (column_sums). May be null: bias; query_weight, key_weight, before and
// partial (all).
// Launch: grid (ceil(rows / 16)), block (256).
#define ROTARY_BACKWARD(NAME, G, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const G* grad_out, const T* before, const T* bias, const T* query_weight, const T* key_weight,              \
             float epsilon, const float* angles, const int* positions, T* grad, float* partial, int rows, int heads,     \
             int kv_heads, int head_dim) {                                                                               \
        rotary_backward({heads, kv_heads, head_dim}, grad_out, before, bias, query_weight, key_weight, epsilon, angles,  \
                        positions, grad, partial, rows);                                                                 \
    }
ROTARY_BACKWARD(rotary_backward_f32, float, float)
ROTARY_BACKWARD(rotary_backward_bf16, bf16, bf16)
ROTARY_BACKWARD(rotary_backward_f32_bf16, float, bf16)
