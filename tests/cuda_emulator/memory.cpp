// The emulated device's memory: every allocation lies between two pages that nobody may touch and ends where the second
// begins; the bytes that its rounding leaves over are checked after every launch.
#include "memory.h"
#include "runtime.h"

#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr unsigned char RED = 0xa5;
constexpr size_t RED_BYTES = 64;
// Of an allocation, as many bytes are not-a-number until they are written.
constexpr size_t FRESH_BYTES = 64 << 20;
// Released memory that is kept unreadable, so that late accesses are caught.
constexpr size_t KEPT = 1024;

struct Allocation {
    unsigned char* mapping;
    size_t mapped, bytes;
};

struct State {
    std::mutex lock;
    std::map<uintptr_t, Allocation> allocations;
    std::deque<Allocation> freed;
    size_t used = 0;
};

State& state() {
    static auto* only = new State; // outlives every other static object
    return *only;
}

bool is_red(const unsigned char* from, const unsigned char* to) {
    for (; from != to; ++from) {
        if (*from != RED) return false;
    }
    return true;
}

// Whether the bytes just before and behind the allocation are as they were.
bool is_intact(uintptr_t start, const Allocation& own) {
    const auto* data = reinterpret_cast<const unsigned char*>(start);
    const auto* first = own.mapping + sysconf(_SC_PAGESIZE);
    const auto* last = own.mapping + own.mapped - sysconf(_SC_PAGESIZE);
    const size_t before = size_t(data - first) < RED_BYTES ? size_t(data - first) : RED_BYTES;
    return is_red(data - before, data) && is_red(data + own.bytes, last);
}

} // namespace

size_t memory::limit() {
    static const size_t bytes = [] {
        const char* value = getenv("RPT_EMULATED_MEMORY");
        return value == nullptr ? size_t(4) << 30 : size_t(strtoull(value, nullptr, 10));
    }();
    return bytes;
}

size_t memory::used() {
    std::lock_guard guard(state().lock);
    return state().used;
}

bool memory::holds(CUdeviceptr start, size_t bytes) {
    std::lock_guard guard(state().lock);
    auto after = state().allocations.upper_bound(start);
    if (after == state().allocations.begin()) return false;
    --after;
    return start + bytes <= after->first + after->second.bytes;
}

CUresult memory::allocate(CUdeviceptr* pointer, size_t bytes) {
    if (bytes == 0) return complain(CUDA_ERROR_INVALID_VALUE, "an allocation of no bytes");
    std::lock_guard guard(state().lock);
    if (bytes > limit() || state().used + bytes > limit()) return CUDA_ERROR_OUT_OF_MEMORY;
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (bytes + 15) / 16 * 16;
    const size_t mapped = 2 * page + (rounded + page - 1) / page * page;
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    auto* start = static_cast<unsigned char*>(mapping);
    // It ends where the guard page begins; fresh memory is not zero but not-a-number.
    unsigned char* data = start + mapped - page - rounded;
    memset(start + page, RED, data - start - page);
    memset(data, 0xff, bytes < FRESH_BYTES ? bytes : FRESH_BYTES);
    memset(data + bytes, RED, rounded - bytes);
    mprotect(start, page, PROT_NONE);
    mprotect(start + mapped - page, page, PROT_NONE);
    state().allocations[reinterpret_cast<uintptr_t>(data)] = {start, mapped, bytes};
    state().used += bytes;
    *pointer = reinterpret_cast<uintptr_t>(data);
    return CUDA_SUCCESS;
}

CUresult memory::release(CUdeviceptr pointer) {
    std::lock_guard guard(state().lock);
    const auto found = state().allocations.find(pointer);
    if (found == state().allocations.end()) return complain(CUDA_ERROR_INVALID_VALUE, "frees what is not allocated");
    const Allocation own = found->second;
    state().allocations.erase(found);
    state().used -= own.bytes;
    madvise(own.mapping, own.mapped, MADV_DONTNEED);
    mprotect(own.mapping, own.mapped, PROT_NONE);
    state().freed.push_back(own);
    if (state().freed.size() > KEPT) {
        munmap(state().freed.front().mapping, state().freed.front().mapped);
        state().freed.pop_front();
    }
    return CUDA_SUCCESS;
}

bool memory::all_intact() {
    std::lock_guard guard(state().lock);
    for (const auto& [start, own] : state().allocations) {
        if (!is_intact(start, own)) return false;
    }
    return true;
}

std::string emulated::describe_address(std::uintptr_t address) {
    std::lock_guard guard(state().lock);
    char text[160];
    for (const auto& [start, own] : state().allocations) {
        const auto mapping = reinterpret_cast<uintptr_t>(own.mapping);
        if (address < mapping || address >= mapping + own.mapped) continue;
        const bool before = address < start;
        snprintf(text, sizeof text, "an address %zu bytes %s an allocation of %zu bytes",
                 size_t(before ? start - address : address - start - own.bytes), before ? "before" : "behind", own.bytes);
        return text;
    }
    for (const Allocation& own : state().freed) {
        const auto mapping = reinterpret_cast<uintptr_t>(own.mapping);
        if (address >= mapping && address < mapping + own.mapped) return "memory that was freed";
    }
    snprintf(text, sizeof text, "address %#zx, which is not device memory", size_t(address));
    return text;
}
