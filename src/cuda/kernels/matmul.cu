// Matrix products, all matrices row-major with rows `stride` elements apart: c[m, n] (+)= a b, in the three layouts
//   nt: a[m, k] b[n, k]^T    a layer's forward pass
//   nn: a[m, k] b[k, n]      the gradient of its input
//   tn: a[k, m]^T b[k, n]    the gradient of its weights
// Every element is summed in order of k, in one piece, whatever the tile: its bits depend on its row of a, its column of
// b and k alone. `accumulate` adds the sum to what is there.
#include "common.cuh"

enum Layout { NT, NN, TN };

struct Matrix {
    const void* data;
    int stride;
};

// Rows of blocks go down in groups, so that blocks that run together share what they read.
__device__ __forceinline__ void place_of_block(int rows_of_blocks, int columns_of_blocks, int& row, int& column) {
    constexpr int GROUP = 8;
    const int group = blockIdx.x / (GROUP * columns_of_blocks);
    const int height = min(GROUP, rows_of_blocks - group * GROUP);
    const int within = blockIdx.x - group * GROUP * columns_of_blocks;
    row = group * GROUP + within % height;
    column = within / height;
}

template <typename C>
__device__ __forceinline__ void store_element(C* c, int stride, int row, int column, float sum, bool accumulate) {
    C* at = c + size_t(row) * stride + column;
    *at = from_float<C>(accumulate ? to_float(*at) + sum : sum);
}

// ------------------------------------------------------------------------------------------- bf16, on tensor cores

// A part of an operand in shared memory as it lies in memory: EXTENT rows of c (or columns) times DEPTH of k, or
// transposed. Lines are eight elements longer than they need, so that ldmatrix finds eight lines in different banks.
template <int EXTENT, int DEPTH, bool TRANSPOSED, int THREADS> struct OperandTile {
    static constexpr int LINES = TRANSPOSED ? DEPTH : EXTENT;
    static constexpr int LENGTH = TRANSPOSED ? EXTENT : DEPTH;
    static constexpr int STRIDE = LENGTH + 8;
    static constexpr int ELEMENTS = LINES * STRIDE;

    // Starts to copy lines first_line.. at elements first.. of a matrix of lines x length; zeros lie outside of it.
    static __device__ __forceinline__ void load(bf16* tile, const Matrix& matrix, int lines, int length, int first_line,
                                                int first, bool aligned) {
        const bf16* data = static_cast<const bf16*>(matrix.data);
        for (int piece = threadIdx.x; piece < LINES * (LENGTH / 8); piece += THREADS) {
            const int line = piece / (LENGTH / 8), at = piece % (LENGTH / 8) * 8;
            const int from_line = first_line + line, from = first + at;
            bf16* to = tile + line * STRIDE + at;
            const bf16* source = data + size_t(from_line) * matrix.stride + from;
            const bool outside = from_line >= lines || from >= length;
            if (aligned && (outside || from + 8 <= length)) {
                cp_async_16_or_zero(to, outside ? data : source, !outside);
            } else {
                for (int i = 0; i < 8; ++i) {
                    to[i] = !outside && from + i < length ? source[i] : from_float<bf16>(0.0f);
                }
            }
        }
    }
};

// 16 rows of a times 16 of k at (row, depth) of its tile.
template <typename Tile, bool TRANSPOSED>
__device__ __forceinline__ void load_a(uint32_t (&fragment)[4], const bf16* tile, int row, int depth) {
    const int lane = threadIdx.x % WARP, matrix = lane / 8, line = lane % 8;
    if (TRANSPOSED) {
        ldmatrix_x4_trans(fragment, tile + (depth + line + matrix / 2 * 8) * Tile::STRIDE + row + matrix % 2 * 8);
    } else {
        ldmatrix_x4(fragment, tile + (row + line + matrix % 2 * 8) * Tile::STRIDE + depth + matrix / 2 * 8);
    }
}

// 16 columns of b times 16 of k: registers 0 and 1 are those of the first eight columns.
template <typename Tile, bool TRANSPOSED>
__device__ __forceinline__ void load_b(uint32_t (&fragment)[4], const bf16* tile, int column, int depth) {
    const int lane = threadIdx.x % WARP, matrix = lane / 8, line = lane % 8;
    if (TRANSPOSED) {
        ldmatrix_x4_trans(fragment, tile + (depth + line + matrix % 2 * 8) * Tile::STRIDE + column + matrix / 2 * 8);
    } else {
        ldmatrix_x4(fragment, tile + (column + line + matrix / 2 * 8) * Tile::STRIDE + depth + matrix % 2 * 8);
    }
}

// How a block divides its work: BLOCK_M x BLOCK_N of c, DEPTH of k at a time, STAGES - 1 of which are on their way.
template <Layout LAYOUT, int BLOCK_M, int BLOCK_N, int DEPTH, int WARPS_M, int WARPS_N, int STAGES> struct Plan {
    static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
    static constexpr bool A_TRANSPOSED = LAYOUT == TN, B_TRANSPOSED = LAYOUT != NT;
    using A = OperandTile<BLOCK_M, DEPTH, A_TRANSPOSED, THREADS>;
    using B = OperandTile<BLOCK_N, DEPTH, B_TRANSPOSED, THREADS>;
    static constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
    static constexpr int TILES_M = WARP_M / 16, TILES_N = WARP_N / 8;

    static __device__ __forceinline__ void load(bf16* stage, const Matrix& a, const Matrix& b, int m, int n, int k, int row,
                                                int column, int depth, bool aligned) {
        if (A_TRANSPOSED) {
            A::load(stage, a, k, m, depth, row, aligned);
        } else {
            A::load(stage, a, m, k, row, depth, aligned);
        }
        if (B_TRANSPOSED) {
            B::load(stage + A::ELEMENTS, b, k, n, depth, column, aligned);
        } else {
            B::load(stage + A::ELEMENTS, b, n, k, column, depth, aligned);
        }
    }

    static __device__ __forceinline__ void multiply(float (&sums)[TILES_M][TILES_N][4], const bf16* stage, int depth) {
        const int warp = threadIdx.x / WARP, row = warp / WARPS_N * WARP_M, column = warp % WARPS_N * WARP_N;
        uint32_t a[TILES_M][4], b[TILES_N / 2][4];
#pragma unroll
        for (int i = 0; i < TILES_M; ++i) load_a<A, A_TRANSPOSED>(a[i], stage, row + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < TILES_N / 2; ++j) load_b<B, B_TRANSPOSED>(b[j], stage + A::ELEMENTS, column + 16 * j, depth);
#pragma unroll
        for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
            for (int j = 0; j < TILES_N; ++j) {
                const uint32_t right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                mma_m16n8k16_bf16(sums[i][j], a[i], right);
            }
        }
    }

    template <typename C>
    static __device__ __forceinline__ void store(const float (&sums)[TILES_M][TILES_N][4], C* c, int stride, int m, int n,
                                                 int first_row, int first_column, bool accumulate) {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        first_row += warp / WARPS_N * WARP_M + lane / 4;
        first_column += warp % WARPS_N * WARP_N + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
            for (int j = 0; j < TILES_N; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = first_row + 16 * i + e / 2 * 8, column = first_column + 8 * j + e % 2;
                    if (row < m && column < n) store_element(c, stride, row, column, sums[i][j][e], accumulate);
                }
            }
        }
    }

    template <typename C>
    static __device__ __forceinline__ void run(const Matrix& a, const Matrix& b, C* c, int c_stride, int m, int n, int k,
                                               bool aligned, bool accumulate) {
        constexpr int STAGE = A::ELEMENTS + B::ELEMENTS;
        bf16* stages = dynamic_shared<bf16>();
        int row, column;
        place_of_block((m + BLOCK_M - 1) / BLOCK_M, (n + BLOCK_N - 1) / BLOCK_N, row, column);
        row *= BLOCK_M;
        column *= BLOCK_N;
        const int steps = (k + DEPTH - 1) / DEPTH;
        const auto start = [&](int step) {
            if (step < steps) load(stages + step % STAGES * STAGE, a, b, m, n, k, row, column, step * DEPTH, aligned);
            cp_async_commit();
        };
        float sums[TILES_M][TILES_N][4] = {};
        for (int step = 0; step < STAGES - 1; ++step) start(step);
        for (int step = 0; step < steps; ++step) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            // Into the stage that all threads have left by now.
            start(step + STAGES - 1);
            // Sixteens of k that are all padding are left out, so that the plan does not show in the bits.
            const int depth = min(DEPTH, k - step * DEPTH);
#pragma unroll
            for (int at = 0; at < DEPTH; at += 16) {
                if (at < depth) multiply(sums, stages + step % STAGES * STAGE, at);
            }
        }
        store(sums, c, c_stride, m, n, row, column, accumulate);
    }
};

// Wide tiles read least, narrow ones are many enough for few rows. src/cuda/gemm.rs knows their sizes.
template <Layout LAYOUT> using Wide = Plan<LAYOUT, 128, 128, 32, 2, 4, 3>;
template <Layout LAYOUT> using Narrow = Plan<LAYOUT, 32, 32, 128, 2, 2, 4>;

// Threads: 256 (wide), 128 (narrow); one block for each tile of c, in one dimension; shared memory of
// STAGES * (A::ELEMENTS + B::ELEMENTS) * 2 bytes. `aligned`: 16-byte accesses of a and b are possible.
#define MATMUL(layout, LAYOUT, name, C)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
        matmul_##layout##_bf16_##name##_wide(const bf16* a, int a_stride, const bf16* b, int b_stride, C* c, int c_stride, \
                                             int m, int n, int k, int aligned, int accumulate) {                         \
        Wide<LAYOUT>::run(Matrix{a, a_stride}, Matrix{b, b_stride}, c, c_stride, m, n, k, aligned, accumulate);          \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                                    \
        matmul_##layout##_bf16_##name##_narrow(const bf16* a, int a_stride, const bf16* b, int b_stride, C* c,           \
                                               int c_stride, int m, int n, int k, int aligned, int accumulate) {         \
        Narrow<LAYOUT>::run(Matrix{a, a_stride}, Matrix{b, b_stride}, c, c_stride, m, n, k, aligned, accumulate);        \
    }
MATMUL(nt, NT, f32, float)
MATMUL(nt, NT, bf16, bf16)
MATMUL(nn, NN, f32, float)
MATMUL(nn, NN, bf16, bf16)
MATMUL(tn, TN, f32, float)
MATMUL(tn, TN, bf16, bf16)

// ------------------------------------------------------------------------------------------------------------- f32

constexpr int SIDE = 64, SLICE = 16;

// Element `at` of 64 x 16 of an operand: the thread that loads it and its neighbours in memory go together.
template <bool TRANSPOSED> __device__ __forceinline__ void place_in_operand(int at, int& outer, int& depth) {
    outer = TRANSPOSED ? at % SIDE : at / SLICE;
    depth = TRANSPOSED ? at / SIDE : at % SLICE;
}

template <bool TRANSPOSED>
__device__ __forceinline__ void fetch(float (&kept)[4], const float* data, int stride, int extent, int k, int first,
                                      int first_depth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int outer, depth;
        place_in_operand<TRANSPOSED>(threadIdx.x + 256 * i, outer, depth);
        outer += first;
        depth += first_depth;
        const size_t at = TRANSPOSED ? size_t(depth) * stride + outer : size_t(outer) * stride + depth;
        kept[i] = outer < extent && depth < k ? data[at] : 0.0f;
    }
}

template <bool TRANSPOSED> __device__ __forceinline__ void put(const float (&kept)[4], float (*tile)[SIDE + 1]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int outer, depth;
        place_in_operand<TRANSPOSED>(threadIdx.x + 256 * i, outer, depth);
        tile[depth][outer] = kept[i];
    }
}

// One chain of fused multiply-adds for each element, as on the CPU. Each thread has 4 x 4 elements, 16 apart.
template <Layout LAYOUT>
__device__ __forceinline__ void multiply_f32(const float* a, int a_stride, const float* b, int b_stride, float* c,
                                             int c_stride, int m, int n, int k, bool accumulate) {
    __shared__ float a_tile[SLICE][SIDE + 1], b_tile[SLICE][SIDE + 1];
    constexpr bool A_TRANSPOSED = LAYOUT == TN, B_TRANSPOSED = LAYOUT != NT;
    int row, column;
    place_of_block((m + SIDE - 1) / SIDE, (n + SIDE - 1) / SIDE, row, column);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float sums[4][4] = {}, next_a[4], next_b[4];
    fetch<A_TRANSPOSED>(next_a, a, a_stride, m, k, row * SIDE, 0);
    fetch<B_TRANSPOSED>(next_b, b, b_stride, n, k, column * SIDE, 0);
    for (int depth = 0; depth < k; depth += SLICE) {
        put<A_TRANSPOSED>(next_a, a_tile);
        put<B_TRANSPOSED>(next_b, b_tile);
        __syncthreads();
        fetch<A_TRANSPOSED>(next_a, a, a_stride, m, k, row * SIDE, depth + SLICE);
        fetch<B_TRANSPOSED>(next_b, b, b_stride, n, k, column * SIDE, depth + SLICE);
        const int slice = min(SLICE, k - depth);
        for (int at = 0; at < slice; ++at) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[i][j] = fmaf(a_tile[at][y + 16 * i], b_tile[at][x + 16 * j], sums[i][j]);
                }
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            const int to_row = row * SIDE + y + 16 * i, to_column = column * SIDE + x + 16 * j;
            if (to_row < m && to_column < n) store_element(c, c_stride, to_row, to_column, sums[i][j], accumulate);
        }
    }
}

// Threads: 256; one block for each 64 x 64 of c, in one dimension.
#define MATMUL_F32(layout, LAYOUT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        matmul_##layout##_f32_f32(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,    \
                                  int m, int n, int k, int accumulate) {                                                 \
        multiply_f32<LAYOUT>(a, a_stride, b, b_stride, c, c_stride, m, n, k, accumulate);                                \
    }
MATMUL_F32(nt, NT)
MATMUL_F32(nn, NN)
MATMUL_F32(tn, TN)
