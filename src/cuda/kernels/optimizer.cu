// AdamW over flat f32 parameters, with the gradient's global norm, clipping and the refusal of gradients that are not
// finite decided on the device.
#include "rows.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int WIDTH = 4;

// -------------------------------------------------------------------------------------------------------- global norm

// Elements that one block squares and adds.
constexpr int NORM_CHUNK = 16384;

// partial[b] = sum of squares of the elements b * 16384 and following, in f64.
// Launch: grid (ceil(length / 16384)), block (256).
extern "C" __global__ void __launch_bounds__(THREADS)
    sums_of_squares(const float* __restrict__ values, unsigned long long length, double* __restrict__ partial) {
    __shared__ double sums[WARPS];
    const size_t first = size_t(blockIdx.x) * NORM_CHUNK;
    const int count = int(min(static_cast<unsigned long long>(NORM_CHUNK), length - first));
    const bool whole = whole_vectors<WIDTH>(count, WIDTH, values);
    double sum = 0.0;
#pragma unroll 4
    for (int at = threadIdx.x * WIDTH; at < count; at += THREADS * WIDTH) {
        const auto vector = load<WIDTH>(values + first, at, count, whole);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum = fma(double(vector.at[i]), double(vector.at[i]), sum);
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// What the norm decides for a step.
struct Clip {
    // Global L2 norm of the gradient.
    double norm;
    // Factor for every gradient: max_norm / (norm + 1e-6) where the norm exceeds max_norm > 0, else 1.
    float scale;
    // 1 where the norm is not finite: the update must change nothing.
    unsigned refused;
};

// Launch: grid (1), block (256).
extern "C" __global__ void __launch_bounds__(THREADS)
    clip_gradient(const double* __restrict__ partial, int parts, float max_norm, Clip* __restrict__ clip) {
    __shared__ double sums[WARPS];
    double sum = 0.0;
#pragma unroll 4
    for (int part = threadIdx.x; part < parts; part += THREADS) sum += partial[part];
    const double norm = sqrt(block_sum(sum, sums));
    if (threadIdx.x != 0) return;
    const double limit = double(max_norm);
    const bool clipped = limit > 0.0 && norm > limit;
    // Squares of finite f32 do not overflow f64.
    *clip = {norm, clipped ? float(limit / (norm + 1e-6)) : 1.0f, norm < INFINITY ? 0u : 1u};
}

// ------------------------------------------------------------------------------------------------------------- AdamW

// A part of a parameter: `length` elements from `start` on, which decay or do not.
struct Chunk {
    unsigned long long start;
    unsigned length, decayed;
};

struct Step {
    float beta1, beta2, epsilon;
    // 1 - rate weight_decay; rate / (1 - beta1^t); sqrt(1 - beta2^t).
    float keep, rate, second_correction;
};

// Uniform random bits of element `at` in a step: one step of SplitMix64, as in src/random.rs.
__device__ __forceinline__ unsigned random_bits(unsigned long long seed, unsigned long long at) {
    unsigned long long value = seed + (at + 1) * 0x9e3779b97f4a7c15ull;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return unsigned((value ^ (value >> 31)) >> 32);
}

// A moment in the format that keeps it. bf16 rounds up with the probability of what it cuts off (`random` < 65536):
// rounded to the nearest, a moment that changes by less than 1/512 in a step would not change at all.
template <typename M> __device__ __forceinline__ M moment_from(float value, unsigned random);
template <> __device__ __forceinline__ float moment_from<float>(float value, unsigned) { return value; }
template <> __device__ __forceinline__ bf16 moment_from<bf16>(float value, unsigned random) {
    return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(value) + random) >> 16));
}

template <typename T, typename M>
__device__ __forceinline__ void adamw(const Chunk* __restrict__ chunks, const float* __restrict__ gradients,
                                      const Clip* __restrict__ clip, const Step& step, unsigned long long seed,
                                      float* __restrict__ parameters, M* __restrict__ first, M* __restrict__ second,
                                      T* __restrict__ weights, float* __restrict__ average, float average_decay) {
    if (clip->refused != 0) return;
    const Chunk chunk = chunks[blockIdx.x];
    const float scale = clip->scale, keep = chunk.decayed != 0 ? step.keep : 1.0f;
    const bool aligned = whole_vectors<WIDTH>(chunk.start, WIDTH, parameters, gradients, average) &&
                         whole_vectors<WIDTH>(chunk.start, WIDTH, first, second) &&
                         whole_vectors<WIDTH>(chunk.start, WIDTH, weights);
    const int length = int(chunk.length);
    for (int at = threadIdx.x * WIDTH; at < length; at += THREADS * WIDTH) {
        const bool whole = aligned && at + WIDTH <= length;
        auto values = load<WIDTH>(parameters + chunk.start, at, length, whole);
        auto ones = load<WIDTH>(first + chunk.start, at, length, whole);
        auto twos = load<WIDTH>(second + chunk.start, at, length, whole);
        const auto grads = load<WIDTH>(gradients + chunk.start, at, length, whole);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const float gradient = grads.at[i] * scale;
            const float one = step.beta1 * ones.at[i] + (1.0f - step.beta1) * gradient;
            const float two = step.beta2 * twos.at[i] + (1.0f - step.beta2) * gradient * gradient;
            const float root = sqrtf(two) / step.second_correction + step.epsilon;
            values.at[i] = values.at[i] * keep - step.rate * one / root;
            const unsigned random = sizeof(M) < sizeof(float) ? random_bits(seed, chunk.start + at + i) : 0;
            ones.at[i] = to_float(moment_from<M>(one, random & 0xffffu));
            twos.at[i] = to_float(moment_from<M>(two, random >> 16));
        }
        store(parameters + chunk.start, at, length, whole, values);
        store(first + chunk.start, at, length, whole, ones);
        store(second + chunk.start, at, length, whole, twos);
        if (weights != nullptr) store(weights + chunk.start, at, length, whole, values);
        if (average != nullptr) {
            auto averages = load<WIDTH>(average + chunk.start, at, length, whole);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                averages.at[i] = average_decay * averages.at[i] + (1.0f - average_decay) * values.at[i];
            }
            store(average + chunk.start, at, length, whole, averages);
        }
    }
}

// One step over the chunks of flat parameters, all operands laid out alike, unless clip refuses it:
//   g = clip scale * gradient, m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
//   p = keep p - rate m / (sqrt(v) / second_correction + epsilon), with keep 1 where the chunk does not decay;
// weights = p rounded to the storage type; average = average_decay average + (1 - average_decay) p.
// keep is 1 - rate weight_decay, rate is divided by 1 - beta1^t, second_correction is sqrt(1 - beta2^t). seed should be
// another in every step (bf16 moments only). weights and average may be null.
// Launch: grid (chunks), block (256); chunks of 16384 elements are about right.
#define ADAMW(NAME, T, M)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        NAME(const Chunk* chunks, const float* gradients, const Clip* clip, float beta1, float beta2, float epsilon,     \
             float keep, float rate, float second_correction, unsigned long long seed, float* parameters, M* first,      \
             M* second, T* weights, float* average, float average_decay) {                                               \
        adamw(chunks, gradients, clip, {beta1, beta2, epsilon, keep, rate, second_correction}, seed, parameters, first,  \
              second, weights, average, average_decay);                                                                  \
    }
ADAMW(adamw_f32, float, float)
ADAMW(adamw_bf16, bf16, float)
ADAMW(adamw_moments_bf16_f32, float, bf16)
ADAMW(adamw_moments_bf16_bf16, bf16, bf16)
