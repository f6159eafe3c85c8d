// Sums over rows, and element-wise passes that belong to no other operation.
#include "rows.cuh"

constexpr int WIDTH = 4;

// ------------------------------------------------------------------------------------------------------ column sums

constexpr int SUM_THREADS = 256;
constexpr int SUM_WARPS = SUM_THREADS / WARP;
// Rows that one block adds up.
constexpr int SUM_ROWS = 256;

template <typename T>
__device__ __forceinline__ void column_sums(const T* __restrict__ rows, int count, int columns,
                                            float* __restrict__ partial) {
    __shared__ Values<WIDTH> sums[SUM_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int at = (blockIdx.x * WARP + lane) * WIDTH;
    const int first = blockIdx.y * SUM_ROWS, end = min(count, first + SUM_ROWS);
    const bool whole = whole_vectors<WIDTH>(columns, columns, rows) && whole_vectors<WIDTH>(columns, columns, partial);
    Values<WIDTH> sum{};
    if (at < columns) {
#pragma unroll 4
        for (int row = first + warp; row < end; row += SUM_WARPS) {
            const auto values = load<WIDTH>(rows + size_t(row) * columns, at, columns, whole);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum.at[i] += values.at[i];
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && at < columns) {
        for (int other = 1; other < SUM_WARPS; ++other) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum.at[i] += sums[other][lane].at[i];
        }
        store(partial + size_t(blockIdx.y) * columns, at, columns, whole, sum);
    }
}

// partial[b, columns] = sum of the rows b * 256 and following of rows[count, columns], for add_partial_sums.
// Launch: grid (ceil(columns / 128), ceil(count / 256)), block (256).
#define COLUMN_SUMS(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS)                                                            \
        NAME(const T* rows, int count, int columns, float* partial) {                                                    \
        column_sums(rows, count, columns, partial);                                                                      \
    }
COLUMN_SUMS(column_sums_f32, float)
COLUMN_SUMS(column_sums_bf16, bf16)

constexpr int FINISH_THREADS = 512;
constexpr int FINISH_WARPS = FINISH_THREADS / WARP;

// target[c] += sum over p < parts of partial[p, c], each of sixteen runs of parts in order and then the runs in order.
// Launch: grid (ceil(columns / 32)), block (512).
extern "C" __global__ void __launch_bounds__(FINISH_THREADS)
    add_partial_sums(const float* __restrict__ partial, int parts, int columns, float* __restrict__ target) {
    __shared__ float sums[FINISH_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = blockIdx.x * WARP + lane;
    const int run = (parts + FINISH_WARPS - 1) / FINISH_WARPS;
    const int end = min(parts, (warp + 1) * run);
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int part = warp * run; part < end; ++part) sum += partial[size_t(part) * columns + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
        for (int other = 1; other < FINISH_WARPS; ++other) sum += sums[other][lane];
        target[column] += sum;
    }
}

// ----------------------------------------------------------------------------------------------------- element-wise

constexpr int THREADS = 256;

// Calls body(at, whole) for this thread's vector of `length` elements, if it has one.
template <typename Body, typename... T>
__device__ __forceinline__ void for_vector(unsigned long long length, Body body, const T*... operands) {
    const size_t at = (size_t(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    if (at >= length) return;
    const int left = int(min(static_cast<unsigned long long>(WIDTH), length - at));
    body(at, left, left == WIDTH && whole_vectors<WIDTH>(WIDTH, WIDTH, operands...));
}

// to = from, rounded to bf16 or widened from it.
// Launch: grid (ceil(length / 1024)), block (256).
#define CONVERT(NAME, FROM, TO)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const FROM* __restrict__ from, TO* __restrict__ to, unsigned long long length) {                            \
        const auto body = [=](size_t at, int left, bool whole) {                                                         \
            whole = whole && whole_vectors<WIDTH>(WIDTH, WIDTH, to);                                                     \
            store(to + at, 0, left, whole, load<WIDTH>(from + at, 0, left, whole));                                      \
        };                                                                                                               \
        for_vector(length, body, from);                                                                                  \
    }
CONVERT(convert_f32_bf16, float, bf16)
CONVERT(convert_bf16_f32, bf16, float)

template <typename T>
__device__ __forceinline__ void add_bias(float* __restrict__ rows, const T* __restrict__ bias, int columns) {
    const int at = (blockIdx.y * THREADS + threadIdx.x) * WIDTH;
    const bool whole = whole_vectors<WIDTH>(columns, columns, rows) && whole_vectors<WIDTH>(columns, columns, bias);
    if (at >= columns) return;
    rows += size_t(blockIdx.x) * columns;
    auto values = load<WIDTH>(rows, at, columns, whole);
    const auto shifts = load<WIDTH>(bias, at, columns, whole);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values.at[i] += shifts.at[i];
    store(rows, at, columns, whole, values);
}

// Adds bias[columns] to every row of the residual stream.
// Launch: grid (rows, ceil(columns / 1024)), block (256).
#define ADD_BIAS(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(float* rows, const T* bias, int columns) {                \
        add_bias(rows, bias, columns);                                                                                   \
    }
ADD_BIAS(add_bias_f32, float)
ADD_BIAS(add_bias_bf16, bf16)
