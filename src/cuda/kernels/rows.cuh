// Rows in vectors of neighbouring elements, widened to f32. Which thread takes which elements depends on the number of
// columns alone; addresses decide only whether a vector is one access or several, so results never depend on them.
#pragma once

#include "common.cuh"

template <int WIDTH> struct Values {
    float at[WIDTH];
};

template <int WIDTH, typename T> struct alignas(WIDTH * sizeof(T)) Vector {
    T at[WIDTH];
};

// Whether every vector of every row is whole and aligned, where rows begin `stride` elements apart.
template <int WIDTH, typename... T>
__device__ __forceinline__ bool whole_vectors(size_t columns, size_t stride, const T*... rows) {
    const bool aligned = ((reinterpret_cast<uintptr_t>(rows) % (WIDTH * sizeof(T)) == 0) && ...);
    return aligned && columns % WIDTH == 0 && stride % WIDTH == 0;
}

// Elements at, at + 1, ... of a row; zeros behind its end.
template <int WIDTH, typename T>
__device__ __forceinline__ Values<WIDTH> load(const T* row, int at, int columns, bool whole) {
    Values<WIDTH> values;
    if (whole) {
        const auto vector = *reinterpret_cast<const Vector<WIDTH, T>*>(row + at);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) values.at[i] = to_float(vector.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) values.at[i] = at + i < columns ? to_float(row[at + i]) : 0.0f;
    }
    return values;
}

template <int WIDTH, typename T>
__device__ __forceinline__ void store(T* row, int at, int columns, bool whole, const Values<WIDTH>& values) {
    if (whole) {
        Vector<WIDTH, T> vector;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) vector.at[i] = from_float<T>(values.at[i]);
        *reinterpret_cast<Vector<WIDTH, T>*>(row + at) = vector;
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (at + i < columns) row[at + i] = from_float<T>(values.at[i]);
        }
    }
}
