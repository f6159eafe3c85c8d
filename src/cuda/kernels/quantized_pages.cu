// Keys and values on their way into pages of eight-bit numbers. Each page and head has a scale, a power of two: so a
// page that grows can take a larger one without losing more than the smallest of its numbers.
#include "fp8.cuh"

constexpr int PAGE = 16;
constexpr int THREADS = 128;

// The smallest power of two by which `largest` fits.
__device__ __forceinline__ float fitting_scale(float largest) {
    const uint32_t bits = __float_as_uint(largest / FP8_MAX);
    return __uint_as_float(max((bits + 0x7fffffu) & 0x7f800000u, 0x00800000u));
}

template <typename T>
__device__ __forceinline__ void quantize_rows(const T* rows, unsigned stride, const int* slots, fp8* page, float* scale,
                                              int first, int count, unsigned head_dim) {
    __shared__ float partial[THREADS / WARP];
    const int before = slots[first] % PAGE;
    float largest = 0.0f;
    for (unsigned at = threadIdx.x; at < count * head_dim; at += THREADS) {
        largest = fmaxf(largest, fabsf(to_float(rows[size_t(first + at / head_dim) * stride + at % head_dim])));
    }
    const float wanted = fitting_scale(block_max(largest, partial));
    const float old = before > 0 ? *scale : 0.0f, now = fmaxf(old, wanted);
    __syncthreads(); // everyone has read the old scale
    if (now > old) {
        const float factor = old / now;
        for (unsigned at = threadIdx.x; at < before * head_dim; at += THREADS) {
            page[at].bits = static_cast<unsigned char>(narrow_fp8(widen_fp8(page[at].bits) * factor));
        }
        if (threadIdx.x == 0) *scale = now;
    }
    for (unsigned at = threadIdx.x; at < count * head_dim; at += THREADS) {
        const float value = to_float(rows[size_t(first + at / head_dim) * stride + at % head_dim]);
        page[before * head_dim + at].bits = static_cast<unsigned char>(narrow_fp8(value / now));
    }
}

template <typename T>
__device__ __forceinline__ void store_pages(const T* keys, const T* values, unsigned stride, const int* slots,
                                            fp8* key_pages, fp8* value_pages, float* key_scales, float* value_scales,
                                            int rows, unsigned kv_heads, unsigned head_dim) {
    const int first = blockIdx.x, slot = slots[first];
    const bool begins = slot >= 0 && (first == 0 || slots[first - 1] < 0 || slots[first - 1] / PAGE != slot / PAGE);
    if (!begins) return; // the whole block
    int count = 1;
    while (first + count < rows && slots[first + count] == slot + count && (slot + count) / PAGE == slot / PAGE) ++count;
    const size_t place = size_t(slot / PAGE) * kv_heads + blockIdx.y;
    const bool is_value = blockIdx.z == 1;
    quantize_rows((is_value ? values : keys) + size_t(blockIdx.y) * head_dim, stride, slots,
                  (is_value ? value_pages : key_pages) + place * PAGE * head_dim,
                  (is_value ? value_scales : key_scales) + place, first, count, head_dim);
}

// Rounds keys and values of some rows into pages [page, kv_heads, 16, head_dim] at slots[row] = page * 16 + lane, where
// that is not negative, with scales [page, kv_heads]. Positions of one page must stand in consecutive rows, and a page is
// filled from lane 0 on, by one launch or several.
// grid (rows, kv_heads, 2: keys, values), block 128
extern "C" __global__ void __launch_bounds__(THREADS)
    store_fp8_pages_f32(const float* keys, const float* values, unsigned stride, const int* slots, fp8* key_pages,
                        fp8* value_pages, float* key_scales, float* value_scales, int rows, unsigned kv_heads,
                        unsigned head_dim) {
    store_pages(keys, values, stride, slots, key_pages, value_pages, key_scales, value_scales, rows, kv_heads, head_dim);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    store_fp8_pages_bf16(const bf16* keys, const bf16* values, unsigned stride, const int* slots, fp8* key_pages,
                         fp8* value_pages, float* key_scales, float* value_scales, int rows, unsigned kv_heads,
                         unsigned head_dim) {
    store_pages(keys, values, stride, slots, key_pages, value_pages, key_scales, value_scales, rows, kv_heads, head_dim);
}
