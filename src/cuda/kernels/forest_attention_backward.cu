// Gradients of attention over a forest. With p = e^(scale s - log_sum), s = q k^T and delta = sum(out x grad_out):
//   grad_v = p^T grad_out,  g = p (grad_out v^T - delta),  grad_q = scale g k,  grad_k = scale g^T q.
// Two kernels compute p and g anew: one owns 64 keys and streams queries, the other owns 64 queries and streams keys. So
// every sum has one owner and a fixed order, and nothing is added atomically. Gradients are f32 whatever the storage type:
// the rotation back comes next, and so they are rounded once, when they become the input of a matrix product.
#include "attention.cuh"

// Rows that the streamed side brings at a time.
constexpr int STREAMED = 32;
constexpr unsigned NO_SLOT = 0xffffffffu;

// Query tiles that read one key tile, or a part of them.
struct alignas(16) Part {
    unsigned tile, first_query_tile, query_tiles;
    unsigned slot; // of the partial sums; NO_SLOT when this is the whole
};

// The partial sums of one key tile.
struct alignas(16) Sum {
    unsigned tile, first_slot, slots, unused;
};

// 64 owned rows of two operands, and 32 rows of the two streamed ones, twice where memory allows.
template <typename T, int D> struct BackwardMemory {
    static constexpr int STAGES = sizeof(T) == 4 && D == 256 ? 1 : 2;
    static constexpr int OWN = TILE * STRIDE<T, D>, STREAM = STREAMED * STRIDE<T, D>;
    T *own[2], *streamed;
    float *scratch, *statistics; // this warp's; log-sums and deltas of the streamed rows

    explicit __device__ __forceinline__ BackwardMemory(T* start)
        : own{start, start + OWN}, streamed(start + 2 * OWN),
          scratch(reinterpret_cast<float*>(streamed + 2 * STAGES * STREAM) + threadIdx.x / WARP * SCRATCH<T, STREAMED>),
          statistics(reinterpret_cast<float*>(streamed + 2 * STAGES * STREAM) +
                     TILE / WARP_ROWS * SCRATCH<T, STREAMED>) {}
    __device__ __forceinline__ T* stream(int step, int operand) const {
        return streamed + (step % STAGES * 2 + operand) * STREAM;
    }
    __device__ __forceinline__ float* log_sums(int step) const { return statistics + step % STAGES * 2 * STREAMED; }
    __device__ __forceinline__ float* deltas(int step) const { return log_sums(step) + STREAMED; }
};

// Runs `load(step)` and `compute(step)` for every step, copying ahead where there are two stages.
template <int STAGES, typename Load, typename Compute>
__device__ __forceinline__ void pipeline(int steps, Load load, Compute compute) {
    load(0);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
        if (STAGES > 1) {
            if (step + 1 < steps) load(step + 1);
            cp_async_commit();
        }
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        compute(step);
        __syncthreads();
        if (STAGES == 1 && step + 1 < steps) {
            load(step + 1);
            cp_async_commit();
        }
    }
}

// Where gradients of keys (`operand` 0) and values (1) go.
struct KeyGradients {
    float* own;           // rows of `stride`: queries, keys, values
    float* prefix;        // [prefix_rows, 2, kv_heads, head_dim], added to
    const float* carried; // [rows, 2, kv_heads, head_dim], added; may be null
    size_t stride;
    unsigned prefix_rows, heads, kv_heads, head_dim;

    __device__ __forceinline__ void add(unsigned row, int operand, unsigned kv_head, unsigned column, float low,
                                        float high) const {
        const bool before = row < prefix_rows;
        const size_t own_row = before ? row : row - prefix_rows;
        const size_t place = ((own_row * 2 + operand) * kv_heads + kv_head) * head_dim + column;
        if (before) {
            store_pair(prefix + place, prefix[place] + low, prefix[place + 1] + high);
            return;
        }
        if (carried != nullptr) low += carried[place], high += carried[place + 1];
        store_pair(own + own_row * stride + size_t(heads + operand * kv_heads + kv_head) * head_dim + column, low, high);
    }
};

// ------------------------------------------------------------------------------------------------------------- deltas

template <typename T>
__device__ __forceinline__ void deltas(const T* out, const T* grad_out, float* delta, unsigned rows, unsigned heads,
                                       unsigned head_dim, unsigned delta_stride) {
    const size_t pair = size_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (pair >= size_t(rows) * heads) return;
    const size_t start = pair * head_dim;
    float sum = 0.0f;
    for (unsigned column = threadIdx.x % WARP; column < head_dim; column += WARP) {
        sum = fmaf(to_float(out[start + column]), to_float(grad_out[start + column]), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[pair % heads * delta_stride + pair / heads] = sum;
}

// delta [heads, delta_stride] = row sums of out x grad_out, both [rows, heads, head_dim]; a warp for each row and head.
// grid (rows x heads / 4 rounded up), block 128
extern "C" __global__ void __launch_bounds__(128)
    attention_deltas_f32(const float* out, const float* grad_out, float* delta, unsigned rows, unsigned heads,
                         unsigned head_dim, unsigned delta_stride) {
    deltas(out, grad_out, delta, rows, heads, head_dim, delta_stride);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_deltas_bf16(const bf16* out, const bf16* grad_out, float* delta, unsigned rows, unsigned heads,
                          unsigned head_dim, unsigned delta_stride) {
    deltas(out, grad_out, delta, rows, heads, head_dim, delta_stride);
}

// --------------------------------------------------------------------------------------------------- keys and values

// Scores of the warp's 16 keys (rows) against 32 queries become p and g; both zero where the query does not see the key.
template <typename T>
__device__ __forceinline__ void key_weights(Scores<T, STREAMED>& p, Scores<T, STREAMED>& g, unsigned first_key,
                                            const unsigned (&untils)[Layout<T>::ROWS], unsigned first_query,
                                            const float* log_sums, const float* deltas, float scale) {
#pragma unroll
    for (int j = 0; j < STREAMED / Layout<T>::SHARERS; ++j) {
        const int at = Layout<T>::key(j);
        const unsigned query = first_query + at;
        const float log_sum = log_sums[at] * LOG2_E, delta = deltas[at];
#pragma unroll
        for (int i = 0; i < Layout<T>::ROWS; ++i) {
            const bool seen = first_key + Layout<T>::row(i) <= query && query < untils[i];
            const float weight = power_of_two<T>(fmaf(p.at[i][j], scale, -log_sum));
            p.at[i][j] = seen ? weight : 0.0f;
            g.at[i][j] = seen ? weight * (g.at[i][j] - delta) : 0.0f;
        }
    }
}

template <typename T, int D>
__device__ __forceinline__ void key_gradients(const T* queries, unsigned query_stride, SplitRows<T> keys,
                                              SplitRows<T> values, const T* grad_out, const float* log_sums,
                                              const float* delta, unsigned delta_stride, const KeyTile* tiles,
                                              const unsigned* untils, const Part* parts, KeyGradients gradients, float* partial_sums,
                                              unsigned rows, float scale) {
    const unsigned heads = gradients.heads, kv_heads = gradients.kv_heads, head_dim = gradients.head_dim;
    const BackwardMemory<T, D> memory(dynamic_shared<T>());
    const Part part = parts[blockIdx.x];
    const KeyTile tile = tiles[part.tile];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads, first_column = blockIdx.z * COLUMNS<D>;
    // A query tile is two steps; the heads of the group come one after the other.
    const int steps_of_head = part.query_tiles * 2;
    const auto first_query = [&](int step) { return part.first_query_tile * TILE + step % steps_of_head * STREAMED; };

    const auto load = [&](int step) {
        const unsigned head = kv_head * group + step / steps_of_head, first = first_query(step);
        if (step == 0) {
            const Rows<T> key_rows = keys.from(tile.row), value_rows = values.from(tile.row);
            load_rows<TILE, D>(memory.own[0], STRIDE<T, D>, key_rows.first, key_rows.stride, tile.keys, head_dim);
            load_rows<TILE, D>(memory.own[1], STRIDE<T, D>, value_rows.first, value_rows.stride, tile.keys, head_dim);
        }
        const unsigned start = min(first, rows - 1); // an address inside, for a last tile of less than half its rows
        load_rows<STREAMED, D>(memory.stream(step, 0), STRIDE<T, D>,
                               queries + size_t(start) * query_stride + size_t(head) * head_dim, query_stride,
                               int(rows) - int(first), head_dim);
        load_rows<STREAMED, D>(memory.stream(step, 1), STRIDE<T, D>, grad_out + (size_t(start) * heads + head) * head_dim,
                               size_t(heads) * head_dim, int(rows) - int(first), head_dim);
        if (threadIdx.x < STREAMED / 4 * 2) {
            const int operand = threadIdx.x / (STREAMED / 4), at = threadIdx.x % (STREAMED / 4) * 4;
            cp_async_16(memory.log_sums(step) + operand * STREAMED + at,
                        (operand == 0 ? log_sums : delta) + size_t(head) * delta_stride + first + at);
        }
    };

    const unsigned first_key = tile.row + warp_row();
    unsigned key_untils[Layout<T>::ROWS]; // zero past the tile: no query sees those
#pragma unroll
    for (int i = 0; i < Layout<T>::ROWS; ++i) {
        const int key = warp_row() + Layout<T>::row(i);
        key_untils[i] = key < tile.keys ? untils[tile.row + key] : 0;
    }
    Values<T, COLUMNS<D>> key_sums, value_sums;
    key_sums.clear();
    value_sums.clear();
    const auto compute = [&](int step) {
        const unsigned query = gradients.prefix_rows + first_query(step);
        if (warp_row() >= tile.keys || query + STREAMED <= first_key || query >= tile.until) return;
        const T *step_queries = memory.stream(step, 0), *step_grads = memory.stream(step, 1);
        Scores<T, STREAMED> p, g;
        multiply_transposed<D>(p, memory.own[0] + warp_row() * STRIDE<T, D>, step_queries, STREAMED);
        multiply_transposed<D>(g, memory.own[1] + warp_row() * STRIDE<T, D>, step_grads, STREAMED);
        key_weights<T>(p, g, first_key, key_untils, query, memory.log_sums(step), memory.deltas(step), scale * LOG2_E);
        multiply_add(value_sums, p, step_grads + first_column, STRIDE<T, D>, STREAMED, memory.scratch);
        multiply_add(key_sums, g, step_queries + first_column, STRIDE<T, D>, STREAMED, memory.scratch);
    };
    pipeline<BackwardMemory<T, D>::STAGES>(steps_of_head * int(group), load, compute);

    const size_t slot = ((size_t(part.slot) * kv_heads + kv_head) * 2) * TILE;
#pragma unroll
    for (int i = 0; i < Layout<T>::ROWS; ++i) {
        const unsigned row = warp_row() + Layout<T>::row(i);
        if (row >= tile.keys) continue;
#pragma unroll
        for (int j = 0; j < key_sums.HELD; j += 2) {
            const unsigned within = Layout<T>::column(j), column = first_column + within;
            if (within >= COLUMNS<D> || column >= head_dim) continue;
            const float key[2] = {key_sums.at[i][j] * scale, key_sums.at[i][j + 1] * scale};
            const float value[2] = {value_sums.at[i][j], value_sums.at[i][j + 1]};
            if (part.slot == NO_SLOT) {
                gradients.add(tile.row + row, 0, kv_head, column, key[0], key[1]);
                gradients.add(tile.row + row, 1, kv_head, column, value[0], value[1]);
            } else {
                store_pair(partial_sums + (slot + row) * head_dim + column, key[0], key[1]);
                store_pair(partial_sums + (slot + TILE + row) * head_dim + column, value[0], value[1]);
            }
        }
    }
}

// Gradients of keys and values, one block for each part, key/value head and half of a wide head. Arguments as in the
// forward pass; grad_out: [rows, heads, head_dim]; log_sums, delta: [heads, delta_stride], delta_stride a multiple of 64.
// gradients: rows of `gradient_stride` that hold the gradients of queries, keys and values, of which the last two are
// written; prefix_gradients: [prefix_rows, 2, kv_heads, head_dim], to which those of prefix keys (0) and values (1) are
// added; carried: [rows, 2, kv_heads, head_dim] or null, what other launches had summed up for rows of this one.
// partial_sums: [slots, kv_heads, 2, 64, head_dim], for the parts that have a slot.
// grid (parts, kv_heads, 2 if the name's head_dim is 256, else 1), block 128; shared memory: (128 + 64 n) (D + p)
// elements and 256 n bytes with n = 2 stages (1 for 256_f32), p = 16 bytes; 8192 bytes more for f32.
#define KEY_GRADIENTS(NAME, T, D)                                                                                       \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                                     \
        NAME(const T* queries, unsigned query_stride, const T* keys, const T* values, unsigned key_stride,              \
             const T* prefix_keys, const T* prefix_values, unsigned prefix_stride, unsigned prefix_rows,                \
             const T* grad_out, const float* log_sums, const float* delta, unsigned delta_stride, const KeyTile* tiles, \
             const unsigned* untils, const Part* parts, float* gradients, unsigned gradient_stride,                     \
             float* prefix_gradients, const float* carried, float* partial_sums, unsigned rows, unsigned heads,         \
             unsigned kv_heads, unsigned head_dim, float scale) {                                                       \
        const size_t column = size_t(blockIdx.y) * head_dim;                                                            \
        key_gradients<T, D>(queries, query_stride,                                                                      \
                            {prefix_keys + column, keys + column, prefix_stride, key_stride, prefix_rows},              \
                            {prefix_values + column, values + column, prefix_stride, key_stride, prefix_rows},          \
                            grad_out, log_sums, delta, delta_stride, tiles, untils, parts,                              \
                            {gradients, prefix_gradients, carried, gradient_stride, prefix_rows, heads, kv_heads,       \
                             head_dim},                                                                                 \
                            partial_sums, rows, scale);                                                                 \
    }

// Adds the partial sums of each split key tile in order and hands them on like the kernel that made them.
// grid (sums, kv_heads, 2), block 128
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_key_gradient_sums(const float* partial_sums, const KeyTile* tiles, const Sum* sums, float* gradients,
                                unsigned gradient_stride, float* prefix_gradients, const float* carried,
                                unsigned prefix_rows, unsigned heads, unsigned kv_heads, unsigned head_dim) {
    const KeyGradients target = {gradients, prefix_gradients, carried,  gradient_stride,
                                 prefix_rows, heads,          kv_heads, head_dim};
    const Sum sum = sums[blockIdx.x];
    const KeyTile tile = tiles[sum.tile];
    const unsigned kv_head = blockIdx.y, operand = blockIdx.z;
    const size_t distance = size_t(kv_heads) * 2 * TILE * head_dim;
    const float* first = partial_sums + sum.first_slot * distance + size_t(kv_head * 2 + operand) * TILE * head_dim;
    for (unsigned at = threadIdx.x * 2; at < tile.keys * head_dim; at += blockDim.x * 2) {
        float low = 0.0f, high = 0.0f;
        for (unsigned slot = 0; slot < sum.slots; ++slot) {
            low += first[slot * distance + at];
            high += first[slot * distance + at + 1];
        }
        target.add(tile.row + at / head_dim, operand, kv_head, at % head_dim, low, high);
    }
}

// ------------------------------------------------------------------------------------------------------------ queries

// Scores of the warp's 16 queries (rows) against some keys, of which row i sees the first limits[i], become g.
template <typename T>
__device__ __forceinline__ void query_weights(Scores<T, STREAMED>& p, const Scores<T, STREAMED>& g,
                                              const int (&limits)[Layout<T>::ROWS],
                                              const float (&log_sums)[Layout<T>::ROWS],
                                              const float (&deltas)[Layout<T>::ROWS], float scale) {
#pragma unroll
    for (int i = 0; i < Layout<T>::ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < STREAMED / Layout<T>::SHARERS; ++j) {
            const bool seen = Layout<T>::key(j) < limits[i];
            const float weight = power_of_two<T>(fmaf(p.at[i][j], scale, -log_sums[i]));
            p.at[i][j] = seen ? weight * (g.at[i][j] - deltas[i]) : 0.0f;
        }
    }
}

template <typename T, int D>
__device__ __forceinline__ void query_gradients(const T* queries, unsigned query_stride, SplitRows<T> keys,
                                                SplitRows<T> values, const T* grad_out, const float* log_sums,
                                                const float* delta, unsigned delta_stride, const KeyTile* tiles,
                                                const unsigned* untils, const unsigned* list_offsets,
                                                const unsigned* lists, const unsigned* order, float* gradients, unsigned gradient_stride,
                                                unsigned rows, unsigned heads, unsigned head_dim, float scale) {
    using Held = Layout<T>;
    const BackwardMemory<T, D> memory(dynamic_shared<T>());
    const unsigned query_tile = order[blockIdx.x], head = blockIdx.y, first = query_tile * TILE;
    const unsigned first_column = blockIdx.z * COLUMNS<D>, query = keys.prefix_rows + first;
    const unsigned* list = lists + list_offsets[query_tile];
    const int steps = int(list_offsets[query_tile + 1] - list_offsets[query_tile]) * 2;

    const auto load = [&](int step) {
        if (step == 0) {
            load_rows<TILE, D>(memory.own[0], STRIDE<T, D>, queries + size_t(first) * query_stride + size_t(head) * head_dim,
                               query_stride, int(rows - first), head_dim);
            load_rows<TILE, D>(memory.own[1], STRIDE<T, D>, grad_out + (size_t(first) * heads + head) * head_dim,
                               size_t(heads) * head_dim, int(rows - first), head_dim);
        }
        const KeyTile tile = tiles[list[step / 2]];
        const int skipped = step % 2 * STREAMED, left = int(tile.keys) - skipped;
        if (left <= 0) return;
        const Rows<T> key_rows = keys.from(tile.row), value_rows = values.from(tile.row);
        load_rows<STREAMED, D>(memory.stream(step, 0), STRIDE<T, D>, key_rows.first + skipped * key_rows.stride,
                               key_rows.stride, left, head_dim);
        load_rows<STREAMED, D>(memory.stream(step, 1), STRIDE<T, D>, value_rows.first + skipped * value_rows.stride,
                               value_rows.stride, left, head_dim);
    };

    float row_log_sums[Held::ROWS], row_deltas[Held::ROWS];
#pragma unroll
    for (int i = 0; i < Held::ROWS; ++i) {
        const size_t place = size_t(head) * delta_stride + first + warp_row() + Held::row(i);
        row_log_sums[i] = log_sums[place] * LOG2_E;
        row_deltas[i] = delta[place];
    }
    Values<T, COLUMNS<D>> sums;
    sums.clear();
    const auto compute = [&](int step) {
        const KeyTile tile = tiles[list[step / 2]];
        int limits[Held::ROWS], most = 0;
#pragma unroll
        for (int i = 0; i < Held::ROWS; ++i) {
            limits[i] = seen_keys(tile, untils, query + warp_row() + Held::row(i)) - step % 2 * STREAMED;
            most = max(most, limits[i]);
        }
        most = __reduce_max_sync(ALL_LANES, most);
        if (most <= 0) return;
        Scores<T, STREAMED> p, g;
        multiply_transposed<D>(p, memory.own[0] + warp_row() * STRIDE<T, D>, memory.stream(step, 0), most);
        multiply_transposed<D>(g, memory.own[1] + warp_row() * STRIDE<T, D>, memory.stream(step, 1), most);
        query_weights<T>(p, g, limits, row_log_sums, row_deltas, scale * LOG2_E);
        multiply_add(sums, p, memory.stream(step, 0) + first_column, STRIDE<T, D>, most, memory.scratch);
    };
    pipeline<BackwardMemory<T, D>::STAGES>(steps, load, compute);

#pragma unroll
    for (int i = 0; i < Held::ROWS; ++i) {
        const unsigned row = first + warp_row() + Held::row(i);
        if (row >= rows) continue;
        float* target = gradients + size_t(row) * gradient_stride + size_t(head) * head_dim;
#pragma unroll
        for (int j = 0; j < sums.HELD; j += 2) {
            const unsigned within = Held::column(j), column = first_column + within;
            if (within >= COLUMNS<D> || column >= head_dim) continue;
            store_pair(target + column, sums.at[i][j] * scale, sums.at[i][j + 1] * scale);
        }
    }
}

// Gradients of queries, one block for each query tile, head and half of a wide head; arguments as in the forward pass
// and above. gradients: rows of `gradient_stride`, of which the queries' part is written.
// grid (query tiles, heads, 2 if the name's head_dim is 256, else 1), block 128; shared memory as above
#define QUERY_GRADIENTS(NAME, T, D)                                                                                     \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                                     \
        NAME(const T* queries, unsigned query_stride, const T* keys, const T* values, unsigned key_stride,              \
             const T* prefix_keys, const T* prefix_values, unsigned prefix_stride, unsigned prefix_rows,                \
             const T* grad_out, const float* log_sums, const float* delta, unsigned delta_stride, const KeyTile* tiles, \
             const unsigned* untils, const unsigned* list_offsets, const unsigned* lists, const unsigned* order,        \
             float* gradients, unsigned gradient_stride, unsigned rows, unsigned heads, unsigned kv_heads,              \
             unsigned head_dim, float scale) {                                                                          \
        const size_t column = size_t(blockIdx.y / (heads / kv_heads)) * head_dim;                                       \
        query_gradients<T, D>(queries, query_stride,                                                                    \
                              {prefix_keys + column, keys + column, prefix_stride, key_stride, prefix_rows},            \
                              {prefix_values + column, values + column, prefix_stride, key_stride, prefix_rows},        \
                              grad_out, log_sums, delta, delta_stride, tiles, untils, list_offsets, lists, order,       \
                              gradients, gradient_stride, rows, heads, head_dim, scale);                                \
    }

#define ATTENTION_GRADIENTS_OF(D)                                                                                       \
    KEY_GRADIENTS(attention_key_gradients_##D##_f32, float, D)                                                          \
    KEY_GRADIENTS(attention_key_gradients_##D##_bf16, bf16, D)                                                          \
    QUERY_GRADIENTS(attention_query_gradients_##D##_f32, float, D)                                                      \
    QUERY_GRADIENTS(attention_query_gradients_##D##_bf16, bf16, D)

ATTENTION_GRADIENTS_OF(64)
ATTENTION_GRADIENTS_OF(80)
ATTENTION_GRADIENTS_OF(96)
ATTENTION_GRADIENTS_OF(128)
ATTENTION_GRADIENTS_OF(256)
