// What every kernel shares: storage types, 16-byte accesses, reductions with a fixed tree, and the few
// instructions that C++ has no words for. The tests' emulator compiles the same files with RPT_EMULATED; its header
// then supplies the instructions. Sources are compiled without contraction: a fused multiply-add is written fmaf.
#pragma once

#ifdef RPT_EMULATED
#include "emulated_cuda.h"
#else
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------- storage

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }

// The nearest number of the storage type, ties to even.
template <typename T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }

// Two bf16 in a register, `low` in the lower half: the order of mma fragments.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const uint32_t lower = __bfloat16_as_ushort(__float2bfloat16_rn(low));
    const uint32_t upper = __bfloat16_as_ushort(__float2bfloat16_rn(high));
    return upper << 16 | lower;
}

// Elements of one 16-byte access: 4 f32 or 8 bf16.
template <typename T> constexpr int PACK = 16 / int(sizeof(T));

template <typename T> struct alignas(16) Pack {
    T at[PACK<T>];
};

// Both want addresses that are multiples of 16 bytes.
template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T>*>(from);
}
template <typename T> __device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
}

// ------------------------------------------------------------------------------------------------------- reductions

// Every lane gets the same bits: at each step of the butterfly both partners add the same two numbers.
template <typename T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    }
    return value;
}

// For one-dimensional blocks of whole warps. Every thread of the block must call them and gets the same bits: each warp
// by its tree, then the warps in order. `partial` is shared memory of the kernel, one value for each warp; it may be used
// again at once.
template <typename T> __device__ __forceinline__ T block_sum(T value, T* partial) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    T sum = partial[0];
    for (int warp = 1; warp < int(blockDim.x) / WARP; ++warp) sum += partial[warp];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ float block_max(float value, float* partial) {
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    float largest = partial[0];
    for (int warp = 1; warp < int(blockDim.x) / WARP; ++warp) largest = fmaxf(largest, partial[warp]);
    __syncthreads();
    return largest;
}

// ----------------------------------------------------------------------------------------------------- instructions

#ifndef RPT_EMULATED

// The launch's dynamic shared memory, from its start; aligned to 128 bytes.
template <typename T> __device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
    return reinterpret_cast<T*>(dynamic_shared_bytes);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// The same, or 16 bytes of zeros; then `global` is not read but must still be an address inside an allocation.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool copy) {
    const int bytes = copy ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the `PENDING` newest groups of this thread are under way. Other threads see the data after a
// barrier.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane 8 i + r gives the address of row r (16 bytes) of matrix
// i; lane l receives in fragment[i] the elements (l / 4, 2 (l % 4)) and the next of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same with every matrix transposed: lane l receives the elements (2 (l % 4), l / 4) and the one below it.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two matrices; the addresses of lanes 0 to 15 count, those of the others must still be valid.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// sum[16x8] += a[16x16] b[16x8] in f32. With g = lane / 4 and t = lane % 4, each register's lower half first:
//   a:   rows g, g+8, g, g+8 at columns 2t, 2t+1 (registers 0, 1) and 2t+8, 2t+9 (registers 2, 3)
//   b:   column g at rows 2t, 2t+1 (register 0) and 2t+8, 2t+9 (register 1)
//   sum: row g at columns 2t, 2t+1 (elements 0, 1), row g+8 likewise (elements 2, 3)
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
