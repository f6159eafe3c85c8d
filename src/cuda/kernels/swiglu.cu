// SwiGLU: silu(gate) * up on rows that hold the gate and then the up half, forward and backward.
#include "rows.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T>
__device__ __forceinline__ void swiglu_forward(const T* __restrict__ gate_up, T* __restrict__ out, int inner) {
    constexpr int WIDTH = PACK<T>;
    const size_t row = blockIdx.x;
    const int at = (blockIdx.y * THREADS + threadIdx.x) * WIDTH;
    const bool whole = whole_vectors<WIDTH>(inner, inner, gate_up, out);
    if (at >= inner) return;
    const T* gate = gate_up + row * 2 * inner;
    const auto gates = load<WIDTH>(gate, at, inner, whole);
    auto values = load<WIDTH>(gate + inner, at, inner, whole);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values.at[i] = gates.at[i] * sigmoid(gates.at[i]) * values.at[i];
    store(out + row * inner, at, inner, whole, values);
}

// out[rows, inner] = silu(gate) * up of gate_up[rows, 2 inner].
// Launch: grid (rows, ceil(inner / (256 elements of 16 bytes))), block (256).
#define SWIGLU_FORWARD(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const T* gate_up, T* out, int inner) {                    \
        swiglu_forward(gate_up, out, inner);                                                                             \
    }
SWIGLU_FORWARD(swiglu_forward_f32, float)
SWIGLU_FORWARD(swiglu_forward_bf16, bf16)

template <typename T>
__device__ __forceinline__ void swiglu_backward(const T* grad_out, T* gate_up, T* activated, int inner) {
    constexpr int WIDTH = PACK<T>;
    const size_t row = blockIdx.x;
    const int at = (blockIdx.y * THREADS + threadIdx.x) * WIDTH;
    const bool whole = whole_vectors<WIDTH>(inner, inner, gate_up, grad_out, activated);
    if (at >= inner) return;
    auto gates = load<WIDTH>(gate_up + row * 2 * inner, at, inner, whole);
    auto ups = load<WIDTH>(gate_up + row * 2 * inner + inner, at, inner, whole);
    const auto grads = load<WIDTH>(grad_out + row * inner, at, inner, whole);
    Values<WIDTH> outs;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float s = sigmoid(gates.at[i]), silu = gates.at[i] * s;
        outs.at[i] = silu * ups.at[i];
        gates.at[i] = grads.at[i] * ups.at[i] * (s + silu * (1.0f - s));
        ups.at[i] = grads.at[i] * silu;
    }
    if (activated != nullptr) store(activated + row * inner, at, inner, whole, outs);
    store(gate_up + row * 2 * inner, at, inner, whole, gates);
    store(gate_up + row * 2 * inner + inner, at, inner, whole, ups);
}

// Replaces gate_up[rows, 2 inner] by its gradient, from grad_out[rows, inner]. Where activated is not null it receives the
// forward pass's output once more.
// Launch: grid (rows, ceil(inner / (256 elements of 16 bytes))), block (256).
#define SWIGLU_BACKWARD(NAME, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const T* grad_out, T* gate_up, T* activated, int inner) {                                                   \
        swiglu_backward(grad_out, gate_up, activated, inner);                                                            \
    }
SWIGLU_BACKWARD(swiglu_backward_f32, float)
SWIGLU_BACKWARD(swiglu_backward_bf16, bf16)
