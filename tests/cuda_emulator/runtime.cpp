// The emulated device: every thread of a block is a fiber on the calling host thread. A fiber runs until it waits for
// others, so what a barrier should have ordered is out of order where the barrier is missing; each block has an order
// of its own to make that visible. Blocks run one after the other.
#include "runtime.h"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <link.h>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

// ------------------------------------------------------------------------------------------------------- switching

#if defined(__x86_64__)
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, . - emulated_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void prepare(unsigned char* stack, std::size_t bytes, void (*entry)()) {
        // Six registers, then the address that `ret` takes, which must lie at a multiple of sixteen.
        auto* top = reinterpret_cast<void**>(stack + bytes - 32);
        top[0] = reinterpret_cast<void*>(entry);
        top[1] = nullptr;
        stack_pointer = top - 6;
    }
    void switch_to(Context& other) { emulated_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;

    void prepare(unsigned char* stack, std::size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

// --------------------------------------------------------------------------------------------------------- memory

constexpr std::size_t STACK_BYTES = 128 << 10;
constexpr std::size_t SHARED_BYTES = 256 << 10;

std::size_t page() {
    static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

struct Mapping {
    unsigned char* start;
    std::size_t bytes;

    explicit Mapping(std::size_t bytes) : bytes(bytes) {
        void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) abort();
        start = static_cast<unsigned char*>(mapped);
    }
    Mapping(const Mapping&) = delete;
    ~Mapping() { munmap(start, bytes); }
};

struct Copy {
    void* to;
    const void* from;
    bool copy;

    void carry_out() const {
        if (copy) {
            memcpy(to, from, 16);
        } else {
            memset(to, 0, 16);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------- threads

enum class State { Ready, AtBarrier, InWarp, Done };

struct Fiber {
    Context context;
    uint3 index;
    unsigned linear;
    State state;
    Site site;
    const char* waits_in;
    std::vector<std::vector<Copy>> groups; // of cp.async, oldest first; the last is open
};

struct Meeting {
    unsigned mask, arrived;
    const char* name;
    Site site;
    void* brought[32];
};

struct Block {
    const KernelEntry* kernel;
    const unsigned char* const* parameters;
    std::vector<Fiber> fibers;
    std::vector<std::vector<Meeting>> meetings; // of each warp
    Fiber* running = nullptr;
    unsigned at_barrier, votes, last_votes, done;
    Site barrier_site;
    bool copies_wait;
    unsigned char* shared;
};

// What a host thread needs to run launches; built once for each.
struct Machine {
    Mapping shared{SHARED_BYTES + 2 * page()};
    Mapping signal_stack{256 << 10};
    std::vector<std::unique_ptr<Mapping>> stacks;
    Context scheduler;
    Block block;
    Outcome outcome = Outcome::Finished;

    Machine() {
        mprotect(shared.start, page(), PROT_NONE);
        mprotect(shared.start + page() + SHARED_BYTES, page(), PROT_NONE);
    }
    unsigned char* stack(std::size_t fiber) {
        while (stacks.size() <= fiber) {
            stacks.push_back(std::make_unique<Mapping>(STACK_BYTES));
            mprotect(stacks.back()->start, page(), PROT_NONE);
        }
        return stacks[fiber]->start;
    }
};

Machine& machine() {
    static thread_local Machine own;
    return own;
}

thread_local Machine* active_machine = nullptr;

void describe(const char* format, va_list arguments) {
    const Machine& own = *active_machine;
    fprintf(stderr, "emulated CUDA: kernel %s, block (%u, %u, %u)", own.block.kernel->name, blockIdx.x, blockIdx.y, blockIdx.z);
    if (own.block.running != nullptr) {
        const uint3 index = own.block.running->index;
        fprintf(stderr, ", thread (%u, %u, %u)", index.x, index.y, index.z);
    }
    fputs(": ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
}

void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe(format, arguments);
    va_end(arguments);
}

void wait(State state) {
    Machine& own = *active_machine;
    Fiber& fiber = *own.block.running;
    fiber.state = state;
    fiber.context.switch_to(own.scheduler);
}

[[noreturn]] void end_launch(Outcome outcome) {
    active_machine->outcome = outcome;
    wait(State::Done);
    abort();
}

void fiber_main() {
    Block& block = active_machine->block;
    block.kernel->call(block.parameters);
    Fiber& fiber = *block.running;
    if (block.at_barrier > 0) {
        fail("returns while others wait in __syncthreads at %s:%d", block.barrier_site.file, block.barrier_site.line);
    }
    for (const auto& group : fiber.groups) {
        for (const Copy& copy : group) copy.carry_out();
    }
    ++block.done;
    wait(State::Done);
    abort();
}

// --------------------------------------------------------------------------------------------------------- signals

struct sigaction previous_segv, previous_bus, previous_ill;

void pass_on(int signal, siginfo_t* info, void* context) {
    const struct sigaction& previous = signal == SIGSEGV ? previous_segv : signal == SIGBUS ? previous_bus : previous_ill;
    if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
        previous.sa_sigaction(signal, info, context);
    } else {
        sigaction(signal, &previous, nullptr);
    }
}

const char* direction([[maybe_unused]] void* context) {
#if defined(__x86_64__)
    return (static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2) != 0 ? "writes to" : "reads";
#else
    return "touches";
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
    if (active_machine == nullptr || active_machine->block.running == nullptr) return pass_on(signal, info, context);
    Machine& own = *active_machine;
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    if (signal == SIGILL) {
        report("an index outside of an array, a misaligned pointer or a trap");
        end_launch(Outcome::Misbehaved);
    }
    const auto shared = reinterpret_cast<std::uintptr_t>(own.shared.start);
    const auto stack = reinterpret_cast<std::uintptr_t>(own.stack(own.block.running->linear));
    if (signal == SIGBUS || (address == 0 && info->si_code == SI_KERNEL)) {
        report("%s a misaligned address", direction(context));
        end_launch(Outcome::MisalignedAddress);
    }
    if (address >= shared && address < shared + own.shared.bytes) {
        report("%s an address outside of its dynamic shared memory", direction(context));
    } else if (address >= stack && address < stack + page()) {
        report("needs more than %zu bytes of stack", STACK_BYTES);
    } else {
        report("%s %s", direction(context), describe_address(address).c_str());
    }
    end_launch(Outcome::IllegalAddress);
}

void catch_signals() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &previous_segv);
        sigaction(SIGBUS, &action, &previous_bus);
        sigaction(SIGILL, &action, &previous_ill);
    });
}

// A stack for the handler that has room for printing, for as long as it lives.
struct SignalStack {
    stack_t previous = {};

    explicit SignalStack(Mapping& memory) {
        stack_t own = {};
        own.ss_sp = memory.start;
        own.ss_size = memory.bytes;
        sigaltstack(&own, &previous);
    }
    SignalStack(const SignalStack&) = delete;
    ~SignalStack() { sigaltstack(&previous, nullptr); }
};

// ------------------------------------------------------------------------------------------------------- scheduling

std::uint64_t mixed(std::uint64_t x) {
    x = (x ^ x >> 31) * 0x7fb5d329728ea185u;
    x = (x ^ x >> 27) * 0x81dadef4bc2dd44du;
    return x ^ x >> 33;
}

// The order in which a block's threads are offered the processor.
std::vector<unsigned> order(unsigned threads, std::uint64_t seed) {
    std::vector<unsigned> fibers(threads);
    std::iota(fibers.begin(), fibers.end(), 0u);
    switch (seed % 4) {
    case 0: break;
    case 1: std::reverse(fibers.begin(), fibers.end()); break;
    case 2:
        std::stable_sort(fibers.begin(), fibers.end(),
                         [seed](unsigned a, unsigned b) { return mixed(seed + a / 32) < mixed(seed + b / 32); });
        break;
    default:
        std::sort(fibers.begin(), fibers.end(), [seed](unsigned a, unsigned b) { return mixed(seed ^ a) < mixed(seed ^ b); });
    }
    return fibers;
}

void report_deadlock(Block& block) {
    block.running = nullptr;
    for (const Fiber& fiber : block.fibers) {
        if (fiber.state != State::InWarp) continue;
        block.running = const_cast<Fiber*>(&fiber);
        const auto& meetings = block.meetings[fiber.linear / 32];
        for (const Meeting& meeting : meetings) {
            if ((meeting.arrived >> fiber.linear % 32 & 1) == 0) continue;
            report("waits in %s at %s:%d for lanes %08x that do not come", meeting.name, meeting.site.file,
                   meeting.site.line, meeting.mask & ~meeting.arrived);
        }
        return;
    }
    report("waits for ever");
}

void prepare_block(Machine& own, unsigned threads, unsigned shared_bytes) {
    Block& block = own.block;
    block.fibers.resize(threads);
    block.meetings.assign((threads + 31) / 32, {});
    block.at_barrier = block.votes = block.last_votes = block.done = 0;
    // Ends where the guard page begins, so that one byte too far is caught.
    block.shared = own.shared.start + page() + SHARED_BYTES - (shared_bytes + 127) / 128 * 128;
    memset(block.shared, 0xff, own.shared.start + page() + SHARED_BYTES - block.shared);
    for (unsigned linear = 0; linear < threads; ++linear) {
        Fiber& fiber = block.fibers[linear];
        fiber.linear = linear;
        fiber.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
        fiber.state = State::Ready;
        fiber.groups.assign(1, {});
        fiber.context.prepare(own.stack(linear), STACK_BYTES, fiber_main);
    }
}

Outcome run_block(Machine& own, unsigned shared_bytes, std::uint64_t seed) {
    Block& block = own.block;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    prepare_block(own, threads, shared_bytes);
    block.copies_wait = seed >> 8 & 1;
    const std::vector<unsigned> fibers = order(threads, seed);
    while (block.done < threads) {
        bool progress = false;
        for (const unsigned linear : fibers) {
            Fiber& fiber = block.fibers[linear];
            if (fiber.state != State::Ready) continue;
            progress = true;
            block.running = &fiber;
            threadIdx = fiber.index;
            own.scheduler.switch_to(fiber.context);
            if (own.outcome != Outcome::Finished) return own.outcome;
        }
        if (!progress) {
            report_deadlock(block);
            return Outcome::Misbehaved;
        }
    }
    return Outcome::Finished;
}

// ----------------------------------------------------------------------------------------------- static shared memory

struct Segment {
    std::uintptr_t anchor_code;
    unsigned char* start = nullptr;
    std::size_t bytes = 0;
};

int find_segment(dl_phdr_info* info, std::size_t, void* found) {
    auto& segment = *static_cast<Segment*>(found);
    std::size_t bytes = 0;
    bool own = false;
    for (int at = 0; at < info->dlpi_phnum; ++at) {
        const auto& header = info->dlpi_phdr[at];
        const std::uintptr_t start = info->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_TLS) bytes = header.p_memsz;
        own |= header.p_type == PT_LOAD && segment.anchor_code >= start && segment.anchor_code < start + header.p_memsz;
    }
    if (!own) return 0;
    segment.start = static_cast<unsigned char*>(info->dlpi_tls_data);
    segment.bytes = bytes;
    return 1;
}

// The thread-local variables of a file of kernels: its __shared__ variables, and nothing else.
Segment static_shared(const KernelEntry& kernel) {
    kernel.shared_anchor();
    Segment segment{reinterpret_cast<std::uintptr_t>(kernel.shared_anchor)};
    dl_iterate_phdr(find_segment, &segment);
    return segment;
}

std::map<std::string, KernelEntry>& kernels() {
    static std::map<std::string, KernelEntry> all;
    return all;
}

} // namespace

// --------------------------------------------------------------------------------------------------- for the driver

void register_kernel(const KernelEntry& entry) {
    if (!kernels().emplace(entry.name, entry).second) {
        fprintf(stderr, "emulated CUDA: two kernels are named %s\n", entry.name);
        abort();
    }
}

const KernelEntry* find_kernel(const std::string& name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

Outcome run(const KernelEntry& kernel, dim3 grid, dim3 block, unsigned shared_bytes, const unsigned char* const* parameters) {
    Machine& own = machine();
    catch_signals();
    const SignalStack stack(own.signal_stack);
    own.block.kernel = &kernel;
    own.block.parameters = parameters;
    own.outcome = Outcome::Finished;
    blockDim = {block.x, block.y, block.z};
    gridDim = {grid.x, grid.y, grid.z};
    const Segment statics = static_shared(kernel);
    active_machine = &own;
    Outcome outcome = Outcome::Finished;
    const std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z;
    for (std::uint64_t linear = 0; linear < blocks && outcome == Outcome::Finished; ++linear) {
        blockIdx = {unsigned(linear % grid.x), unsigned(linear / grid.x % grid.y), unsigned(linear / grid.x / grid.y)};
        if (statics.start != nullptr) memset(statics.start, 0xff, statics.bytes);
        outcome = run_block(own, shared_bytes, mixed(linear + 1));
        own.block.running = nullptr;
    }
    active_machine = nullptr;
    return outcome;
}

// --------------------------------------------------------------------------------------------------- for the kernels

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe(format, arguments);
    va_end(arguments);
    end_launch(Outcome::Misbehaved);
}

unsigned lane() { return active_machine->block.running->linear % 32; }

unsigned char* dynamic_shared_bytes() { return active_machine->block.shared; }

int barrier(bool vote, Site site) {
    Block& block = active_machine->block;
    if (block.done > 0) fail("calls __syncthreads at %s:%d when another thread has returned", site.file, site.line);
    if (block.at_barrier == 0) block.barrier_site = site;
    if (site.line != block.barrier_site.line || strcmp(site.file, block.barrier_site.file) != 0) {
        fail("calls __syncthreads at %s:%d while others wait in another one, at %s:%d", site.file, site.line,
             block.barrier_site.file, block.barrier_site.line);
    }
    block.votes += vote;
    if (++block.at_barrier < block.fibers.size()) {
        wait(State::AtBarrier);
        return int(block.last_votes);
    }
    block.last_votes = block.votes;
    block.at_barrier = block.votes = 0;
    for (Fiber& fiber : block.fibers) fiber.state = State::Ready;
    return int(block.last_votes);
}

void meet(unsigned mask, const char* name, Site site, void* brought, Operation operation) {
    Block& block = active_machine->block;
    const unsigned linear = block.running->linear, own_bit = 1u << linear % 32, first = linear / 32 * 32;
    const unsigned present = unsigned(std::min<std::size_t>(block.fibers.size() - first, 32));
    const unsigned existing = present == 32 ? 0xffffffffu : (1u << present) - 1;
    if ((mask & ~existing) != 0) fail("%s at %s:%d names lanes %08x that do not exist", name, site.file, site.line, mask & ~existing);
    if ((mask & own_bit) == 0) fail("%s at %s:%d with mask %08x, which leaves out the caller", name, site.file, site.line, mask);
    for (unsigned lane = 0; lane < present; ++lane) {
        if ((mask >> lane & 1) != 0 && block.fibers[first + lane].state == State::Done) {
            fail("%s at %s:%d names lane %u, which has returned", name, site.file, site.line, lane);
        }
    }
    auto& meetings = block.meetings[linear / 32];
    auto meeting = std::find_if(meetings.begin(), meetings.end(), [mask](const Meeting& other) { return (other.mask & mask) != 0; });
    if (meeting == meetings.end()) meeting = meetings.insert(meetings.end(), Meeting{mask, 0, name, site, {}});
    if (meeting->mask != mask || strcmp(meeting->name, name) != 0 || meeting->site.line != site.line ||
        strcmp(meeting->site.file, site.file) != 0) {
        fail("%s at %s:%d with mask %08x meets %s at %s:%d with mask %08x", name, site.file, site.line, mask, meeting->name,
             meeting->site.file, meeting->site.line, meeting->mask);
    }
    meeting->brought[linear % 32] = brought;
    meeting->arrived |= own_bit;
    if (meeting->arrived != mask) return wait(State::InWarp);
    operation(meeting->brought, mask);
    meetings.erase(meeting);
    for (unsigned lane = 0; lane < present; ++lane) {
        if ((mask >> lane & 1) != 0) block.fibers[first + lane].state = State::Ready;
    }
}

void copy_later(void* to, const void* from, bool copy) {
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16 != 0) {
        fail("cp.async between addresses that are no multiples of 16");
    }
    const Copy asked{to, from, copy};
    if (active_machine->block.copies_wait) {
        active_machine->block.running->groups.back().push_back(asked);
    } else {
        asked.carry_out();
    }
}

void close_group() { active_machine->block.running->groups.emplace_back(); }

void wait_for_groups(int pending) {
    auto& groups = active_machine->block.running->groups;
    while (groups.size() > std::size_t(pending) + 1) {
        for (const Copy& copy : groups.front()) copy.carry_out();
        groups.erase(groups.begin());
    }
}

} // namespace emulated
