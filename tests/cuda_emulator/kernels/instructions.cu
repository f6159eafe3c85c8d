// Every instruction of common.cuh on data of the test's choice. One warp each.
#include "common.cuh"

// fragments[lane][4] of the matrices in rows[32][8], read as ldmatrix does; `kind` 0: x4, 1: x4.trans, 2: x2, 3: x2.trans.
extern "C" __global__ void __launch_bounds__(32) test_ldmatrix(const unsigned short* rows, unsigned* fragments, int kind) {
    __shared__ __align__(16) unsigned short tile[32][8];
    for (int i = 0; i < 8; ++i) tile[threadIdx.x][i] = rows[threadIdx.x * 8 + i];
    __syncwarp();
    uint32_t four[4] = {}, two[2] = {};
    if (kind == 0) ldmatrix_x4(four, tile[threadIdx.x]);
    if (kind == 1) ldmatrix_x4_trans(four, tile[threadIdx.x]);
    if (kind == 2) ldmatrix_x2(two, tile[threadIdx.x]);
    if (kind == 3) ldmatrix_x2_trans(two, tile[threadIdx.x]);
    for (int i = 0; i < 4; ++i) fragments[threadIdx.x * 4 + i] = kind < 2 ? four[i] : i < 2 ? two[i] : 0;
}

// sum[lane][4] += a[lane][4] b[lane][2].
extern "C" __global__ void __launch_bounds__(32) test_mma(const unsigned* a, const unsigned* b, float* sum) {
    uint32_t left[4], right[2];
    float total[4];
    for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) right[i] = b[threadIdx.x * 2 + i];
    for (int i = 0; i < 4; ++i) total[i] = sum[threadIdx.x * 4 + i];
    mma_m16n8k16_bf16(total, left, right);
    for (int i = 0; i < 4; ++i) sum[threadIdx.x * 4 + i] = total[i];
}

// Sum and largest of each block's values.
extern "C" __global__ void __launch_bounds__(1024) test_reductions(const float* values, float* sums, float* largest) {
    __shared__ float partial[WARP];
    const float value = values[blockIdx.x * blockDim.x + threadIdx.x];
    const float sum = block_sum(value, partial), most = block_max(value, partial);
    sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    largest[blockIdx.x * blockDim.x + threadIdx.x] = most;
}

// Copies each block's 16-byte pieces through shared memory; pieces from `count` on become zeros.
extern "C" __global__ void __launch_bounds__(64) test_cp_async(const float* from, float* to, int count) {
    float* tile = dynamic_shared<float>();
    const int piece = blockIdx.x * blockDim.x + threadIdx.x;
    cp_async_16_or_zero(tile + 4 * threadIdx.x, from + 4 * min(piece, count - 1), piece < count);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int other = blockDim.x - 1 - threadIdx.x;
    store_pack(to + 4 * (blockIdx.x * blockDim.x + other), load_pack(tile + 4 * other));
}

// votes[lane]: the ballot of even values, their number, the sum of all, the value of the lane three below.
extern "C" __global__ void __launch_bounds__(32) test_collectives(const int* values, int* results) {
    const int value = values[threadIdx.x];
    results[threadIdx.x * 4] = int(__ballot_sync(ALL_LANES, value % 2 == 0));
    results[threadIdx.x * 4 + 1] = __syncthreads_count(value % 2 == 0);
    results[threadIdx.x * 4 + 2] = __reduce_add_sync(ALL_LANES, value);
    results[threadIdx.x * 4 + 3] = __shfl_up_sync(ALL_LANES, value, 3);
}

extern "C" __global__ void __launch_bounds__(256, 2) test_add(const float* x, float* y, int count, float times) {
    const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) y[at] = fmaf(times, x[at], y[at]);
}
