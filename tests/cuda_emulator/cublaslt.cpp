// The part of cuBLASLt that the program uses, on the emulated device: matrices of columns, sums of f32.
//
// Sums are cut into pieces whose length depends on the number of columns of the result, as the vendor's tiles do: the same
// product has the same bits every time, and a column other bits in a wider matrix.

#include "driver.h"
#include <cstdint>
#include <cstring>
#include <new>

namespace {

// The library's numbers.
enum Status { SUCCESS = 0, NOT_INITIALISED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
constexpr int COMPUTE_32F = 68, R_32F = 0, R_16BF = 14;
constexpr int DESC_TRANSA = 3, DESC_TRANSB = 4;
constexpr int PREF_WORKSPACE = 1, PREF_REDUCTION = 3, PREF_ALIGNMENT_A = 5, PREF_ALIGNMENT_D = 8;

struct Operation {
    int compute, scale;
    int32_t turn_a = 0, turn_b = 0;
};

struct Matrix {
    int type;
    uint64_t rows, columns;
    int64_t stride;

    bool is_sound() const { return (type == R_32F || type == R_16BF) && rows > 0 && columns > 0 && stride >= int64_t(rows); }
    size_t bytes() const { return type == R_32F ? 4 : 2; }
    float at(const void* data, uint64_t row, uint64_t column) const {
        const size_t place = column * stride + row;
        if (type == R_32F) return static_cast<const float*>(data)[place];
        const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[place]) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    void put(void* data, uint64_t row, uint64_t column, float value) const {
        const size_t place = column * stride + row;
        if (type == R_32F) {
            static_cast<float*>(data)[place] = value;
            return;
        }
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const bool nan = value != value;
        static_cast<uint16_t*>(data)[place] = nan ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = 7, alignments[4] = {256, 256, 256, 256};
};

struct Algorithm {
    uint64_t data[8];
};
constexpr uint64_t KNOWN = 0x656d756c61746564; // what this library's only algorithm looks like

struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

struct Product {
    Operation operation;
    Matrix a, b, d;
    const void *from_a, *from_b;
    void* to;
    float alpha, beta;

    uint64_t inner() const { return operation.turn_a ? a.rows : a.columns; }
    bool fits() const {
        const uint64_t rows = operation.turn_a ? a.columns : a.rows, columns = operation.turn_b ? b.rows : b.columns;
        const uint64_t inner_b = operation.turn_b ? b.columns : b.rows;
        return rows == d.rows && columns == d.columns && inner() == inner_b;
    }
    float sum(uint64_t row, uint64_t column) const {
        const uint64_t piece = d.columns < 64 ? 16 : 32;
        float whole = 0.0f;
        for (uint64_t start = 0; start < inner(); start += piece) {
            float part = 0.0f;
            for (uint64_t k = start; k < inner() && k < start + piece; ++k) {
                const float left = operation.turn_a ? a.at(from_a, k, row) : a.at(from_a, row, k);
                const float right = operation.turn_b ? b.at(from_b, column, k) : b.at(from_b, k, column);
                part += left * right;
            }
            whole += part;
        }
        return whole;
    }
    void carry_out() const {
        for (uint64_t column = 0; column < d.columns; ++column) {
            for (uint64_t row = 0; row < d.rows; ++row) {
                const float before = beta == 0.0f ? 0.0f : beta * d.at(to, row, column);
                d.put(to, row, column, alpha * sum(row, column) + before);
            }
        }
    }
};

template <typename T, typename... Arguments> int create(T** handle, Arguments... arguments) {
    *handle = new (std::nothrow) T{arguments...};
    return *handle == nullptr ? NOT_INITIALISED : SUCCESS;
}

template <typename T> int destroy(T* handle) {
    delete handle;
    return SUCCESS;
}

bool aligned(const void* pointer, uint32_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

} // namespace

extern "C" {

VISIBLE int cublasLtCreate(int** handle) { return create(handle, 1); }
VISIBLE int cublasLtDestroy(int* handle) { return destroy(handle); }

VISIBLE int cublasLtMatmulDescCreate(Operation** operation, int compute, int scale) {
    if (compute != COMPUTE_32F || scale != R_32F) return NOT_SUPPORTED;
    return create(operation, compute, scale);
}
VISIBLE int cublasLtMatmulDescDestroy(Operation* operation) { return destroy(operation); }
VISIBLE int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value, size_t bytes) {
    if (bytes != sizeof(int32_t) || (attribute != DESC_TRANSA && attribute != DESC_TRANSB)) return INVALID_VALUE;
    memcpy(attribute == DESC_TRANSA ? &operation->turn_a : &operation->turn_b, value, bytes);
    return SUCCESS;
}

VISIBLE int cublasLtMatrixLayoutCreate(Matrix** matrix, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return create(matrix, type, rows, columns, stride);
}
VISIBLE int cublasLtMatrixLayoutDestroy(Matrix* matrix) { return destroy(matrix); }

VISIBLE int cublasLtMatmulPreferenceCreate(Preference** preference) { return create(preference); }
VISIBLE int cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroy(preference); }
VISIBLE int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (attribute == PREF_WORKSPACE && bytes == sizeof(uint64_t)) {
        memcpy(&preference->workspace, value, bytes);
    } else if (attribute == PREF_REDUCTION && bytes == sizeof(uint32_t)) {
        memcpy(&preference->reductions, value, bytes);
    } else if (attribute >= PREF_ALIGNMENT_A && attribute <= PREF_ALIGNMENT_D && bytes == sizeof(uint32_t)) {
        memcpy(&preference->alignments[attribute - PREF_ALIGNMENT_A], value, bytes);
    } else {
        return INVALID_VALUE;
    }
    return SUCCESS;
}

// As the vendor's library, which has no algorithm for rows of bf16 that do not begin at multiples of 16 bytes. With sums
// split among blocks allowed there would be others, that do not repeat.
VISIBLE int cublasLtMatmulAlgoGetHeuristic(int* handle, Operation* operation, Matrix* a, Matrix* b, Matrix* c, Matrix* d,
                                            Preference* preference, int wanted, Found* found, int* count) {
    *count = 0;
    if (handle == nullptr || wanted < 1 || !a->is_sound() || !b->is_sound() || !c->is_sound()) return INVALID_VALUE;
    if (!Product{*operation, *a, *b, *d, nullptr, nullptr, nullptr, 1.0f, 0.0f}.fits()) return INVALID_VALUE;
    if (preference->reductions != 0) return NOT_SUPPORTED;
    const Matrix* matrices[] = {a, b, c, d};
    for (int at = 0; at < 4; ++at) {
        const bool narrow = matrices[at]->type == R_16BF;
        const bool whole = preference->alignments[at] >= 16 && matrices[at]->stride * matrices[at]->bytes() % 16 == 0;
        if (narrow && !whole) return NOT_SUPPORTED;
        if (preference->alignments[at] < matrices[at]->bytes()) return INVALID_VALUE;
    }
    *found = {};
    for (int at = 0; at < 4; ++at) found->algorithm.data[at] = preference->alignments[at];
    found->algorithm.data[7] = KNOWN;
    *count = 1;
    return SUCCESS;
}

VISIBLE int cublasLtMatmul(int* handle, Operation* operation, const float* alpha, const void* from_a, Matrix* a,
                            const void* from_b, Matrix* b, const float* beta, const void* from_c, Matrix* c, void* to,
                            Matrix* d, const Algorithm* algorithm, void*, size_t, CUstream stream) {
    const Product product{*operation, *a, *b, *d, from_a, from_b, to, *alpha, *beta};
    if (handle == nullptr || algorithm->data[7] != KNOWN || from_c != to || c != d || !product.fits()) return INVALID_VALUE;
    const void* pointers[] = {from_a, from_b, from_c, to};
    for (int at = 0; at < 4; ++at) {
        if (!aligned(pointers[at], uint32_t(algorithm->data[at]))) return INVALID_VALUE;
    }
    const CUresult result = emulated_perform(stream, [product] {
        product.carry_out();
        return CUDA_SUCCESS;
    });
    return result == CUDA_SUCCESS ? SUCCESS : EXECUTION_FAILED;
}
}
