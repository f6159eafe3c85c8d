// Kernels with one defect each, which the emulator must find.
#include "common.cuh"

extern "C" __global__ void defect_writes_behind(float* x, int count) { x[threadIdx.x + count] = 1.0f; }
extern "C" __global__ void defect_writes_just_behind(float* x, int count) { x[count] = 1.0f; }
extern "C" __global__ void defect_reads_before(float* x, int count) { x[0] = x[-count]; }

extern "C" __global__ void defect_shared_index(float* x, int count) {
    __shared__ float tile[32];
    tile[threadIdx.x + count] = 1.0f;
    x[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void defect_dynamic_shared_index(float* x, int count) {
    dynamic_shared<float>()[threadIdx.x + count] = 1.0f;
    x[threadIdx.x] = 1.0f;
}

extern "C" __global__ void defect_misaligned(float* x, int count) {
    const Pack<float> pack = load_pack(x + count);
    x[threadIdx.x] = pack.at[0];
}

extern "C" __global__ void defect_barrier_in_a_branch(float* x, int count) {
    if (int(threadIdx.x) < count) __syncthreads();
    x[threadIdx.x] = 1.0f;
}

extern "C" __global__ void defect_two_barriers(float* x, int count) {
    if (int(threadIdx.x) < count) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    x[threadIdx.x] = 1.0f;
}

extern "C" __global__ void defect_shuffle_in_a_branch(float* x, int count) {
    float value = 1.0f;
    if (int(threadIdx.x) < count) value = __shfl_xor_sync(ALL_LANES, value, 1);
    x[threadIdx.x] = value;
}

extern "C" __global__ void defect_mask_without_the_caller(float* x, int count) {
    x[threadIdx.x] = __shfl_xor_sync((1u << count) - 1, 1.0f, 1);
}

extern "C" __global__ void defect_deep_recursion(float* x, int count) {
    volatile float frame[1 << 16];
    for (int i = 0; i < 1 << 16; i += 512) frame[i] = float(count);
    x[threadIdx.x] = frame[count];
}

// These finish with wrong numbers: a neighbour's value is read before it was written.
extern "C" __global__ void defect_no_barrier(float* x, int) {
    __shared__ float tile[64];
    tile[threadIdx.x] = float(threadIdx.x);
    x[blockIdx.x * blockDim.x + threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void defect_no_wait(float* x, int) {
    __shared__ __align__(16) float tile[256];
    cp_async_16(tile + 4 * threadIdx.x, x + 4 * (blockIdx.x * blockDim.x + threadIdx.x));
    cp_async_commit();
    __syncthreads();
    x[4 * (blockIdx.x * blockDim.x + threadIdx.x)] = tile[4 * threadIdx.x];
}
