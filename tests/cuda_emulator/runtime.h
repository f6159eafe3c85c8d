// Between the emulated device (runtime.cpp), the emulated driver (driver.cpp) and the files of kernels.
#pragma once

#include "emulated_cuda.h"
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

namespace emulated {

// A kernel as the host sees it.
struct KernelEntry {
    const char* name;
    unsigned thread_limit; // from its launch bounds
    std::size_t parameter_count;
    const std::size_t* parameter_sizes;
    void (*call)(const unsigned char* const* parameters);
    const void* (*shared_anchor)(); // an address among the static shared memory of its file
};

__attribute__((visibility("default"))) void register_kernel(const KernelEntry& entry);
const KernelEntry* find_kernel(const std::string& name);

enum class Outcome { Finished, Misbehaved, IllegalAddress, MisalignedAddress };

// Says about an address whether and how it lies near device memory; driver.cpp knows.
std::string describe_address(std::uintptr_t address);

// Runs all blocks of a launch, one after the other, on the calling thread. A defect of the kernel is described on
// standard error.
Outcome run(const KernelEntry& kernel, dim3 grid, dim3 block, unsigned shared_bytes, const unsigned char* const* parameters);

template <typename... Parameters> struct Signature {
    static constexpr std::array<std::size_t, sizeof...(Parameters) + 1> sizes{sizeof(Parameters)..., 0};

    template <void (*KERNEL)(Parameters...)> static void call(const unsigned char* const* parameters) {
        [parameters]<std::size_t... I>(std::index_sequence<I...>) {
            KERNEL(*reinterpret_cast<const Parameters*>(parameters[I])...);
        }(std::index_sequence_for<Parameters...>{});
    }
};

template <auto KERNEL, typename... Parameters>
KernelEntry entry(const char* name, unsigned thread_limit, const void* (*anchor)(), void (*)(Parameters...)) {
    using Own = Signature<Parameters...>;
    return {name, thread_limit, sizeof...(Parameters), Own::sizes.data(), &Own::template call<KERNEL>, anchor};
}

// The first launch bound, or the device's limit.
constexpr unsigned thread_limit(unsigned threads = 1024, unsigned = 0, unsigned = 0) { return threads; }

} // namespace emulated
