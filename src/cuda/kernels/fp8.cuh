// Eight-bit floating-point numbers: sign, four bits of exponent, three of fraction (e4m3), at most 448.
#pragma once
#include "common.cuh"

struct fp8 {
    unsigned char bits;
};

constexpr float FP8_MAX = 448.0f;

// 0x7f and 0xff, which mean no number, become 480.
__device__ __forceinline__ float widen_fp8(uint32_t bits) {
    return __uint_as_float((bits & 0x80u) << 24 | (bits & 0x7fu) << 20) * 0x1p120f;
}

// The nearest such number, ties to even; what is larger than the largest becomes the largest.
__device__ __forceinline__ uint32_t narrow_fp8(float value) {
    const uint32_t sign = __float_as_uint(value) >> 24 & 0x80u;
    const float size = fabsf(value);
    if (!(size < FP8_MAX)) return sign | 0x7eu;
    if (size < 0x1p-6f) return sign | uint32_t(rintf(size * 512.0f));
    const uint32_t bits = __float_as_uint(size);
    return sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3));
}

// Two of them as bf16, exactly; `low` in the lower half.
__device__ __forceinline__ uint32_t widen_fp8_pair(uint32_t low, uint32_t high) {
    return __float_as_uint(widen_fp8(high)) | __float_as_uint(widen_fp8(low)) >> 16;
}
