// Log-softmax of a row of logits from blocks of the vocabulary. Each block is reduced by one warp and the blocks' sums by
// another, always in the same tree: a row has the same bits whether its logits stand in one piece (sampling) or come a
// chunk of the vocabulary at a time (scoring), as long as chunks begin at multiples of VOCABULARY_BLOCK.
#pragma once

#include "rows.cuh"

constexpr int VOCABULARY_BLOCK = 1024;

struct alignas(16) BlockSums {
    float largest;
    // Sums of e = exp(logit - largest), of e times logit, and of exp(inverse_temperature (logit - largest)).
    float sum, weighted, tempered;
};

// Four neighbouring logits; negative infinity behind the end.
__device__ __forceinline__ Values<4> load_logits(const float* logits, int at, int count, bool whole) {
    if (at < count && whole) return load<4>(logits, at, count, true);
    Values<4> values;
#pragma unroll
    for (int i = 0; i < 4; ++i) values.at[i] = at + i < count ? logits[at + i] : -INFINITY;
    return values;
}

// Sums of the first `count` <= VOCABULARY_BLOCK logits, by a whole warp; every lane returns them. `whole` says that
// logits are aligned to 16 bytes and count is a multiple of 4.
__device__ __forceinline__ BlockSums sums_of_block(const float* logits, int count, float inverse_temperature,
                                                   bool whole) {
    constexpr int VECTORS = VOCABULARY_BLOCK / (4 * WARP);
    const int lane = threadIdx.x % WARP;
    Values<4> values[VECTORS];
    float largest = -INFINITY;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        values[v] = load_logits(logits, (v * WARP + lane) * 4, count, whole);
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = fmaxf(largest, values[v].at[i]);
    }
    largest = warp_max(largest);
    float sum = 0.0f, weighted = 0.0f, tempered = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float logit = values[v].at[i], e = expf(logit - largest);
            sum += e;
            // Behind the end e is 0 and the logit infinite; NaN must stay NaN.
            if (e != 0.0f) weighted = fmaf(e, logit, weighted);
            if (inverse_temperature != 1.0f) tempered += expf((logit - largest) * inverse_temperature);
        }
    }
    sum = warp_sum(sum);
    weighted = warp_sum(weighted);
    tempered = warp_sum(tempered);
    return {largest, sum, weighted, inverse_temperature != 1.0f ? tempered : sum};
}

struct Normalizer {
    float largest, sum, weighted, tempered;

    // Log-probabilities of a logit at temperature 1 and at the policy's.
    __device__ __forceinline__ float logprob(float logit) const { return (logit - largest) - logf(sum); }
    __device__ __forceinline__ float policy_logprob(float logit, float inverse_temperature) const {
        return fmaf(logit - largest, inverse_temperature, -logf(tempered));
    }
    // Entropy in nats at temperature 1.
    __device__ __forceinline__ float entropy() const { return (largest + logf(sum)) - weighted / sum; }
    // ln of the sum of exp(inverse_temperature logit).
    __device__ __forceinline__ float log_sum(float inverse_temperature) const {
        return fmaf(largest, inverse_temperature, logf(tempered));
    }
};

// The sums of a row's blocks together, by a whole warp; every lane returns them.
__device__ __forceinline__ Normalizer normalizer_of(const BlockSums* blocks, int count, float inverse_temperature) {
    const int lane = threadIdx.x % WARP;
    float largest = -INFINITY;
    for (int block = lane; block < count; block += WARP) largest = fmaxf(largest, blocks[block].largest);
    largest = warp_max(largest);
    Normalizer all{largest, 0.0f, 0.0f, 0.0f};
    for (int block = lane; block < count; block += WARP) {
        const BlockSums own = blocks[block];
        const float shrink = expf(own.largest - largest);
        all.sum = fmaf(own.sum, shrink, all.sum);
        all.weighted = fmaf(own.weighted, shrink, all.weighted);
        if (inverse_temperature != 1.0f) {
            all.tempered = fmaf(own.tempered, expf((own.largest - largest) * inverse_temperature), all.tempered);
        }
    }
    all.sum = warp_sum(all.sum);
    all.weighted = warp_sum(all.weighted);
    all.tempered = warp_sum(all.tempered);
    if (inverse_temperature == 1.0f) all.tempered = all.sum;
    return all;
}
