// Rows of the embedding, and sums of rows into the rows of a table: gradients of the embedding, and of a residual stream
// some of whose rows several targets share.
#include "rows.cuh"

constexpr int GATHER_THREADS = 256;
constexpr int SCATTER_THREADS = 128;
constexpr int WIDTH = 4;
// Rows that a thread has under way at once.
constexpr int AHEAD = 8;

template <typename T>
__device__ __forceinline__ void embedding_gather(const T* __restrict__ table, const unsigned* __restrict__ ids,
                                                 float* __restrict__ out, int columns) {
    const size_t row = blockIdx.x;
    const int at = (blockIdx.y * GATHER_THREADS + threadIdx.x) * WIDTH;
    const bool whole = whole_vectors<WIDTH>(columns, columns, table) && whole_vectors<WIDTH>(columns, columns, out);
    if (at >= columns) return;
    store(out + row * columns, at, columns, whole, load<WIDTH>(table + size_t(ids[row]) * columns, at, columns, whole));
}

// out[r] = table[ids[r]], widened.
// Launch: grid (rows, ceil(columns / 1024)), block (256).
#define EMBEDDING_GATHER(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                                                         \
        NAME(const T* table, const unsigned* ids, float* out, int columns) {                                             \
        embedding_gather(table, ids, out, columns);                                                                      \
    }
EMBEDDING_GATHER(embedding_gather_f32, float)
EMBEDDING_GATHER(embedding_gather_bf16, bf16)

// table[run_targets[b]] += rows[order[i]] for i in run_starts[b]..run_starts[b + 1], in this order, run b by one block.
// The runs' targets must be different from each other. run_starts has one entry more than there are runs.
// Launch: grid (runs, ceil(columns / 512)), block (128).
extern "C" __global__ void __launch_bounds__(SCATTER_THREADS)
    add_rows_by_run(const float* __restrict__ rows, const int* __restrict__ order, const int* __restrict__ run_starts,
                    const unsigned* __restrict__ run_targets, float* __restrict__ table, int columns) {
    const int at = (blockIdx.y * SCATTER_THREADS + threadIdx.x) * WIDTH;
    const bool whole = whole_vectors<WIDTH>(columns, columns, rows, table);
    if (at >= columns) return;
    const int end = run_starts[blockIdx.x + 1];
    float* target = table + size_t(run_targets[blockIdx.x]) * columns;
    auto sums = load<WIDTH>(target, at, columns, whole);
    for (int first = run_starts[blockIdx.x]; first < end; first += AHEAD) {
        Values<WIDTH> ahead[AHEAD];
#pragma unroll
        for (int r = 0; r < AHEAD; ++r) {
            if (first + r < end) ahead[r] = load<WIDTH>(rows + size_t(order[first + r]) * columns, at, columns, whole);
        }
#pragma unroll
        for (int r = 0; r < AHEAD; ++r) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                if (first + r < end) sums.at[i] += ahead[r].at[i];
            }
        }
    }
    store(target, at, columns, whole, sums);
}
