// What the attention kernels share: how a warp holds scores and values, the two products of attention, the online
// softmax, and the loop over key tiles that training and decoding both run, so that one path has the same bits in both.
//
// A block has four warps; each owns 16 rows of a tile of 64 query rows (in the backward pass over keys: of 64 keys). For
// bf16 the products are tensor-core instructions, for f32 chains of fmaf in order of the inner index. Neither depends on
// which other rows are in the tile, and a row that sees no key of a tile keeps its state: its weights are zero and its
// factor is one. Rows and columns past the data are zeros in shared memory.
#pragma once
#include "common.cuh"

constexpr int TILE = 64;
constexpr int WARP_ROWS = 16;
constexpr int ATTENTION_THREADS = TILE / WARP_ROWS * WARP;
constexpr int PAGE_POSITIONS = 16;
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

// Keys in consecutive rows, each a descendant of the one before it. Query row q sees key row k if k <= q < untils[k], and
// untils never rise within a tile: so what a query sees of a tile are its first keys.
struct alignas(16) KeyTile {
    unsigned row;
    unsigned short keys, begins_partial;
    unsigned until, last_until; // of the first and of the last key
};

__device__ __forceinline__ int seen_keys(const KeyTile& tile, const unsigned* untils, unsigned query) {
    if (query < tile.row || query >= tile.until) return 0;
    const int before = min(unsigned(tile.keys), query - tile.row + 1);
    if (query < tile.last_until) return before;
    int least = 1, most = before; // the first key is seen
    while (least < most) {
        const int middle = (least + most) / 2;
        if (untils[tile.row + middle] > query) {
            least = middle + 1;
        } else {
            most = middle;
        }
    }
    return least;
}

// Elements between rows in shared memory: 16 bytes more than a row, so that eight rows lie in different banks.
template <typename T, int WIDTH> constexpr int STRIDE = WIDTH + PACK<T>;
// Columns of the result that one block computes: wide heads are done in two halves, for want of registers.
template <int D> constexpr int COLUMNS = D > 128 ? D / 2 : D;

// ---------------------------------------------------------------------------------------------------------- fragments

// How a warp holds 16 rows: each thread has ROWS of them, which it shares with SHARERS - 1 neighbours.
template <typename T> struct Layout;

// The accumulators of mma.m16n8k16.
template <> struct Layout<bf16> {
    static constexpr int ROWS = 2, SHARERS = 4;
    template <int WIDTH> static constexpr int HELD = WIDTH / 4;
    static __device__ __forceinline__ int row(int i) { return threadIdx.x % WARP / 4 + 8 * i; }
    static __device__ __forceinline__ int key(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
    static __device__ __forceinline__ int column(int j) { return key(j); }
};

template <> struct Layout<float> {
    static constexpr int ROWS = 4, SHARERS = 8;
    template <int WIDTH> static constexpr int HELD = (WIDTH + 31) / 32 * 4;
    static __device__ __forceinline__ int row(int i) { return threadIdx.x % WARP / 8 * 4 + i; }
    static __device__ __forceinline__ int key(int j) { return j * 8 + threadIdx.x % 8; }
    static __device__ __forceinline__ int column(int j) { return j / 4 * 32 + threadIdx.x % 8 * 4 + j % 4; }
};

// 16 rows x KEYS scores; element (i, j) is row Layout::row(i), key Layout::key(j).
template <typename T, int KEYS> struct Scores {
    float at[Layout<T>::ROWS][KEYS / Layout<T>::SHARERS];
};

// 16 rows x WIDTH values; element (i, j) is row Layout::row(i), column Layout::column(j).
template <typename T, int WIDTH> struct Values {
    static constexpr int HELD = Layout<T>::template HELD<WIDTH>;
    float at[Layout<T>::ROWS][HELD];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Layout<T>::ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < HELD; ++j) at[i][j] = 0.0f;
        }
    }
};

// The first row that this thread's warp owns.
__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP * WARP_ROWS; }

template <typename T> __device__ __forceinline__ float row_sum(float value) {
#pragma unroll
    for (int offset = 1; offset < Layout<T>::SHARERS; offset *= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

template <typename T> __device__ __forceinline__ float row_max(float value) {
#pragma unroll
    for (int offset = 1; offset < Layout<T>::SHARERS; offset *= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    }
    return value;
}

// ----------------------------------------------------------------------------------------------------------- products

__device__ __forceinline__ void multiply_block(float (&upper)[2], float (&lower)[2], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
    float sum[4] = {upper[0], upper[1], lower[0], lower[1]};
    const uint32_t b[2] = {b0, b1};
    mma_m16n8k16_bf16(sum, a, b);
    upper[0] = sum[0], upper[1] = sum[1], lower[0] = sum[2], lower[1] = sum[3];
}

__device__ __forceinline__ float (&pair(float* at))[2] { return *reinterpret_cast<float (*)[2]>(at); }

// The two products below for FULL tiles, which leave the compiler one long run of instructions to order, and others.
template <bool FULL, int D, int KEYS>
__device__ __forceinline__ void score_tile(Scores<bf16, KEYS>& out, const bf16* left, const bf16* right, int limit) {
    constexpr int stride = STRIDE<bf16, D>;
    const int lane = threadIdx.x % WARP;
    const bf16* left_row = left + lane % 16 * stride + lane / 16 * 8;
    const bf16* right_row = right + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < KEYS / 4; ++j) out.at[i][j] = 0.0f;
    }
#pragma unroll
    for (int inner = 0; inner < D; inner += 16) {
        uint32_t a[4];
        ldmatrix_x4(a, left_row + inner);
#pragma unroll
        for (int group = 0; group < KEYS / 16; ++group) {
            if (!FULL && group * 16 >= limit) continue;
            uint32_t b[4];
            ldmatrix_x4(b, right_row + group * 16 * stride + inner);
            multiply_block(pair(&out.at[0][group * 4]), pair(&out.at[1][group * 4]), a, b[0], b[1]);
            multiply_block(pair(&out.at[0][group * 4 + 2]), pair(&out.at[1][group * 4 + 2]), a, b[2], b[3]);
        }
    }
}

template <bool FULL, int D, int KEYS>
__device__ __forceinline__ void score_tile(Scores<float, KEYS>& out, const float* left, const float* right, int limit) {
    constexpr int stride = STRIDE<float, D>;
    const float* left_row = left + Layout<float>::row(0) * stride;
    const float* right_row = right + Layout<float>::key(0) * stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) out.at[i][j] = 0.0f;
    }
#pragma unroll 2
    for (int inner = 0; inner < D; inner += 4) {
        Pack<float> a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = load_pack(left_row + i * stride + inner);
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) {
            if (!FULL && j * 8 >= limit) continue;
            const Pack<float> b = load_pack(right_row + j * 8 * stride + inner);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) out.at[i][j] = fmaf(a[i].at[k], b.at[k], out.at[i][j]);
            }
        }
    }
}

// Floats of shared memory that a warp needs to hand weights around.
template <typename T, int KEYS> constexpr int SCRATCH = 0;
template <int KEYS> constexpr int SCRATCH<float, KEYS> = WARP_ROWS * KEYS;

template <bool FULL, int WIDTH, int KEYS>
__device__ __forceinline__ void weigh_tile(Values<bf16, WIDTH>& out, const Scores<bf16, KEYS>& weights, const bf16* right,
                                           int stride, int limit, float*) {
    const int lane = threadIdx.x % WARP;
    const bf16* row = right + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
    for (int group = 0; group < KEYS / 16; ++group) {
        if (!FULL && group * 16 >= limit) continue;
        const float* upper = &weights.at[0][group * 4];
        const float* lower = &weights.at[1][group * 4];
        const uint32_t a[4] = {pack_bf16(upper[0], upper[1]), pack_bf16(lower[0], lower[1]),
                               pack_bf16(upper[2], upper[3]), pack_bf16(lower[2], lower[3])};
#pragma unroll
        for (int block = 0; block < WIDTH / 16; ++block) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, row + group * 16 * stride + block * 16);
            multiply_block(pair(&out.at[0][block * 4]), pair(&out.at[1][block * 4]), a, b[0], b[1]);
            multiply_block(pair(&out.at[0][block * 4 + 2]), pair(&out.at[1][block * 4 + 2]), a, b[2], b[3]);
        }
    }
}

template <bool FULL, int WIDTH, int KEYS>
__device__ __forceinline__ void weigh_tile(Values<float, WIDTH>& out, const Scores<float, KEYS>& weights,
                                           const float* right, int stride, int limit, float* scratch) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) {
            scratch[Layout<float>::row(i) * KEYS + Layout<float>::key(j)] = weights.at[i][j];
        }
    }
    __syncwarp();
    const int keys = FULL ? KEYS : min(KEYS, (limit + 15) / 16 * 16);
    for (int key = 0; key < keys; ++key) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = scratch[Layout<float>::row(i) * KEYS + key];
#pragma unroll
        for (int j = 0; j < Values<float, WIDTH>::HELD; j += 4) {
            const int column = Layout<float>::column(j);
            if (WIDTH % 32 != 0 && column >= WIDTH) continue;
            const Pack<float> value = load_pack(right + key * stride + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) out.at[i][j + k] = fmaf(weight[i], value.at[k], out.at[i][j + k]);
            }
        }
    }
    __syncwarp();
}

// out = left right^T. `left`: the warp's 16 rows, `right`: KEYS rows, both of D columns in shared memory. Keys from
// `limit` on, rounded up to 16, are left zero.
template <int D, typename T, int KEYS>
__device__ __forceinline__ void multiply_transposed(Scores<T, KEYS>& out, const T* left, const T* right, int limit) {
    if (limit > KEYS - 16) {
        score_tile<true, D>(out, left, right, KEYS);
    } else {
        score_tile<false, D>(out, left, right, limit);
    }
}

// out += weights right. `right`: KEYS rows of WIDTH columns in shared memory, `stride` elements apart. Keys from
// `limit` on, rounded up to 16, are left out. Weights are rounded to T.
template <typename T, int WIDTH, int KEYS>
__device__ __forceinline__ void multiply_add(Values<T, WIDTH>& out, const Scores<T, KEYS>& weights, const T* right,
                                             int stride, int limit, float* scratch) {
    if (limit > KEYS - 16) {
        weigh_tile<true>(out, weights, right, stride, KEYS, scratch);
    } else {
        weigh_tile<false>(out, weights, right, stride, limit, scratch);
    }
}

// ------------------------------------------------------------------------------------------------------------ softmax

// 2^x for numbers that were stored as T.
template <typename T> __device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
#ifndef RPT_EMULATED
template <> __device__ __forceinline__ float power_of_two<bf16>(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#endif

// Attention of 16 rows to the keys so far: the largest scaled score in units of log2, the sum of 2^(score - maximum),
// and the values weighted with the same. Until `sum` is reduced each thread has the part of its own keys.
template <typename T, int WIDTH> struct Attended {
    static constexpr int ROWS = Layout<T>::ROWS;
    float maximum[ROWS], sum[ROWS];
    Values<T, WIDTH> values;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) maximum[i] = -INFINITY, sum[i] = 0.0f;
        values.clear();
    }

    // Turns scores into weights and takes them into account. Row i sees the first limits[i] keys; `least` is at most
    // the smallest limit. `scale` contains log2(e).
    template <int KEYS>
    __device__ __forceinline__ void soften(Scores<T, KEYS>& scores, const int (&limits)[ROWS], int least, float scale) {
        constexpr int HELD = KEYS / Layout<T>::SHARERS;
        if (least < KEYS) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
#pragma unroll
                for (int j = 0; j < HELD; ++j) {
                    if (Layout<T>::key(j) >= limits[i]) scores.at[i][j] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float largest = scores.at[i][0];
#pragma unroll
            for (int j = 1; j < HELD; ++j) largest = fmaxf(largest, scores.at[i][j]);
            const float now = fmaxf(maximum[i], row_max<T>(largest) * scale);
            const float base = now == -INFINITY ? 0.0f : now;
            const float shrink = power_of_two<T>(maximum[i] - base);
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
                scores.at[i][j] = power_of_two<T>(fmaf(scores.at[i][j], scale, -base));
                total += scores.at[i][j];
            }
            maximum[i] = now;
            sum[i] = fmaf(sum[i], shrink, total);
#pragma unroll
            for (int j = 0; j < Values<T, WIDTH>::HELD; ++j) values.at[i][j] *= shrink;
        }
    }

    __device__ __forceinline__ void reduce() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sum[i] = row_sum<T>(sum[i]);
    }
};

// What to multiply two partial results by before they are added.
struct MergeFactors {
    float before, part;
};

// Raises `maximum` to that of a further partial result, which must not be empty.
template <typename T> __device__ __forceinline__ MergeFactors merge_factors(float& maximum, float part) {
    const float now = fmaxf(maximum, part);
    const MergeFactors factors = {power_of_two<T>(maximum - now), power_of_two<T>(part - now)};
    maximum = now;
    return factors;
}

__device__ __forceinline__ float merged(float before, float part, MergeFactors factors) {
    return fmaf(part, factors.part, before * factors.before);
}

// What weighted values are multiplied by in the end.
__device__ __forceinline__ float inverse_sum(float sum) { return sum > 0.0f ? 1.0f / sum : 0.0f; }

// The sum of the partial results so far. Its values wait in shared memory, since registers are short and they are needed
// once in 512 keys.
template <typename T, int WIDTH> struct Total {
    static constexpr int ROWS = Layout<T>::ROWS, HELD = Values<T, WIDTH>::HELD;
    static constexpr int SHARED = ATTENTION_THREADS * ROWS * HELD; // floats
    float maximum[ROWS], sum[ROWS];
    float* values; // this thread's, ATTENTION_THREADS apart

    __device__ __forceinline__ Total(float* shared, bool used) : values(shared + threadIdx.x) {
        if (!used) return;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) maximum[i] = -INFINITY, sum[i] = 0.0f;
        for (int at = 0; at < ROWS * HELD; ++at) values[at * ATTENTION_THREADS] = 0.0f;
    }

    // Adds the next partial result of every row's path.
    __device__ __forceinline__ void fold(Attended<T, WIDTH>& part) {
        part.reduce();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (part.maximum[i] == -INFINITY) continue;
            const MergeFactors factors = merge_factors<T>(maximum[i], part.maximum[i]);
            sum[i] = merged(sum[i], part.sum[i], factors);
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
                float& value = values[(i * HELD + j) * ATTENTION_THREADS];
                value = merged(value, part.values.at[i][j], factors);
            }
        }
    }

    __device__ __forceinline__ void copy_to(Attended<T, WIDTH>& result) const {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            result.maximum[i] = maximum[i], result.sum[i] = sum[i];
#pragma unroll
            for (int j = 0; j < HELD; ++j) result.values.at[i][j] = values[(i * HELD + j) * ATTENTION_THREADS];
        }
    }
};

// ------------------------------------------------------------------------------------------------------ shared memory

// Starts copying `rows` rows of `columns` elements (a multiple of 16 bytes) to shared memory; the rest of
// ROWS x WIDTH becomes zero. `source` must be an address inside an allocation even when there is nothing to copy.
template <int ROWS, int WIDTH, typename T>
__device__ __forceinline__ void load_rows(T* target, int target_stride, const T* source, size_t stride, int rows,
                                          int columns) {
    constexpr int PACKS = WIDTH / PACK<T>;
#pragma unroll 4
    for (int first = 0; first < ROWS * PACKS; first += ATTENTION_THREADS) {
        const int at = first + threadIdx.x;
        if (ROWS * PACKS % ATTENTION_THREADS != 0 && at >= ROWS * PACKS) continue;
        const int row = at / PACKS, column = at % PACKS * PACK<T>;
        const bool there = row < rows && column < columns;
        cp_async_16_or_zero(target + row * target_stride + column, there ? source + row * stride + column : source, there);
    }
}

// Shared memory of the loop over key tiles: 64 queries, 64 keys, and 64 values of COLUMNS<D> columns.
template <typename T, int D> struct TileMemory {
    static constexpr int VALUE_STRIDE = STRIDE<T, COLUMNS<D>>;
    T *queries, *keys, *values;
    float *scratch, *totals; // this warp's; what lies behind: `Total` or whatever the kernel keeps

    explicit __device__ __forceinline__ TileMemory(T* start)
        : queries(start), keys(queries + TILE * STRIDE<T, D>), values(keys + TILE * STRIDE<T, D>),
          scratch(reinterpret_cast<float*>(values + TILE * VALUE_STRIDE) + threadIdx.x / WARP * SCRATCH<T, TILE>),
          totals(reinterpret_cast<float*>(values + TILE * VALUE_STRIDE) + TILE / WARP_ROWS * SCRATCH<T, TILE>) {}
};

// Elements between neighbouring rows of an operand, and where its first row lies.
template <typename T> struct Rows {
    const T* first;
    size_t stride;
};

// Keys or values: first those of the prefix, which other launches computed, then those of this launch.
template <typename T> struct SplitRows {
    const T *prefix, *own;
    size_t prefix_stride, own_stride;
    unsigned prefix_rows;

    __device__ __forceinline__ Rows<T> from(unsigned row) const {
        if (row < prefix_rows) return {prefix + row * prefix_stride, prefix_stride};
        return {own + (row - prefix_rows) * own_stride, own_stride};
    }
};

// --------------------------------------------------------------------------------------------------------------- loop

// Attention of the block's 64 rows to all key tiles of `source`, which says where they come from:
//   tiles                            their number
//   load_keys()                      starts copying the keys of the next tile to shared memory
//   load_values(t)                   makes the next tile, t, the current one and starts copying its values
//   keys_arrived(), values_arrived() finish what this thread has copied
//   limit(row)                       how many of the current tile's keys a row sees: always its first ones
//   begins_partial()                 whether a new partial result begins with it (asked with PARTIALS alone)
//   scale_scores, scale_weights      scales of stored keys and values
// The queries and the keys of the first tile must be under way as one group of copies. On return `result.sum` is reduced.
template <typename T, int D, bool PARTIALS, typename Source>
__device__ __forceinline__ void attend(Source& source, const TileMemory<T, D>& memory, float scale,
                                       Attended<T, COLUMNS<D>>& result) {
    using Result = Attended<T, COLUMNS<D>>;
    const int first_row = warp_row();
    Total<T, COLUMNS<D>> total(memory.totals, PARTIALS);
    result.clear();
    for (int tile = 0; tile < source.tiles; ++tile) {
        cp_async_wait<0>();
        source.keys_arrived();
        __syncthreads();
        source.load_values(tile);
        cp_async_commit();
        if (PARTIALS && tile > 0 && source.begins_partial()) {
            total.fold(result);
            result.clear();
        }
        int limits[Result::ROWS], most = 0, least = TILE;
#pragma unroll
        for (int i = 0; i < Result::ROWS; ++i) {
            limits[i] = source.limit(first_row + Layout<T>::row(i));
            most = max(most, limits[i]);
            least = min(least, limits[i]);
        }
        most = __reduce_max_sync(ALL_LANES, most);
        least = __reduce_min_sync(ALL_LANES, least);
        Scores<T, TILE> scores;
        if (most > 0) {
            multiply_transposed<D>(scores, memory.queries + first_row * STRIDE<T, D>, memory.keys, most);
            source.scale_scores(scores);
            result.soften(scores, limits, least, scale);
        }
        cp_async_wait<0>();
        source.values_arrived();
        __syncthreads();
        if (tile + 1 < source.tiles) {
            source.load_keys();
            cp_async_commit();
        }
        if (most > 0) {
            source.scale_weights(scores);
            multiply_add(result.values, scores, memory.values, memory.VALUE_STRIDE, most, memory.scratch);
        }
    }
    if (PARTIALS) {
        total.fold(result);
        total.copy_to(result);
    } else {
        result.reduce();
    }
}

// Stores two neighbouring elements; `to` is a multiple of two elements.
__device__ __forceinline__ void store_pair(float* to, float low, float high) {
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(bf16* to, float low, float high) {
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(low, high);
}
