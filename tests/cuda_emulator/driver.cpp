// A libcuda.so of the part of the driver that rpt calls: one device named "emulated" on the host's processor. Streams
// do their work at once, in order, but those of the least priority as late as they may: when somebody waits for it. So
// work that should wait for theirs and does not is too early. It is stricter than the driver: whatever that leaves
// undefined is an error here.
//
// Read from the environment when it is first asked:
//   RPT_EMULATED_NO_DEVICE       any value: there is no device
//   RPT_EMULATED_DRIVER_VERSION  the version it claims, 13000
#include "driver.h"
#include "memory.h"
#include "runtime.h"

#include <chrono>
#include <cstdlib>
#include <cuda.h>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr int LEAST_PRIORITY = 0;
constexpr int SHARED_WITHOUT_CONSENT = 48 << 10;
constexpr int SHARED_WITH_CONSENT = 227 << 10;

struct Stream {
    CUresult failed = CUDA_SUCCESS; // a kernel's failure is every later call's, as on a GPU
    bool capturing = false, spoilt = false;
    std::vector<std::function<CUresult()>> recorded;
    bool late = false;
    std::deque<std::function<CUresult()>> behind; // what a late stream has not done yet
};

struct Graph {
    std::vector<std::function<CUresult()>> nodes;
};

struct Event {
    bool recorded = false;
    Stream* awaited = nullptr; // the late stream that has not come to it yet
    std::chrono::steady_clock::time_point time;
};

struct Function {
    const emulated::KernelEntry* kernel;
    int dynamic_limit = SHARED_WITHOUT_CONSENT;
};

struct Module {
    std::map<std::string, Function> functions;
};

struct Driver {
    std::mutex lock;
    bool initialised = false;
    std::set<void*> pinned, streams, graphs, executables, events, modules;
};

Driver& driver() {
    static auto* only = new Driver; // outlives every other static object
    return *only;
}

thread_local bool context_is_current = false;
thread_local int allocations_until_failure = 0, allocations_to_fail = 1, launches_until_failure = 0, late_work = 0;
char primary_context;

int claimed_version() {
    const char* value = getenv("RPT_EMULATED_DRIVER_VERSION");
    return value == nullptr ? 13000 : atoi(value);
}

int devices() { return getenv("RPT_EMULATED_NO_DEVICE") == nullptr ? 1 : 0; }

// Is this the call that was told to fail?
bool its_turn(int& remaining) { return remaining > 0 && --remaining == 0; }

bool allocation_fails() {
    if (!its_turn(allocations_until_failure)) return false;
    if (--allocations_to_fail > 0) allocations_until_failure = 1;
    return true;
}

#define NEEDS_CONTEXT                                                                                                    \
    if (!context_is_current) return complain(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread")
#define NEEDS_STREAM(handle)                                                                                             \
    NEEDS_CONTEXT;                                                                                                       \
    Stream* stream = stream_of(handle);                                                                                  \
    if (stream == nullptr) return complain(CUDA_ERROR_INVALID_HANDLE, "not a stream");                                   \
    if (stream->failed != CUDA_SUCCESS) return stream->failed

template <typename T> T* checked(std::set<void*>& living, void* handle) {
    std::lock_guard guard(driver().lock);
    return living.count(handle) != 0 ? static_cast<T*>(handle) : nullptr;
}

Stream* stream_of(CUstream handle) { return checked<Stream>(driver().streams, handle); }

template <typename T> T* created(std::set<void*>& living) {
    std::lock_guard guard(driver().lock);
    auto* object = new T;
    living.insert(object);
    return object;
}

template <typename T> CUresult destroyed(std::set<void*>& living, void* handle) {
    std::lock_guard guard(driver().lock);
    if (living.erase(handle) == 0) return complain(CUDA_ERROR_INVALID_HANDLE, "destroys what does not exist");
    delete static_cast<T*>(handle);
    return CUDA_SUCCESS;
}

// Does it now, or when a late stream must, or when the graph under capture is launched.
CUresult perform(Stream& stream, std::function<CUresult()> work) {
    if (stream.capturing) {
        stream.recorded.push_back(std::move(work));
        return CUDA_SUCCESS;
    }
    if (stream.late) {
        stream.behind.push_back(std::move(work));
        return CUDA_SUCCESS;
    }
    return stream.failed = work();
}

// Has a stream do what was asked of it, up to an event if one is given.
CUresult catch_up(Stream& stream, const Event* until = nullptr) {
    while (!stream.behind.empty() && stream.failed == CUDA_SUCCESS && (until == nullptr || until->awaited == &stream)) {
        const auto work = std::move(stream.behind.front());
        stream.behind.pop_front();
        stream.failed = work();
        ++late_work;
    }
    return stream.failed;
}

// --------------------------------------------------------------------------------------------------------- launches

CUresult code_of(emulated::Outcome outcome) {
    switch (outcome) {
    case emulated::Outcome::Finished: return CUDA_SUCCESS;
    case emulated::Outcome::Misbehaved: return CUDA_ERROR_LAUNCH_FAILED;
    case emulated::Outcome::IllegalAddress: return CUDA_ERROR_ILLEGAL_ADDRESS;
    case emulated::Outcome::MisalignedAddress: return CUDA_ERROR_MISALIGNED_ADDRESS;
    }
    return CUDA_ERROR_UNKNOWN;
}

struct Launch {
    const emulated::KernelEntry* kernel;
    dim3 grid, block;
    unsigned shared_bytes;
    std::vector<std::vector<unsigned char>> parameters;

    CUresult carry_out() const {
        std::vector<const unsigned char*> pointers;
        for (const auto& parameter : parameters) pointers.push_back(parameter.data());
        if (its_turn(launches_until_failure)) return CUDA_ERROR_LAUNCH_FAILED;
        const CUresult code = code_of(emulated::run(*kernel, grid, block, shared_bytes, pointers.data()));
        if (code != CUDA_SUCCESS || memory::all_intact()) return code;
        fprintf(stderr, "emulated CUDA: kernel %s wrote just outside of an allocation\n", kernel->name);
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
};

const char* wrong_shape(const Function& function, dim3 grid, dim3 block, unsigned shared_bytes) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || uint64_t(grid.x) * grid.y * grid.z == 0) return "a launch of nothing";
    if (threads > function.kernel->thread_limit || block.z > 64) return "more threads in a block than its kernel allows";
    if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return "too large a grid";
    if (shared_bytes > unsigned(function.dynamic_limit)) return "more dynamic shared memory than was consented to";
    return nullptr;
}

} // namespace

// -------------------------------------------------------------------------------- what tests tell it, on their thread

// The n-th of this thread's allocations (launches) from now on fails; 0: none does.
EXPORTED void emulated_fail_allocation(int nth) { allocations_until_failure = nth, allocations_to_fail = 1; }
// The same, and so does the one that follows, with which a caller tries once more after giving memory back.
EXPORTED void emulated_refuse_allocation(int nth) { allocations_until_failure = nth, allocations_to_fail = 2; }
EXPORTED void emulated_fail_launch(int nth) { launches_until_failure = nth; }
// What late streams have done.
EXPORTED int emulated_late_work() { return late_work; }

// ------------------------------------------------------------------------------------------------ device and context

EXPORTED CUresult cuInit(unsigned) {
    driver().initialised = true;
    return devices() > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORTED CUresult cuDriverGetVersion(int* version) {
    *version = claimed_version();
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetCount(int* count) {
    if (!driver().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *count = devices();
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    if (!driver().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *device = ordinal;
    return ordinal >= 0 && ordinal < devices() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORTED CUresult cuDeviceGetName(char* name, int bytes, CUdevice) {
    snprintf(name, size_t(bytes), "emulated");
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) {
    *bytes = memory::limit();
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    static const std::map<int, int> values{
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 4},
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, SHARED_WITHOUT_CONSENT},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, SHARED_WITH_CONSENT},
        {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1},
        {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 50 << 20},
    };
    const auto found = values.find(attribute);
    if (found == values.end()) return complain(CUDA_ERROR_INVALID_VALUE, "an attribute that it does not know");
    *value = found->second;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = reinterpret_cast<CUcontext>(&primary_context);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

EXPORTED CUresult cuCtxSetCurrent(CUcontext context) {
    context_is_current = context == reinterpret_cast<CUcontext>(&primary_context);
    return context == nullptr || context_is_current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

// -------------------------------------------------------------------------------------------- streams, events, graphs

EXPORTED CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    NEEDS_CONTEXT;
    *least = LEAST_PRIORITY;
    *greatest = LEAST_PRIORITY - 1;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned, int priority) {
    NEEDS_CONTEXT;
    auto* made = created<Stream>(driver().streams);
    made->late = priority >= LEAST_PRIORITY;
    *stream = reinterpret_cast<CUstream>(made);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamDestroy(CUstream stream) { return destroyed<Stream>(driver().streams, stream); }

EXPORTED CUresult cuStreamSynchronize(CUstream handle) {
    NEEDS_STREAM(handle);
    if (!stream->capturing) return catch_up(*stream);
    stream->spoilt = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

EXPORTED CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode) {
    NEEDS_STREAM(handle);
    if (stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capturing = true;
    stream->spoilt = false;
    stream->recorded.clear();
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    NEEDS_STREAM(handle);
    *graph = nullptr;
    if (!stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capturing = false;
    if (stream->spoilt) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    auto* made = created<Graph>(driver().graphs);
    made->nodes = std::move(stream->recorded);
    *graph = reinterpret_cast<CUgraph>(made);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph handle, unsigned long long) {
    NEEDS_CONTEXT;
    const auto* graph = checked<Graph>(driver().graphs, handle);
    if (graph == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    auto* made = created<Graph>(driver().executables);
    made->nodes = graph->nodes;
    *executable = reinterpret_cast<CUgraphExec>(made);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuGraphDestroy(CUgraph graph) { return destroyed<Graph>(driver().graphs, graph); }
EXPORTED CUresult cuGraphExecDestroy(CUgraphExec graph) { return destroyed<Graph>(driver().executables, graph); }

EXPORTED CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    NEEDS_STREAM(handle);
    const auto* graph = checked<Graph>(driver().executables, executable);
    if (graph == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return complain(CUDA_ERROR_NOT_SUPPORTED, "a graph within a graph");
    for (const auto& node : graph->nodes) {
        if (const CUresult result = perform(*stream, node); result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventCreate(CUevent* event, unsigned) {
    NEEDS_CONTEXT;
    *event = reinterpret_cast<CUevent>(created<Event>(driver().events));
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventDestroy(CUevent handle) {
    const auto* event = checked<Event>(driver().events, handle);
    if (event != nullptr && event->awaited != nullptr) catch_up(*event->awaited, event);
    return destroyed<Event>(driver().events, handle);
}

EXPORTED CUresult cuEventRecord(CUevent handle, CUstream on) {
    NEEDS_STREAM(on);
    auto* event = checked<Event>(driver().events, handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (event->awaited != nullptr) catch_up(*event->awaited, event);
    if (stream->late) event->awaited = stream;
    return perform(*stream, [event] {
        event->time = std::chrono::steady_clock::now();
        event->recorded = true;
        event->awaited = nullptr;
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuEventSynchronize(CUevent handle) {
    NEEDS_CONTEXT;
    const auto* event = checked<Event>(driver().events, handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    return event->awaited == nullptr ? CUDA_SUCCESS : catch_up(*event->awaited, event);
}

EXPORTED CUresult cuStreamWaitEvent(CUstream on, CUevent handle, unsigned) {
    NEEDS_STREAM(on);
    const auto* event = checked<Event>(driver().events, handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return complain(CUDA_ERROR_NOT_SUPPORTED, "a wait within a graph");
    if (event->awaited == nullptr || event->awaited == stream) return CUDA_SUCCESS;
    return stream->failed = catch_up(*event->awaited, event);
}

EXPORTED CUresult cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    const auto *first = checked<Event>(driver().events, from), *last = checked<Event>(driver().events, to);
    if (first == nullptr || last == nullptr || !first->recorded || !last->recorded) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------- memory

EXPORTED CUresult cuMemGetInfo(size_t* available, size_t* total) {
    NEEDS_CONTEXT;
    *total = memory::limit();
    *available = memory::limit() - memory::used();
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, CUstream handle) {
    NEEDS_STREAM(handle);
    if (stream->capturing) return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "an allocation within a graph");
    if (allocation_fails()) return CUDA_ERROR_OUT_OF_MEMORY;
    return memory::allocate(pointer, bytes);
}

EXPORTED CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
    NEEDS_CONTEXT;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "a release within a graph");
    if (!stream->late) return memory::release(pointer);
    stream->behind.push_back([pointer] { return memory::release(pointer); });
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) {
    *pool = reinterpret_cast<CUmemoryPool>(&primary_context);
    return CUDA_SUCCESS;
}
EXPORTED CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) { return CUDA_SUCCESS; }
EXPORTED CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute, void* value) {
    memset(value, 0, sizeof(cuuint64_t));
    return CUDA_SUCCESS;
}
EXPORTED CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }

EXPORTED CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    NEEDS_CONTEXT;
    if (allocation_fails()) return CUDA_ERROR_OUT_OF_MEMORY;
    *pointer = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (*pointer == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    std::lock_guard guard(driver().lock);
    driver().pinned.insert(*pointer);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemFreeHost(void* pointer) {
    std::lock_guard guard(driver().lock);
    if (driver().pinned.erase(pointer) == 0) return complain(CUDA_ERROR_INVALID_VALUE, "frees what is not pinned");
    free(pointer);
    return CUDA_SUCCESS;
}

static bool is_pinned(const void* pointer) {
    std::lock_guard guard(driver().lock);
    return driver().pinned.count(const_cast<void*>(pointer)) != 0;
}

// Plain memory of the host is read before the call returns, and written by then.
static CUresult copy(CUstream handle, void* to, const void* from, size_t bytes, bool to_device, bool from_device) {
    NEEDS_STREAM(handle);
    const bool right_to = memory::holds(reinterpret_cast<CUdeviceptr>(to), bytes) == to_device;
    const bool right_from = memory::holds(reinterpret_cast<CUdeviceptr>(from), bytes) == from_device;
    if (!right_to || !right_from) return complain(CUDA_ERROR_INVALID_VALUE, "a copy outside of any allocation");
    if (stream->late && !to_device && !is_pinned(to)) {
        if (const CUresult result = catch_up(*stream); result != CUDA_SUCCESS) return result;
        memmove(to, from, bytes);
        return CUDA_SUCCESS;
    }
    if (stream->late && !from_device && !is_pinned(from)) {
        const auto* first = static_cast<const unsigned char*>(from);
        return perform(*stream, [to, bytes = std::vector<unsigned char>(first, first + bytes)] {
            memcpy(to, bytes.data(), bytes.size());
            return CUDA_SUCCESS;
        });
    }
    return perform(*stream, [=] {
        memmove(to, from, bytes);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return copy(stream, reinterpret_cast<void*>(to), from, bytes, true, false);
}
EXPORTED CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(stream, to, reinterpret_cast<const void*>(from), bytes, false, true);
}
EXPORTED CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(stream, reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, true, true);
}

EXPORTED CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream handle) {
    NEEDS_STREAM(handle);
    if (!memory::holds(to, bytes)) return complain(CUDA_ERROR_INVALID_VALUE, "fills outside of any allocation");
    return perform(*stream, [=] {
        memset(reinterpret_cast<void*>(to), value, bytes);
        return CUDA_SUCCESS;
    });
}

// --------------------------------------------------------------------------------------------- modules and launches

EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    NEEDS_CONTEXT;
    uint32_t magic = 0;
    memcpy(&magic, image, sizeof magic);
    if (magic != 0xba55ed50u) return complain(CUDA_ERROR_INVALID_IMAGE, "the image is not a fat binary");
    *module = reinterpret_cast<CUmodule>(created<Module>(driver().modules));
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuModuleUnload(CUmodule module) { return destroyed<Module>(driver().modules, module); }

EXPORTED CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    NEEDS_CONTEXT;
    auto* module = checked<Module>(driver().modules, handle);
    const emulated::KernelEntry* kernel = emulated::find_kernel(name);
    if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (kernel == nullptr) return CUDA_ERROR_NOT_FOUND;
    std::lock_guard guard(driver().lock);
    *function = reinterpret_cast<CUfunction>(&module->functions.try_emplace(name, Function{kernel}).first->second);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuFuncLoad(CUfunction) { return context_is_current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }

EXPORTED CUresult cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* bytes) {
    const auto* kernel = reinterpret_cast<Function*>(handle)->kernel;
    if (index >= kernel->parameter_count) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0;
    *bytes = kernel->parameter_sizes[index];
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    const auto* function = reinterpret_cast<Function*>(handle);
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = int(function->kernel->thread_limit); return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; return CUDA_SUCCESS;
    default: return complain(CUDA_ERROR_INVALID_VALUE, "a function's attribute that it does not know");
    }
}

EXPORTED CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > SHARED_WITH_CONSENT) {
        return complain(CUDA_ERROR_INVALID_VALUE, "a function's attribute that cannot be so");
    }
    reinterpret_cast<Function*>(handle)->dynamic_limit = value;
    return CUDA_SUCCESS;
}

VISIBLE CUresult emulated_perform(CUstream on, std::function<CUresult()> work) {
    NEEDS_STREAM(on);
    return perform(*stream, [work = std::move(work)] {
        const CUresult result = work();
        return result != CUDA_SUCCESS || memory::all_intact() ? result : CUDA_ERROR_ILLEGAL_ADDRESS;
    });
}

EXPORTED CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream on, void** parameters,
                                 void** extra) {
    NEEDS_STREAM(on);
    const auto& function = *reinterpret_cast<Function*>(handle);
    Launch launch{function.kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, {}};
    if (const char* wrong = wrong_shape(function, launch.grid, launch.block, shared_bytes)) {
        return complain(CUDA_ERROR_INVALID_VALUE, wrong);
    }
    if (extra != nullptr) return complain(CUDA_ERROR_NOT_SUPPORTED, "launch options");
    for (size_t at = 0; at < function.kernel->parameter_count; ++at) {
        const auto* bytes = static_cast<const unsigned char*>(parameters[at]);
        launch.parameters.emplace_back(bytes, bytes + function.kernel->parameter_sizes[at]);
    }
    return perform(*stream, [launch = std::move(launch)] { return launch.carry_out(); });
}

// ----------------------------------------------------------------------------------------------------------- errors

static const std::map<int, std::pair<const char*, const char*>>& errors() {
    static const std::map<int, std::pair<const char*, const char*>> all{
        {CUDA_ERROR_INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
        {CUDA_ERROR_OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
        {CUDA_ERROR_NO_DEVICE, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
        {CUDA_ERROR_INVALID_IMAGE, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
        {CUDA_ERROR_NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
        {CUDA_ERROR_ILLEGAL_ADDRESS, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
        {CUDA_ERROR_MISALIGNED_ADDRESS, {"CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"}},
        {CUDA_ERROR_LAUNCH_FAILED, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    };
    return all;
}

EXPORTED CUresult cuGetErrorName(CUresult error, const char** name) {
    const auto found = errors().find(error);
    *name = found == errors().end() ? "CUDA_ERROR" : found->second.first;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuGetErrorString(CUresult error, const char** text) {
    const auto found = errors().find(error);
    *text = found == errors().end() ? "see the driver's documentation" : found->second.second;
    return CUDA_SUCCESS;
}
