// CUDA C++ for the host's compiler: enough of the language to compile src/cuda/kernels/*.cu unchanged and run them with
// every CUDA thread as a fiber (runtime.cpp). A test double: it checks what a GPU leaves undefined.
#pragma once

#include <climits>
#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <math.h>
#include <type_traits>

// -------------------------------------------------------------------------------------------------------- language

// The harness finds kernels and their launch bounds in the preprocessed text by these two attributes.
#define __global__ __attribute__((emulated_kernel))
#define __launch_bounds__(...) __attribute__((emulated_launch_bounds(__VA_ARGS__)))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
#define __grid_constant__
// A block's threads all run on one host thread, so its thread-local variables are the block's.
#define __shared__ thread_local

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define EMULATED_VECTORS(type, name)                                                                                     \
    struct alignas(2 * sizeof(type)) name##2 {                                                                           \
        type x, y;                                                                                                       \
    };                                                                                                                   \
    struct name##3 {                                                                                                     \
        type x, y, z;                                                                                                    \
    };                                                                                                                   \
    struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 {                                              \
        type x, y, z, w;                                                                                                 \
    };                                                                                                                   \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                     \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                          \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(long long, longlong)
EMULATED_VECTORS(unsigned long long, ulonglong)
#undef EMULATED_VECTORS
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int warpSize = 32;

// --------------------------------------------------------------------------------------------- what the runtime does

#pragma GCC visibility push(default)

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Site {
    const char* file;
    int line;
};

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for all threads of the block; returns how many came with `vote`.
int barrier(bool vote, Site site);

// Waits for the lanes of `mask`; then one of them carries out `operation` on what all brought (null for other lanes).
using Operation = void (*)(void* const lanes[32], unsigned mask);
void meet(unsigned mask, const char* name, Site site, void* brought, Operation operation);

unsigned lane();
unsigned char* dynamic_shared_bytes();

void copy_later(void* to, const void* from, bool copy);
void close_group();
void wait_for_groups(int pending);

} // namespace emulated

#pragma GCC visibility pop

#define EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATED_HERE                                                                                                    \
    emulated::Site { file, line }

inline void __syncthreads(EMULATED_SITE) { emulated::barrier(false, EMULATED_HERE); }
inline int __syncthreads_count(int vote, EMULATED_SITE) { return emulated::barrier(vote != 0, EMULATED_HERE); }
inline int __syncthreads_or(int vote, EMULATED_SITE) { return emulated::barrier(vote != 0, EMULATED_HERE) > 0; }
inline int __syncthreads_and(int vote, EMULATED_SITE) { return emulated::barrier(vote == 0, EMULATED_HERE) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulated::fail("__trap()"); }

// ------------------------------------------------------------------------------------------------- warp collectives

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_SITE) {
    emulated::meet(mask, "__syncwarp", EMULATED_HERE, &mask, [](void* const*, unsigned) {});
}

namespace emulated {

template <typename T> struct Shuffle {
    T value;
    int source; // -1: the lane's own value
    T result;
};

template <typename T> T shuffle(unsigned mask, T value, int source, Site site) {
    Shuffle<T> brought{value, source, value};
    meet(mask, "__shfl_sync", site, &brought, [](void* const lanes[32], unsigned mask) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            auto* own = static_cast<Shuffle<T>*>(lanes[lane]);
            if (own == nullptr || own->source < 0) continue;
            if ((mask >> own->source & 1) == 0) fail("lane %u reads lane %d, which takes no part", lane, own->source);
            own->result = static_cast<Shuffle<T>*>(lanes[own->source])->value;
        }
    });
    return brought.result;
}

inline int in_segment(int target, int width) {
    const int start = int(lane()) / width * width;
    return target >= start && target < start + width ? target : -1;
}

template <typename T> struct Reduction {
    T value, result;
};

template <typename T, typename F> T reduce(unsigned mask, T value, const char* name, Site site, F) {
    Reduction<T> brought{value, value};
    meet(mask, name, site, &brought, [](void* const lanes[32], unsigned) {
        bool first = true;
        T total{};
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (lanes[lane] == nullptr) continue;
            const T value = static_cast<Reduction<T>*>(lanes[lane])->value;
            total = first ? value : F{}(total, value);
            first = false;
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (lanes[lane] != nullptr) static_cast<Reduction<T>*>(lanes[lane])->result = total;
        }
    });
    return brought.result;
}

} // namespace emulated

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATED_SITE) {
    const int start = int(emulated::lane()) / width * width;
    return emulated::shuffle(mask, value, start + (source & (width - 1)), EMULATED_HERE);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATED_SITE) {
    return emulated::shuffle(mask, value, emulated::in_segment(int(emulated::lane()) ^ bits, width), EMULATED_HERE);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATED_SITE) {
    return emulated::shuffle(mask, value, emulated::in_segment(int(emulated::lane() + by), width), EMULATED_HERE);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATED_SITE) {
    return emulated::shuffle(mask, value, emulated::in_segment(int(emulated::lane()) - int(by), width), EMULATED_HERE);
}

#define EMULATED_REDUCTION(name, expression)                                                                             \
    template <typename T> T name(unsigned mask, T value, EMULATED_SITE) {                                                \
        return emulated::reduce(mask, value, #name, EMULATED_HERE, [](T a, T b) { return expression; });                 \
    }
EMULATED_REDUCTION(__reduce_add_sync, a + b)
EMULATED_REDUCTION(__reduce_min_sync, a < b ? a : b)
EMULATED_REDUCTION(__reduce_max_sync, a < b ? b : a)
EMULATED_REDUCTION(__reduce_and_sync, a & b)
EMULATED_REDUCTION(__reduce_or_sync, a | b)
EMULATED_REDUCTION(__reduce_xor_sync, a ^ b)
#undef EMULATED_REDUCTION

inline unsigned __ballot_sync(unsigned mask, int vote, EMULATED_SITE) {
    const unsigned bit = vote != 0 ? 1u << emulated::lane() : 0u;
    return emulated::reduce(mask, bit, "__ballot_sync", EMULATED_HERE, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int vote, EMULATED_SITE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, EMULATED_SITE) { return __ballot_sync(mask, vote, file, line) == mask; }

// ------------------------------------------------------------------------------------------------------------- bf16

// Without operators: kernels calculate in float.
struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline int __float_as_int(float value) { return __builtin_bit_cast(int, value); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (value != value) return {0x7fff};
    const unsigned bits = __float_as_uint(value);
    return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }

// ------------------------------------------------------------------------------------------------------- arithmetic

#define EMULATED_MIN_MAX(type, left, right)                                                                              \
    inline type min(left a, right b) { return static_cast<type>(b) < static_cast<type>(a) ? b : a; }                     \
    inline type max(left a, right b) { return static_cast<type>(a) < static_cast<type>(b) ? b : a; }
EMULATED_MIN_MAX(int, int, int)
EMULATED_MIN_MAX(unsigned, unsigned, unsigned)
EMULATED_MIN_MAX(unsigned, int, unsigned)
EMULATED_MIN_MAX(unsigned, unsigned, int)
EMULATED_MIN_MAX(long, long, long)
EMULATED_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATED_MIN_MAX(long long, long long, long long)
EMULATED_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}

template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldcs(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T> void __stcs(T* to, T value) { *to = value; }

// Atomics on integers only: on floating-point numbers they would make results depend on the order of threads.
#define EMULATED_ATOMIC(name, expression)                                                                                \
    template <typename T> T name(T* at, std::type_identity_t<T> value) {                                                 \
        static_assert(std::is_integral_v<T>, "atomics on data are not deterministic");                                   \
        const T old = __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                             \
        __atomic_store_n(at, T(expression), __ATOMIC_SEQ_CST);                                                           \
        return old;                                                                                                      \
    }
EMULATED_ATOMIC(atomicAdd, old + value)
EMULATED_ATOMIC(atomicSub, old - value)
EMULATED_ATOMIC(atomicMin, value < old ? value : old)
EMULATED_ATOMIC(atomicMax, old < value ? value : old)
EMULATED_ATOMIC(atomicAnd, old & value)
EMULATED_ATOMIC(atomicOr, old | value)
EMULATED_ATOMIC(atomicExch, value)
#undef EMULATED_ATOMIC
template <typename T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    static_assert(std::is_integral_v<T>, "atomics on data are not deterministic");
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

// ------------------------------------------------------------------------------- the instructions of common.cuh

template <typename T> T* dynamic_shared() { return reinterpret_cast<T*>(emulated::dynamic_shared_bytes()); }

inline void cp_async_16(void* shared, const void* global) { emulated::copy_later(shared, global, true); }
inline void cp_async_16_or_zero(void* shared, const void* global, bool copy) {
    emulated::copy_later(shared, global, copy);
}
inline void cp_async_commit() { emulated::close_group(); }
template <int PENDING> void cp_async_wait() { emulated::wait_for_groups(PENDING); }

namespace emulated {

template <int MATRICES, bool TRANSPOSED> struct Matrices {
    const void* row;
    uint32_t fragment[MATRICES];

    static void load(void* const lanes[32], unsigned) {
        for (int matrix = 0; matrix < MATRICES; ++matrix) {
            uint16_t elements[8][8];
            for (int row = 0; row < 8; ++row) {
                const void* from = static_cast<Matrices*>(lanes[8 * matrix + row])->row;
                if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
                    fail("ldmatrix: the row address of lane %d is no multiple of 16", 8 * matrix + row);
                }
                memcpy(elements[row], from, 16);
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int long_way = 2 * (lane % 4), short_way = lane / 4;
                const uint32_t low = TRANSPOSED ? elements[long_way][short_way] : elements[short_way][long_way];
                const uint32_t high = TRANSPOSED ? elements[long_way + 1][short_way] : elements[short_way][long_way + 1];
                static_cast<Matrices*>(lanes[lane])->fragment[matrix] = high << 16 | low;
            }
        }
    }
};

template <int MATRICES, bool TRANSPOSED> void ldmatrix(uint32_t (&fragment)[MATRICES], const void* row, Site site) {
    Matrices<MATRICES, TRANSPOSED> brought{row, {}};
    meet(0xffffffffu, "ldmatrix", site, &brought, &Matrices<MATRICES, TRANSPOSED>::load);
    for (int matrix = 0; matrix < MATRICES; ++matrix) fragment[matrix] = brought.fragment[matrix];
}

struct Multiplication {
    float* sum;
    const uint32_t *a, *b;
};

// Lane layouts of mma.m16n8k16 with 16-bit operands as in the PTX manual.
inline void multiply(void* const lanes[32], unsigned) {
    const auto half = [](uint32_t pair, int upper) { return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16); };
    float a[16][16], b[16][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& own = *static_cast<Multiplication*>(lanes[lane]);
        const int group = lane / 4, within = lane % 4;
        for (int i = 0; i < 8; ++i) {
            a[group + (i / 2 % 2) * 8][within * 2 + i % 2 + i / 4 * 8] = half(own.a[i / 2], i % 2);
        }
        for (int i = 0; i < 4; ++i) b[within * 2 + i % 2 + i / 2 * 8][group] = half(own.b[i / 2], i % 2);
        for (int i = 0; i < 4; ++i) sum[group + i / 2 * 8][within * 2 + i % 2] = own.sum[i];
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) sum[row][column] = fmaf(a[row][k], b[k][column], sum[row][column]);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& own = *static_cast<Multiplication*>(lanes[lane]);
        for (int i = 0; i < 4; ++i) own.sum[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

} // namespace emulated

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, EMULATED_SITE) {
    emulated::ldmatrix<4, false>(fragment, row, EMULATED_HERE);
}
inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row, EMULATED_SITE) {
    emulated::ldmatrix<4, true>(fragment, row, EMULATED_HERE);
}
inline void ldmatrix_x2(uint32_t (&fragment)[2], const void* row, EMULATED_SITE) {
    emulated::ldmatrix<2, false>(fragment, row, EMULATED_HERE);
}
inline void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row, EMULATED_SITE) {
    emulated::ldmatrix<2, true>(fragment, row, EMULATED_HERE);
}
inline void mma_m16n8k16_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATED_SITE) {
    emulated::Multiplication brought{sum, a, b};
    emulated::meet(0xffffffffu, "mma", EMULATED_HERE, &brought, &emulated::multiply);
}
