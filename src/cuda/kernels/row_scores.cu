// What rows of logits say of one token each: the entropy over the row's most probable tokens, the first of these, and the
// probability of the given one.
#include "rows.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int MOST_TOKENS = 64;

using Key = unsigned long long;

// Orders logits by size and then by falling id; NaN is the largest. No token has key 0.
__device__ __forceinline__ Key key_of(float logit, int id) {
    // The two zeros are equal.
    const unsigned bits = logit == 0.0f ? 0u : __float_as_uint(logit);
    unsigned order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (logit != logit) order = 0xffffffffu;
    return Key(order) << 32 | unsigned(~id);
}

__device__ __forceinline__ int id_of(Key key) { return int(~unsigned(key)); }

// The largest of the block's keys, for every thread.
__device__ __forceinline__ Key block_largest(Key key, Key* partial) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const Key other = __shfl_xor_sync(ALL_LANES, key, offset);
        key = other > key ? other : key;
    }
    // The partial keys of the round before have been read.
    __syncthreads();
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = key;
    __syncthreads();
    Key largest = partial[0];
    for (int warp = 1; warp < WARPS; ++warp) largest = partial[warp] > largest ? partial[warp] : largest;
    return largest;
}

// The largest key below `bound` among a thread's share of a row.
__device__ __forceinline__ Key largest_below(Key bound, const float* logits, int vocabulary) {
    Key largest = 0;
#pragma unroll 8
    for (int id = threadIdx.x; id < vocabulary; id += THREADS) {
        const Key key = key_of(logits[id], id);
        if (key < bound && key > largest) largest = key;
    }
    return largest;
}

// Of each row of logits[rows, vocabulary]: the entropy in nats of the softmax over its top_k largest logits, renormalised
// (NaN where one of them is not finite); the probability of targets[row] over the whole vocabulary; and the most probable
// token, of equals the one with the lowest id. top_k is 1 to 64.
// Launch: grid (rows), block (256).
extern "C" __global__ void __launch_bounds__(THREADS)
    score_rows(const float* __restrict__ logits, int vocabulary, const unsigned* __restrict__ targets, int top_k,
                    float* __restrict__ entropies, float* __restrict__ target_probabilities, unsigned* __restrict__ tops) {
    __shared__ Key partial[WARPS];
    __shared__ double partial_sums[WARPS];
    __shared__ Key best[MOST_TOKENS];
    logits += size_t(blockIdx.x) * vocabulary;
    const int count = min(top_k, vocabulary);
    Key own = largest_below(~Key(0), logits, vocabulary);
    for (int place = 0; place < count; ++place) {
        const Key largest = block_largest(own, partial);
        if (threadIdx.x == 0) best[place] = largest;
        if (own == largest) own = largest_below(largest, logits, vocabulary);
    }
    __syncthreads();
    const int top = id_of(best[0]);
    const float top_logit = logits[top];
    double sum = 0.0;
#pragma unroll 4
    for (int id = threadIdx.x; id < vocabulary; id += THREADS) sum += double(expf(logits[id] - top_logit));
    sum = block_sum(sum, partial_sums);
    if (threadIdx.x != 0) return;
    double total = 0.0, weighted = 0.0;
    for (int place = 0; place < count; ++place) {
        const double distance = double(logits[id_of(best[place])]) - double(top_logit), weight = exp(distance);
        total += weight;
        // An impossible token adds nothing.
        if (distance != -INFINITY) weighted += weight * distance;
    }
    const double entropy = log(total) - weighted / total;
    entropies[blockIdx.x] = entropy < 0.0 ? 0.0f : float(entropy);
    target_probabilities[blockIdx.x] = float(exp(double(logits[targets[blockIdx.x]] - top_logit)) / sum);
    tops[blockIdx.x] = unsigned(top);
}
