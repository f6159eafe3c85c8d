// Root-mean-square normalisation of rows of the residual stream, forward and backward.
#include "rows.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int WIDTH = 4;
// Rows whose weight gradients one block of the backward pass adds up: one for each warp.
constexpr int ROWS = WARPS;

template <typename T>
__device__ __forceinline__ void norm_forward(const float* __restrict__ x, const int* __restrict__ x_rows,
                                             const T* __restrict__ weight, float epsilon, T* __restrict__ out,
                                             float* __restrict__ scales, int columns) {
    __shared__ float partial[WARPS];
    const size_t row = blockIdx.x;
    const size_t source = x_rows != nullptr ? x_rows[row] : row;
    const bool whole = whole_vectors<WIDTH>(columns, columns, x) && whole_vectors<WIDTH>(columns, columns, weight, out);
    x += source * columns;
    out += row * columns;

    float squares = 0.0f;
    for (int at = threadIdx.x * WIDTH; at < columns; at += THREADS * WIDTH) {
        const auto values = load<WIDTH>(x, at, columns, whole);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) squares = fmaf(values.at[i], values.at[i], squares);
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, partial) / float(columns) + epsilon);
    for (int at = threadIdx.x * WIDTH; at < columns; at += THREADS * WIDTH) {
        auto values = load<WIDTH>(x, at, columns, whole);
        const auto factors = load<WIDTH>(weight, at, columns, whole);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) values.at[i] = values.at[i] * scale * factors.at[i];
        store(out, at, columns, whole, values);
    }
    if (scales != nullptr && threadIdx.x == 0) scales[row] = scale;
}

// out[r] = x[x_rows[r]] * scale * weight with scale = 1 / sqrt(mean(x^2) + epsilon); scales[r] = scale.
// x_rows may be null (row r itself), and so may scales.
// Launch: grid (rows), block (256).
#define NORM_FORWARD(NAME, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const float* x, const int* x_rows, const T* weight, float epsilon, T* out, float* scales, int columns) {    \
        norm_forward(x, x_rows, weight, epsilon, out, scales, columns);                                                  \
    }
NORM_FORWARD(norm_forward_f32, float)
NORM_FORWARD(norm_forward_bf16, bf16)

// s^3 mean(g w x) of one row, by one warp.
template <typename G, typename T>
__device__ __forceinline__ float correction_of_row(const float* x, const T* weight, const G* grad_out, float scale,
                                                   int columns, bool whole) {
    float product = 0.0f;
    for (int at = threadIdx.x % WARP * WIDTH; at < columns; at += WARP * WIDTH) {
        const auto values = load<WIDTH>(x, at, columns, whole);
        const auto factors = load<WIDTH>(weight, at, columns, whole);
        const auto grads = load<WIDTH>(grad_out, at, columns, whole);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) product = fmaf(grads.at[i] * factors.at[i], values.at[i], product);
    }
    return scale * scale * scale * warp_sum(product) / float(columns);
}

template <typename G, typename T>
__device__ __forceinline__ void norm_backward(const float* __restrict__ x, const int* __restrict__ x_rows,
                                              const T* __restrict__ weight, const float* __restrict__ scales,
                                              const G* __restrict__ grad_out, float* __restrict__ grad_x,
                                              const int* __restrict__ grad_rows, float* __restrict__ partial, int rows,
                                              int columns) {
    __shared__ float corrections[ROWS];
    const int first = blockIdx.x * ROWS;
    const int count = min(ROWS, rows - first);
    const bool whole = whole_vectors<WIDTH>(columns, columns, x, grad_x, partial) &&
                       whole_vectors<WIDTH>(columns, columns, weight) && whole_vectors<WIDTH>(columns, columns, grad_out);
    const auto place = [columns](const int* places, int row) {
        return size_t(places != nullptr ? places[row] : row) * columns;
    };

    const int warp = threadIdx.x / WARP;
    if (warp < count) {
        const int row = first + warp;
        const float correction = correction_of_row(x + place(x_rows, row), weight, grad_out + size_t(row) * columns,
                                                   scales[row], columns, whole);
        if (threadIdx.x % WARP == 0) corrections[warp] = correction;
    }
    __syncthreads();
    for (int at = threadIdx.x * WIDTH; at < columns; at += THREADS * WIDTH) {
        const auto factors = load<WIDTH>(weight, at, columns, whole);
        Values<WIDTH> grad_weight{};
#pragma unroll 4
        for (int r = 0; r < count; ++r) {
            const int row = first + r;
            const float scale = scales[row], correction = corrections[r];
            float* target = grad_x + place(grad_rows, row);
            const auto values = load<WIDTH>(x + place(x_rows, row), at, columns, whole);
            const auto grads = load<WIDTH>(grad_out + size_t(row) * columns, at, columns, whole);
            auto sums = load<WIDTH>(target, at, columns, whole);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                sums.at[i] += scale * grads.at[i] * factors.at[i] - correction * values.at[i];
                grad_weight.at[i] += grads.at[i] * values.at[i] * scale;
            }
            store(target, at, columns, whole, sums);
        }
        store(partial + size_t(blockIdx.x) * columns, at, columns, whole, grad_weight);
    }
}

// grad_x[grad_rows[r]] += s g - s^3 x mean(g x) with g = grad_out[r] * weight, x = x[x_rows[r]], s = scales[r];
// partial[block, columns] = sum over the block's rows of grad_out x s, for add_partial_sums. x_rows and grad_rows may be
// null (row r itself); the rows of grad_rows must be different from each other, those of x_rows need not be.
// Launch: grid (ceil(rows / 8)), block (256).
#define NORM_BACKWARD(NAME, G, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const float* x, const int* x_rows, const T* weight, const float* scales, const G* grad_out, float* grad_x,  \
             const int* grad_rows, float* partial, int rows, int columns) {                                              \
        norm_backward(x, x_rows, weight, scales, grad_out, grad_x, grad_rows, partial, rows, columns);                   \
    }
NORM_BACKWARD(norm_backward_f32, float, float)
NORM_BACKWARD(norm_backward_bf16, bf16, bf16)
NORM_BACKWARD(norm_backward_f32_bf16, float, bf16)
