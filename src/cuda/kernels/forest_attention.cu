// Attention of a packed forest's rows to their ancestors and their own segment up to themselves: the forward pass of
// training and of whole prefills. FlashAttention-2 (arXiv 2307.08691) over lists of key tiles instead of a rectangle.
#include "attention.cuh"

template <typename T, int D> struct ForestSource {
    TileMemory<T, D> memory;
    SplitRows<T> keys, values;
    const KeyTile* table;
    const unsigned *untils, *list;
    int tiles;
    int columns, value_columns;
    unsigned query; // row number of the block's first query
    KeyTile next, current; // read a tile ahead, since copies wait for them

    __device__ __forceinline__ KeyTile at(int tile) const { return table[list[min(tile, tiles - 1)]]; }
    __device__ __forceinline__ void load_keys() {
        const Rows<T> rows = keys.from(next.row);
        load_rows<TILE, D>(memory.keys, STRIDE<T, D>, rows.first, rows.stride, next.keys, columns);
    }
    __device__ __forceinline__ void load_values(int tile) {
        current = next;
        next = at(tile + 1);
        const Rows<T> rows = values.from(current.row);
        load_rows<TILE, COLUMNS<D>>(memory.values, memory.VALUE_STRIDE, rows.first, rows.stride, current.keys,
                                    value_columns);
    }
    __device__ __forceinline__ int limit(int row) const { return seen_keys(current, untils, query + row); }
    __device__ __forceinline__ bool begins_partial() const { return current.begins_partial != 0; }
    __device__ __forceinline__ void keys_arrived() {}
    __device__ __forceinline__ void values_arrived() {}
    template <typename S> __device__ __forceinline__ void scale_scores(S&) {}
    template <typename S> __device__ __forceinline__ void scale_weights(S&) {}
};

template <typename T, int D, bool PARTIALS>
__device__ __forceinline__ void forest_attention(const T* queries, unsigned query_stride, const T* keys, const T* values,
                                                 unsigned key_stride, const T* prefix_keys, const T* prefix_values,
                                                 unsigned prefix_stride, unsigned prefix_rows, const KeyTile* tiles,
                                                 const unsigned* untils, const unsigned* list_offsets,
                                                 const unsigned* lists, const unsigned* order, T* out, float* log_sums, unsigned rows,
                                                 unsigned heads, unsigned kv_heads, unsigned head_dim, float scale) {
    using Held = Layout<T>;
    const TileMemory<T, D> memory(dynamic_shared<T>());
    const unsigned query_tile = order[blockIdx.x], head = blockIdx.y;
    const unsigned kv_head = head / (heads / kv_heads), first = query_tile * TILE;
    const unsigned first_column = blockIdx.z * COLUMNS<D>;
    const size_t key_column = size_t(kv_head) * head_dim, value_column = key_column + first_column;
    const unsigned begin = list_offsets[query_tile];
    ForestSource<T, D> source = {
        memory,
        {prefix_keys + key_column, keys + key_column, prefix_stride, key_stride, prefix_rows},
        {prefix_values + value_column, values + value_column, prefix_stride, key_stride, prefix_rows},
        tiles,
        untils,
        lists + begin,
        int(list_offsets[query_tile + 1] - begin),
        int(head_dim),
        int(head_dim - first_column),
        prefix_rows + first,
        {},
        {},
    };
    source.next = source.at(0);
    load_rows<TILE, D>(memory.queries, STRIDE<T, D>, queries + size_t(first) * query_stride + size_t(head) * head_dim,
                       query_stride, rows - first, head_dim);
    source.load_keys();
    cp_async_commit();
    Attended<T, COLUMNS<D>> result;
    attend<T, D, PARTIALS>(source, memory, scale * LOG2_E, result);

    const size_t log_sum_stride = size_t(gridDim.x) * TILE;
#pragma unroll
    for (int i = 0; i < Held::ROWS; ++i) {
        const unsigned row = first + warp_row() + Held::row(i);
        if (row >= rows) continue;
        const float factor = inverse_sum(result.sum[i]);
        T* target = out + (size_t(row) * heads + head) * head_dim;
#pragma unroll
        for (int j = 0; j < result.values.HELD; j += 2) {
            const unsigned within = Held::column(j), column = first_column + within;
            if (within >= COLUMNS<D> || column >= head_dim) continue;
            store_pair(target + column, result.values.at[i][j] * factor, result.values.at[i][j + 1] * factor);
        }
        if (blockIdx.z == 0 && threadIdx.x % Held::SHARERS == 0) {
            log_sums[head * log_sum_stride + row] = (result.maximum[i] + log2f(result.sum[i])) * LN_2;
        }
    }
}

// Attention of `rows` packed rows. Query i of head h lies at queries[i * query_stride + h * head_dim]; keys and values
// likewise, with `key_stride`. Row numbers in `tiles` count the `prefix_rows` keys of earlier launches first, then the
// rows of this one; without a prefix its pointers are those of the own rows. Row k is seen by rows k .. untils[k]. `lists[list_offsets[t] ..]` are the key
// tiles of query tile t in order of rows, at least one; `order` is the order in which query tiles are taken up.
// out: [rows, heads, head_dim]; log_sums: [heads, 64 x query tiles], ln of the sum of e^(scaled score).
// `_invariant` makes a partial result from each tile that begins one to the next, and adds them in order of the path, as
// decoding does: with tiles of one segment and partial results of 512 keys both have the same bits. head_dim: a multiple of 16, at most the number in the name.
// grid (query tiles, heads, 2 if the name's head_dim D is 256, else 1), block 128; shared memory: 64 (2 (D + p) + C + p)
// elements, where p = 16 bytes and C = min(D, 128), and 16384 bytes for f32; `_invariant` 256 C bytes more, for f32 with C
// rounded up to 32
#define FOREST_ATTENTION(NAME, T, D, PARTIALS)                                                                          \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                                     \
        NAME(const T* queries, unsigned query_stride, const T* keys, const T* values, unsigned key_stride,              \
             const T* prefix_keys, const T* prefix_values, unsigned prefix_stride, unsigned prefix_rows,                \
             const KeyTile* tiles, const unsigned* untils, const unsigned* list_offsets, const unsigned* lists,         \
             const unsigned* order, T* out, float* log_sums, unsigned rows, unsigned heads, unsigned kv_heads,          \
             unsigned head_dim, float scale) {                                                                          \
        forest_attention<T, D, PARTIALS>(queries, query_stride, keys, values, key_stride, prefix_keys, prefix_values,   \
                                         prefix_stride, prefix_rows, tiles, untils, list_offsets, lists, order, out,    \
                                         log_sums, rows, heads, kv_heads, head_dim, scale);                             \
    }

#define FOREST_ATTENTION_OF(D)                                                                                          \
    FOREST_ATTENTION(forest_attention_##D##_f32, float, D, false)                                                       \
    FOREST_ATTENTION(forest_attention_##D##_bf16, bf16, D, false)                                                       \
    FOREST_ATTENTION(forest_attention_invariant_##D##_f32, float, D, true)                                              \
    FOREST_ATTENTION(forest_attention_invariant_##D##_bf16, bf16, D, true)

FOREST_ATTENTION_OF(64)
FOREST_ATTENTION_OF(80)
FOREST_ATTENTION_OF(96)
FOREST_ATTENTION_OF(128)
FOREST_ATTENTION_OF(256)
