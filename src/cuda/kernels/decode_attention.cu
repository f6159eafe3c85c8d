// Attention of new positions to keys and values in pages: decoding, and prefill in chunks.
//
// A work item is some queries and a run of key tiles that they share: all samples of a prompt read the prompt in one
// item, all prompts of a document its trunk. Queries x heads of one key/value head are the rows of a tile, so a shared
// page is read once for all of them. Each item leaves a partial result for each of its queries; a second kernel adds
// those of a query in the order of its path.
#include "attention.cuh"
#include "fp8.cuh"

// Queries that share keys. Query i of the item is entry first_query + i of the queries' table and writes partial result
// first_partial + i.
struct alignas(16) DecodeItem {
    unsigned first_query, queries, first_tile, tiles, first_partial;
    // A growing item has tiles of 64 keys; query rows see lengths[row] - start of them. Otherwise the table says it.
    unsigned growing, start, unused;
};

// Up to 64 keys in consecutive entries of the page table, from the start of the first page.
struct alignas(16) DecodeTile {
    unsigned page, keys;
    unsigned before; // keys of the item in front of them
    unsigned unused;
};

// A query's row in the batch, and how many keys of its item it sees: always the first ones.
struct alignas(8) DecodeQuery {
    unsigned row, visible;
};

// What is calculated with when `S` is stored.
template <typename S> struct Widened {
    using Type = S;
};
template <> struct Widened<fp8> {
    using Type = bf16;
};

// Starts copying the rows of a tile from their pages. Each page holds [kv_heads, 16, head_dim].
template <int WIDTH, typename S>
__device__ __forceinline__ void load_pages(S* target, int target_stride, const S* pages, const unsigned* table,
                                           size_t page_stride, int rows, int head_dim, int columns) {
    constexpr int PACKS = WIDTH / PACK<S>;
#pragma unroll 4
    for (int first = 0; first < TILE * PACKS; first += ATTENTION_THREADS) {
        const int at = first + threadIdx.x;
        if (TILE * PACKS % ATTENTION_THREADS != 0 && at >= TILE * PACKS) continue;
        const int row = at / PACKS, column = at % PACKS * PACK<S>;
        const bool there = row < rows && column < columns;
        const S* source = pages;
        if (there) {
            source += table[row / PAGE_POSITIONS] * page_stride + size_t(row % PAGE_POSITIONS) * head_dim + column;
        }
        cp_async_16_or_zero(target + row * target_stride + column, source, there);
    }
}

// Widens what this thread itself has copied with `load_pages`.
template <int WIDTH>
__device__ __forceinline__ void widen_rows(bf16* target, int target_stride, const fp8* staged) {
    constexpr int PACKS = WIDTH / PACK<fp8>;
    for (int at = threadIdx.x; at < TILE * PACKS; at += ATTENTION_THREADS) {
        const int row = at / PACKS, column = at % PACKS * PACK<fp8>;
        const uint4 words = *reinterpret_cast<const uint4*>(staged + row * WIDTH + column);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        uint32_t wide[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t two = word[i / 2] >> i % 2 * 16;
            wide[i] = widen_fp8_pair(two, two >> 8);
        }
        uint4* to = reinterpret_cast<uint4*>(target + row * target_stride + column);
        to[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
        to[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
    }
}

// Keys and values of one item and head, stored as S.
template <typename S, int D> struct PagedSource {
    using T = typename Widened<S>::Type;
    static constexpr bool STAGED = sizeof(S) < sizeof(T);

    TileMemory<T, D> memory;
    S *staged_keys, *staged_values; // [64, D] and [64, COLUMNS<D>], where they are stored narrower
    const S *keys, *values;         // of this head in page 0
    const float *key_scales, *value_scales; // likewise, [pages, kv_heads]
    const unsigned* table;
    const DecodeTile* list;
    const int* visible; // of each row
    int tiles, longest; // the largest of `visible`
    int head_dim, value_columns, kv_heads;
    size_t page_stride;
    DecodeTile next, current; // read a tile ahead, since copies wait for them

    __device__ __forceinline__ DecodeTile at(int tile) const { return list[max(0, min(tile, tiles - 1))]; }
    __device__ __forceinline__ int rows(const DecodeTile& tile) const {
        return min(int(tile.keys), longest - int(tile.before));
    }
    __device__ __forceinline__ void load_keys() {
        S* target = STAGED ? staged_keys : reinterpret_cast<S*>(memory.keys);
        load_pages<D>(target, STAGED ? D : STRIDE<T, D>, keys, table + next.page, page_stride, rows(next), head_dim,
                      head_dim);
    }
    __device__ __forceinline__ void load_values(int tile) {
        current = next;
        next = at(tile + 1);
        S* target = STAGED ? staged_values : reinterpret_cast<S*>(memory.values);
        load_pages<COLUMNS<D>>(target, STAGED ? COLUMNS<D> : memory.VALUE_STRIDE, values, table + current.page,
                               page_stride, rows(current), head_dim, value_columns);
    }
    __device__ __forceinline__ int limit(int row) const {
        return max(0, min(int(current.keys), visible[row] - int(current.before)));
    }
    __device__ __forceinline__ bool begins_partial() const { return false; }
    __device__ __forceinline__ void keys_arrived() {
        if constexpr (STAGED) widen_rows<D>(memory.keys, STRIDE<T, D>, staged_keys);
    }
    __device__ __forceinline__ void values_arrived() {
        if constexpr (STAGED) widen_rows<COLUMNS<D>>(memory.values, memory.VALUE_STRIDE, staged_values);
    }

    // Four neighbouring elements of a row of bf16 fragments are of one page.
    template <typename Fragment> __device__ __forceinline__ void scale_pages(Fragment& fragment, const float* scales) {
        if constexpr (STAGED) {
            const int pages = (rows(current) + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
#pragma unroll
            for (int page = 0; page < TILE / PAGE_POSITIONS; ++page) {
                if (page >= pages) continue;
                const float scale = scales[size_t(table[current.page + page]) * kv_heads];
#pragma unroll
                for (int i = 0; i < Layout<T>::ROWS; ++i) {
#pragma unroll
                    for (int j = page * 4; j < page * 4 + 4; ++j) fragment.at[i][j] *= scale;
                }
            }
        }
    }
    template <typename F> __device__ __forceinline__ void scale_scores(F& scores) { scale_pages(scores, key_scales); }
    template <typename F> __device__ __forceinline__ void scale_weights(F& weights) { scale_pages(weights, value_scales); }
};

template <typename S, int D>
__device__ __forceinline__ void decode_attention(const typename Widened<S>::Type* queries, unsigned query_stride,
                                                 const S* keys, const S* values, const float* key_scales,
                                                 const float* value_scales, const unsigned* page_table,
                                                 const DecodeItem* items, const DecodeTile* tiles,
                                                 const DecodeQuery* table, const unsigned* lengths, float* statistics,
                                                 float* partials, unsigned heads, unsigned kv_heads, unsigned head_dim,
                                                 float scale) {
    using T = typename Widened<S>::Type;
    __shared__ int visible[TILE];
    __shared__ unsigned batch_rows[TILE];
    const TileMemory<T, D> memory(dynamic_shared<T>());
    const DecodeItem item = items[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    constexpr unsigned HALVES = D / COLUMNS<D>;
    const unsigned first_column = blockIdx.z % HALVES * COLUMNS<D>, first_row = blockIdx.z / HALVES * TILE;
    if (threadIdx.x < TILE) {
        const unsigned query = (first_row + threadIdx.x) / group;
        const bool there = query < item.queries;
        const DecodeQuery own = table[item.first_query + (there ? query : 0)];
        const int seen = item.growing != 0 ? int(lengths[own.row]) - int(item.start) : int(own.visible);
        visible[threadIdx.x] = there ? max(seen, 0) : 0;
        batch_rows[threadIdx.x] = own.row;
    }
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    const int longest = __reduce_max_sync(ALL_LANES, max(visible[lane], visible[lane + WARP]));
    int needed = 0;
    for (unsigned first = 0; first < item.tiles; first += ATTENTION_THREADS) {
        const unsigned tile = first + threadIdx.x;
        needed += __syncthreads_count(tile < item.tiles && int(tiles[item.first_tile + tile].before) < longest);
    }

    const size_t key_start = size_t(kv_head) * PAGE_POSITIONS * head_dim;
    S* staged = reinterpret_cast<S*>(memory.totals);
    PagedSource<S, D> source = {
        memory,
        staged,
        staged + TILE * D,
        keys + key_start,
        values + key_start + first_column,
        key_scales + kv_head,
        value_scales + kv_head,
        page_table,
        tiles + item.first_tile,
        visible,
        needed,
        longest,
        int(head_dim),
        int(head_dim - first_column),
        int(kv_heads),
        size_t(kv_heads) * PAGE_POSITIONS * head_dim,
        {},
        {},
    };
    source.next = source.at(0);
    const unsigned rows = min(unsigned(TILE), max(item.queries * group, first_row) - first_row);
    if (needed > 0) {
        constexpr int PACKS = D / PACK<T>;
        for (int at = threadIdx.x; at < TILE * PACKS; at += ATTENTION_THREADS) {
            const unsigned row = at / PACKS, column = at % PACKS * PACK<T>;
            const bool there = row < rows && column < head_dim;
            const size_t start = (kv_head * group + (first_row + row) % group) * head_dim + column;
            cp_async_16_or_zero(memory.queries + row * STRIDE<T, D> + column,
                                there ? queries + size_t(batch_rows[row]) * query_stride + start : queries, there);
        }
        source.load_keys();
    }
    cp_async_commit();
    Attended<T, COLUMNS<D>> result;
    attend<T, D, false>(source, memory, scale * LOG2_E, result);
    cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < result.ROWS; ++i) {
        const unsigned row = warp_row() + Layout<T>::row(i);
        if (row >= rows) continue;
        const unsigned query = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
        const size_t place = size_t(item.first_partial + query) * heads + head;
        if (first_column == 0 && threadIdx.x % Layout<T>::SHARERS == 0) {
            store_pair(statistics + place * 2, result.maximum[i], result.sum[i]);
        }
        if (visible[row] == 0) continue;
#pragma unroll
        for (int j = 0; j < result.values.HELD; j += 2) {
            const unsigned within = Layout<T>::column(j), column = first_column + within;
            if (within >= COLUMNS<D> || column >= head_dim) continue;
            store_pair(partials + place * head_dim + column, result.values.at[i][j], result.values.at[i][j + 1]);
        }
    }
}

// Partial results of every item: statistics [partials, heads, 2] are the largest scaled score in units of log2 (-inf
// when the query sees no key of the item; then it has no values) and the sum of 2^(score - largest); partials
// [partials, heads, head_dim] the values weighted with the same. Query r of head h lies at
// queries[r * query_stride + h * head_dim]; keys and values: pages of [kv_heads, 16, head_dim]; the scales, read for
// fp8 alone, are [pages, kv_heads]. lengths[r] is read for growing items alone. head_dim: a multiple of 16, at most the
// number in the name.
// grid (items, kv_heads, (largest queries x group / 64 rounded up) x (2 if the name's head_dim is 256, else 1)),
// block 128; shared memory as for forest_attention, and 64 (D + min(D, 128)) bytes more for fp8
#define DECODE_ATTENTION(NAME, T, S, D)                                                                                 \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                                     \
        NAME(const T* queries, unsigned query_stride, const S* keys, const S* values, const float* key_scales,          \
             const float* value_scales, const unsigned* page_table, const DecodeItem* items, const DecodeTile* tiles,   \
             const DecodeQuery* table, const unsigned* lengths, float* statistics, float* partials, unsigned heads,     \
             unsigned kv_heads, unsigned head_dim, float scale) {                                                       \
        decode_attention<S, D>(queries, query_stride, keys, values, key_scales, value_scales, page_table, items, tiles, \
                               table, lengths, statistics, partials, heads, kv_heads, head_dim, scale);                 \
    }

#define DECODE_ATTENTION_OF(D)                                                                                          \
    DECODE_ATTENTION(decode_attention_##D##_f32, float, float, D)                                                       \
    DECODE_ATTENTION(decode_attention_##D##_bf16, bf16, bf16, D)                                                        \
    DECODE_ATTENTION(decode_attention_##D##_fp8, bf16, fp8, D)

DECODE_ATTENTION_OF(64)
DECODE_ATTENTION_OF(80)
DECODE_ATTENTION_OF(96)
DECODE_ATTENTION_OF(128)
DECODE_ATTENTION_OF(256)

// -------------------------------------------------------------------------------------------------------------- merge

constexpr int MERGE_THREADS = 256;

// Where the partial results of a query and head lie, and their statistics.
struct Partials {
    size_t place[MERGE_THREADS];
    float maximum[MERGE_THREADS], sum[MERGE_THREADS];
};

template <typename T>
__device__ __forceinline__ void merge_partials(const float* statistics, const float* partials, const unsigned* rows,
                                               const unsigned* list_offsets, const unsigned* lists, T* out,
                                               unsigned heads, unsigned head_dim) {
    __shared__ Partials known;
    const unsigned head = blockIdx.y, column = threadIdx.x, end = list_offsets[blockIdx.x + 1];
    float maximum = -INFINITY, sum = 0.0f, value = 0.0f;
    for (unsigned first = list_offsets[blockIdx.x]; first < end; first += blockDim.x) {
        const int count = min(end - first, blockDim.x);
        __syncthreads();
        if (threadIdx.x < count) {
            const size_t place = size_t(lists[first + threadIdx.x]) * heads + head;
            known.place[threadIdx.x] = place * head_dim;
            known.maximum[threadIdx.x] = statistics[place * 2];
            known.sum[threadIdx.x] = statistics[place * 2 + 1];
        }
        __syncthreads();
#pragma unroll 8
        for (int at = 0; at < count; ++at) {
            const bool empty = known.maximum[at] == -INFINITY;
            const float part = empty || column >= head_dim ? 0.0f : partials[known.place[at] + column];
            if (empty) continue;
            const MergeFactors factors = merge_factors<T>(maximum, known.maximum[at]);
            sum = merged(sum, known.sum[at], factors);
            value = merged(value, part, factors);
        }
    }
    if (column >= head_dim) return;
    out[(size_t(rows[blockIdx.x]) * heads + head) * head_dim + column] = from_float<T>(value * inverse_sum(sum));
}

// out [rows[q], heads, head_dim] of query q = its partial results lists[list_offsets[q] ..], added in that order.
// grid (queries, heads), block: head_dim rounded up to 32
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge_partial_attention_f32(const float* statistics, const float* partials, const unsigned* rows,
                                const unsigned* list_offsets, const unsigned* lists, float* out, unsigned heads,
                                unsigned head_dim) {
    merge_partials(statistics, partials, rows, list_offsets, lists, out, heads, head_dim);
}

extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    merge_partial_attention_bf16(const float* statistics, const float* partials, const unsigned* rows,
                                 const unsigned* list_offsets, const unsigned* lists, bf16* out, unsigned heads,
                                 unsigned head_dim) {
    merge_partials(statistics, partials, rows, list_offsets, lists, out, heads, head_dim);
}
