// What a library of the vendor needs of the emulated driver.
#pragma once

#include <cuda.h>
#include <functional>

#define VISIBLE __attribute__((visibility("default")))

// Does some work in a stream's order: now, or whenever the graph under capture is launched.
VISIBLE CUresult emulated_perform(CUstream stream, std::function<CUresult()> work);
