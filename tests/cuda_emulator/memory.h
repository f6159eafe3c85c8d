// The emulated device's memory.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cuda.h>

namespace memory {

// Bytes of the device: 4 GiB, or what RPT_EMULATED_MEMORY says.
size_t limit();
size_t used();

CUresult allocate(CUdeviceptr* pointer, size_t bytes);
CUresult release(CUdeviceptr pointer);

// Whether these bytes lie in one allocation.
bool holds(CUdeviceptr start, size_t bytes);

// Whether nothing was written just before or behind any allocation.
bool all_intact();

} // namespace memory

// An error, with words for who reads the test's output.
inline CUresult complain(CUresult code, const char* message) {
    fprintf(stderr, "emulated CUDA: %s\n", message);
    return code;
}
