// Log-softmax, gather and entropy over chunks of the vocabulary, and the gradient of the logits: full logits of a training
// batch never exist. A chunk's logits come from a matrix product; chunks begin at multiples of VOCABULARY_BLOCK.
#include "normalizer.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int WIDTH = 4;

// One warp for each row and block of the chunk logits[rows, width], whose rows begin `stride` apart and whose first entry
// is `first` of the vocabulary: fills sums[row, vocabulary_blocks] at the chunk's blocks, and target_logits[row] where the
// row's target is in the chunk. When all chunks are done, in any order, head_scores reads both.
// Launch: grid (ceil(rows * ceil(width / 1024) / 8)), block (256).
extern "C" __global__ void __launch_bounds__(THREADS)
    head_sums(const float* __restrict__ logits, int stride, int width, int first, const unsigned* __restrict__ targets,
              float inverse_temperature, BlockSums* __restrict__ sums, int vocabulary_blocks,
              float* __restrict__ target_logits, int rows) {
    const int blocks = (width + VOCABULARY_BLOCK - 1) / VOCABULARY_BLOCK;
    const long long task = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int row = int(task / blocks), block = int(task % blocks);
    if (row >= rows) return;
    const int start = block * VOCABULARY_BLOCK, count = min(VOCABULARY_BLOCK, width - start);
    const float* own = logits + size_t(row) * stride + start;
    const auto result = sums_of_block(own, count, inverse_temperature, whole_vectors<4>(count, stride, logits));
    if (threadIdx.x % WARP != 0) return;
    sums[size_t(row) * vocabulary_blocks + first / VOCABULARY_BLOCK + block] = result;
    const unsigned at = targets[row] - unsigned(first + start);
    if (at < unsigned(count)) target_logits[row] = own[at];
}

// Of each row's target: log-probability at temperature 1 and at the policy's, and the entropy at temperature 1; log_sums
// (for head_gradient) at the policy's temperature. One warp for each row.
// Launch: grid (ceil(rows / 8)), block (256).
extern "C" __global__ void __launch_bounds__(THREADS)
    head_scores(const BlockSums* __restrict__ sums, int vocabulary_blocks, const float* __restrict__ target_logits,
                float inverse_temperature, float* __restrict__ logprobs, float* __restrict__ policy_logprobs,
                float* __restrict__ entropies, float* __restrict__ log_sums, int rows) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const auto all = normalizer_of(sums + size_t(row) * vocabulary_blocks, vocabulary_blocks, inverse_temperature);
    if (threadIdx.x % WARP != 0) return;
    logprobs[row] = all.logprob(target_logits[row]);
    policy_logprobs[row] = all.policy_logprob(target_logits[row], inverse_temperature);
    entropies[row] = all.entropy();
    log_sums[row] = all.log_sum(inverse_temperature);
}

template <typename T>
__device__ __forceinline__ void head_gradient(const float* logits, int stride, int width, int first,
                                              const unsigned* targets, const float* coefficients, const float* log_sums,
                                              float inverse_temperature, T* out, int out_stride) {
    const size_t row = blockIdx.x;
    const int at = (blockIdx.y * THREADS + threadIdx.x) * WIDTH;
    const bool whole = whole_vectors<WIDTH>(width, stride, logits) && whole_vectors<WIDTH>(width, out_stride, out);
    if (at >= width) return;
    const float factor = coefficients[row] * inverse_temperature, log_sum = log_sums[row];
    const int target = int(targets[row]) - first - at;
    auto values = load<WIDTH>(logits + row * stride, at, width, whole);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        values.at[i] = -factor * expf(fmaf(values.at[i], inverse_temperature, -log_sum));
        if (i == target) values.at[i] += factor;
    }
    store(out + row * out_stride, at, width, whole, values);
}

// out = the gradient of coefficients[row] times the target's policy log-probability with respect to the chunk's logits:
// coefficient inverse_temperature ([entry = target] - p(entry)).
// Launch: grid (rows, ceil(width / 1024)), block (256).
#define HEAD_GRADIENT(NAME, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const float* logits, int stride, int width, int first, const unsigned* targets, const float* coefficients,  \
             const float* log_sums, float inverse_temperature, T* out, int out_stride) {                                 \
        head_gradient(logits, stride, width, first, targets, coefficients, log_sums, inverse_temperature, out,           \
                      out_stride);                                                                                       \
    }
HEAD_GRADIENT(head_gradient_f32, float)
HEAD_GRADIENT(head_gradient_bf16, bf16)
