// Blocks over cores, threads of a block as fibres, barriers, cp.async, atomics.
#include <signal.h>
#include <sys/mman.h>
#ifdef __linux__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "runtime.h"

#if !defined(EMULATOR_UCONTEXT) && defined(__x86_64__)
__asm__(
    ".text\n.p2align 4\n.globl emulator_change\nemulator_change:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#elif !defined(EMULATOR_UCONTEXT) && defined(__aarch64__)
__asm__(
    ".text\n.p2align 4\n.globl emulator_change\nemulator_change:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#endif

namespace emulator {

thread_local Worker* worker EMULATOR_QUICK_TLS = nullptr;
thread_local char* own_stack EMULATOR_QUICK_TLS = nullptr;

namespace {

std::atomic<uint64_t> next_block;
std::mutex launching, reporting;
std::vector<std::unique_ptr<Worker>> workers;  // kept from launch to launch, for their stacks

// ---- fibres ----

// Leaves the block as it is, and ends the launch.
[[noreturn]] void stop(Worker& w) {
    w.failed = true;
    __atomic_store_n(&w.request->stop, 1, __ATOMIC_RELAXED);
    change(w.current->context, w.home);
    __builtin_unreachable();
}

// Gives the core to another fibre that can go on; if there is none, to the worker's loop.
void give_way(Worker& w) {
    Fibre& self = *w.current;
    Warp* warp = self.warp;
    if (!warp->ready) {
        if (!w.ready_warps) {
            change(self.context, w.home);
            return;
        }
        warp = &w.warps[__builtin_ctz(w.ready_warps)];
    }
    Fibre& next = warp->fibres[__builtin_ctz(warp->ready)];
    if (&next == &self) return;
    w.current = &next;
    own_stack = next.stack;
    change(self.context, next.context);
}

void wake(Worker& w, Warp& warp, unsigned which) {
    warp.ready |= which;
    if (warp.ready) w.ready_warps |= 1u << (&warp - w.warps);
}

void sleep(Worker& w, Fibre& fibre) {
    Warp& warp = *fibre.warp;
    warp.ready &= ~(1u << fibre.lane);
    if (!warp.ready) {
        w.ready_warps &= ~(1u << (&warp - w.warps));
        if (w.shadow) {
            count_accesses(w, warp);
            wake(w, warp, warp.full);
            warp.full = 0;
        }
    }
    give_way(w);
}

// All threads must come to one and the same __syncthreads().
void check_barrier(Worker& w) {
    const Fibre* first = nullptr;
    for (int i = 0; i < w.threads && !first; ++i)
        if (w.fibres[i].warp->live >> w.fibres[i].lane & 1u) first = &w.fibres[i];
    for (int i = 0; i < w.threads; ++i) {
        const Fibre& other = w.fibres[i];
        const bool left = !(other.warp->live >> other.lane & 1u);
        if (!left && other.line == first->line) continue;
        report(w, first->number, first->frame, first->pc, -1, i, left ? 0 : other.pc,
               left ? "barrier divergence: waits in __syncthreads(), and thread %d has left the kernel"
                    : "barrier divergence: waits in __syncthreads(), and thread %d in another",
               i);
        stop(w);
    }
}

void release_barrier(Worker& w) {
    if (w.shadow) check_barrier(w);
    w.arrived = 0;
    for (int i = 0; i * lanes < w.threads; ++i) wake(w, w.warps[i], w.warps[i].live);
    if (w.shadow) block_synchronized(w);
}

// If all that `lane` waits for have come, computes and returns them.
unsigned met(Worker& w, Warp& warp, int lane) {
    const unsigned needed = warp.masks[lane] & warp.live;
    if ((warp.waiting & needed) != needed) return 0;
    for (unsigned rest = needed; rest; rest &= rest - 1) {
        const int other = __builtin_ctz(rest);
        if (warp.masks[other] == warp.masks[lane] && warp.computes[other] == warp.computes[lane]) continue;
        const Fibre &a = warp.fibres[lane], &b = warp.fibres[other];
        fail(a, "a warp is divided: thread %d is in %s with mask %08x, thread %d in %s with mask %08x",
             a.number, a.waits_in, warp.masks[lane], b.number, b.waits_in, warp.masks[other]);
    }
    warp.computes[lane](w, warp, needed);
    warp.waiting &= ~needed;
    return needed;
}

void leave(Worker& w, Fibre& fibre) {
    Warp& warp = *fibre.warp;
    warp.live &= ~(1u << fibre.lane);
    --w.live;
    fibre.waits_in = "the end of the kernel";
    for (unsigned rest = warp.waiting; rest; rest &= rest - 1)
        if (unsigned done = met(w, warp, __builtin_ctz(rest))) {
            wake(w, warp, done);
            rest &= ~done | (rest & -rest);
        }
    if (w.live && w.arrived == w.live) release_barrier(w);
    sleep(w, fibre);
}

void fibre_main() {
    for (;;) {  // one block after the other
        worker->request->invoke(worker->request->arguments);
        leave(*worker, *worker->current);
    }
}

char* new_stacks() {
    void* memory = mmap(nullptr, stack_bytes * max_threads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::fprintf(stderr, "emulator: no memory for stacks\n");
        std::abort();
    }
    return static_cast<char*>(memory);
}

void prepare_fibres(Worker& w) {
    if (!w.stacks) {
        w.stacks = new_stacks();
        w.fibres = new Fibre[max_threads];
        for (int i = 0; i < max_threads; ++i) {
            w.fibres[i].number = i;
            w.fibres[i].lane = i % lanes;
            w.fibres[i].warp = &w.warps[i / lanes];
            w.fibres[i].stack = nullptr;
        }
        for (int i = 0; i * lanes < max_threads; ++i) w.warps[i].fibres = w.fibres + i * lanes;
    }
    for (; w.prepared < w.threads; ++w.prepared) {
        Fibre& fibre = w.fibres[w.prepared];
        if (!fibre.stack) {
            fibre.stack = w.stacks + w.prepared * stack_bytes;
            mprotect(fibre.stack, 4096, PROT_NONE);  // running over the stack stops at once
        }
        // Tops at different places of a page, or all stacks would fight for the same lines of the cache.
        char* top = fibre.stack + stack_bytes - 320 * (w.prepared % 12);
        prepare(fibre.context, fibre.stack, top, fibre_main);
    }
}

void run_block(Worker& w, uint64_t number) {
    const Request& request = *w.request;
    w.block_number = number;
    w.live = w.threads;
    w.arrived = 0;
    w.ready_warps = 0;
    prepare_fibres(w);
    for (int i = 0; i * lanes < w.threads; ++i) {
        Warp& warp = w.warps[i];
        const int left = w.threads - i * lanes;
        warp.existing = warp.live = left >= lanes ? 0xffffffffu : (1u << left) - 1;
        warp.waiting = warp.ready = warp.full = 0;
        wake(w, warp, warp.live);
    }
    for (int i = 0; i < w.threads; ++i) {
        w.fibres[i].copies.clear();
        w.fibres[i].groups = 0;
    }
    if (request.dynamic_shared) std::memset(request.dynamic_shared(), 0xff, request.shared_bytes);  // NaN
    if (w.shadow) block_begins(w);
    w.current = &w.fibres[0];
    own_stack = w.current->stack;
    w.running = true;
    change(w.home, w.current->context);
    w.running = false;
    if (w.live && !w.failed) {  // nobody can go on
        const Fibre *first = nullptr, *second = nullptr;
        for (int i = 0; i < w.threads; ++i) {
            const Fibre& fibre = w.fibres[i];
            const bool live = fibre.warp->live >> fibre.lane & 1u;
            if (live && !first) first = &fibre;
        }
        for (int i = 0; i < w.threads; ++i) {
            const Fibre& fibre = w.fibres[i];
            if (fibre.waits_in != first->waits_in || fibre.line != first->line) second = &fibre;
            if (second) break;
        }
        report(w, first->number, first->frame, first->pc, -1, second ? second->number : -1,
               second && (second->warp->live >> second->lane & 1u) ? second->pc : 0,
               "waits for ever in %s: thread %d is in %s", first->waits_in, second ? second->number : -1,
               second ? second->waits_in : "it too");
        w.failed = true;
    }
}

// ---- an access that no page allows ----

constexpr int memory_signals[] = {SIGSEGV, SIGBUS};
struct sigaction usual[2];

uintptr_t interrupted_pc(void* context) {
#if defined(__linux__) && defined(__x86_64__)
    return static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#elif defined(__linux__) && defined(__aarch64__)
    return static_cast<ucontext_t*>(context)->uc_mcontext.pc + 1;
#else
    return context ? 1 : 0;
#endif
}

// In a kernel: ends the launch. Elsewhere: what would have happened without us.
void on_memory_signal(int number, siginfo_t* info, void* context) {
    Worker* w = worker;
    if (!w || !w->running) {
        sigaction(number, &usual[number == SIGBUS], nullptr);
        return;
    }
    auto address = static_cast<char*>(info->si_addr);
    const bool stack = address >= w->stacks && address < w->stacks + stack_bytes * max_threads;
    report(*w, w->current->number, nullptr, interrupted_pc(context), -1, -1, 0,
           stack ? "needs more than %zu kB for its local variables"
                 : "touches memory that it must not touch; Module(..., checked=True) tells more",
           stack_bytes / 1024);
    stop(*w);
}

struct SignalStack {  // for the handler, whose own is the fibre's, and may be full
    stack_t before;
    std::unique_ptr<char[]> memory{new char[64 * 1024]};
    SignalStack() {
        stack_t ours = {};
        ours.ss_sp = memory.get();
        ours.ss_size = 64 * 1024;
        sigaltstack(&ours, &before);
    }
    ~SignalStack() { sigaltstack(&before, nullptr); }
};

struct Handlers {
    Handlers() {
        struct sigaction ours = {};
        ours.sa_sigaction = on_memory_signal;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 2; ++i) sigaction(memory_signals[i], &ours, &usual[i]);
    }
    ~Handlers() {
        for (int i = 0; i < 2; ++i) sigaction(memory_signals[i], &usual[i], nullptr);
    }
};

void work(Worker& w, Request& request) {
    worker = &w;
    w.request = &request;
    w.threads = static_cast<int>(request.block[0] * request.block[1] * request.block[2]);
    w.failed = false;
    w.prepared = 0;  // the kernel is another: its fibres begin anew
    for (int i = 0; i < w.threads && w.fibres; ++i) w.fibres[i].waits_in = "";
    if (request.checked) begin_checks(w);
    const SignalStack signal_stack;
    const uint64_t blocks = uint64_t{request.grid[0]} * request.grid[1] * request.grid[2];
    for (uint64_t block; !w.failed && !__atomic_load_n(&request.stop, __ATOMIC_RELAXED) &&
                         (block = next_block.fetch_add(1)) < blocks;)
        run_block(w, block);
    if (request.checked) end_checks(w);
    worker = nullptr;
}

void find_frames(uint64_t* frames, const Fibre& fibre, void* frame, uintptr_t pc) {
    int count = 0;
    frames[count++] = pc;
    auto words = static_cast<uintptr_t*>(frame);
    const auto low = reinterpret_cast<uintptr_t>(fibre.stack), high = low + stack_bytes - 16;
    while (count < max_frames) {  // each frame: the caller's frame, the return address
        const auto here = reinterpret_cast<uintptr_t>(words);
        if (here < low || here > high || here % 8) break;
        if (words[1] && words[1] != pc) frames[count++] = words[1];
        if (words[0] <= here) break;
        words = reinterpret_cast<uintptr_t*>(words[0]);
    }
    while (count < max_frames) frames[count++] = 0;
}

void add_report(Worker& w, int thread, void* frame, uintptr_t pc, int64_t other_block, int other_thread,
                uintptr_t other_pc, const char* format, va_list arguments) {
    std::lock_guard<std::mutex> lock(reporting);
    Request& request = *w.request;
    if (request.report_count >= max_reports) {
        request.stop = 1;
        return;
    }
    Report entry = {};
    find_frames(entry.frames, w.fibres[thread], frame, pc);
    entry.other_frames[0] = other_pc;
    entry.block = w.block_number;
    entry.other_block = other_block < 0 ? w.block_number : static_cast<uint64_t>(other_block);
    entry.thread = thread;
    entry.other_thread = other_thread;
    std::vsnprintf(entry.text, sizeof entry.text, format, arguments);
    for (int i = 0; i < request.report_count; ++i) {  // one line of code, one report
        const Report& old = request.reports[i];
        if (old.frames[0] == pc && old.other_frames[0] == other_pc) return;
    }
    request.reports[request.report_count++] = entry;
}

}  // namespace

void report(Worker& w, int thread, void* frame, uintptr_t pc, int64_t other_block, int other_thread,
            uintptr_t other_pc, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add_report(w, thread, frame, pc, other_block, other_thread, other_pc, format, arguments);
    va_end(arguments);
}

void fail(const Fibre& where, const char* format, ...) {
    Worker& w = *worker;
    va_list arguments;
    va_start(arguments, format);
    add_report(w, where.number, where.frame, where.pc, -1, -1, 0, format, arguments);
    va_end(arguments);
    stop(w);
}

void wait_for_lanes(Worker& w) {
    w.current->warp->full |= 1u << w.current->lane;
    sleep(w, *w.current);
}

// ---- where a thread stands ----

namespace {

uint64_t packed(uint64_t x, uint64_t y, uint64_t z) { return x | y << 32 | z << 48; }

}  // namespace

uint64_t thread_index() {
    const Worker& w = *worker;
    const auto number = static_cast<unsigned>(w.current->number);
    const uint32_t* block = w.request->block;
    return packed(number % block[0], number / block[0] % block[1], number / block[0] / block[1]);
}
uint64_t block_index() {
    const Worker& w = *worker;
    const uint32_t* grid = w.request->grid;
    return packed(w.block_number % grid[0], w.block_number / grid[0] % grid[1],
                  w.block_number / grid[0] / grid[1]);
}
uint64_t block_size() {
    const uint32_t* block = worker->request->block;
    return packed(block[0], block[1], block[2]);
}
uint64_t grid_size() {
    const uint32_t* grid = worker->request->grid;
    return packed(grid[0], grid[1], grid[2]);
}
unsigned active_mask() { return 1u << worker->current->lane; }

// ---- waiting for each other ----

void meet(const char* name, unsigned mask, void* slot, Compute compute, int line, uintptr_t pc, void* frame) {
    Worker& w = *worker;
    Fibre& self = *w.current;
    Warp& warp = *self.warp;
    self.waits_in = name;
    self.line = line;
    self.pc = pc;
    self.frame = frame;
    if (!(mask >> self.lane & 1u))
        fail(self, "%s with mask %08x, which leaves out its own lane %d", name, mask, self.lane);
    warp.slots[self.lane] = slot;
    warp.masks[self.lane] = mask;
    warp.computes[self.lane] = compute;
    warp.waiting |= 1u << self.lane;
    if (const unsigned done = met(w, warp, self.lane)) wake(w, warp, done);
    else sleep(w, self);
}

namespace {

void wait_at_barrier(int line, uintptr_t pc, void* frame) {
    Worker& w = *worker;
    Fibre& self = *w.current;
    self.waits_in = "__syncthreads()";
    self.line = line;
    self.pc = pc;
    self.frame = frame;
    if (++w.arrived == w.live) {
        release_barrier(w);
    } else {
        sleep(w, self);
    }
}

}  // namespace

void barrier(int line) { wait_at_barrier(line, EMULATOR_PC, EMULATOR_FRAME); }

int barrier_vote(Vote vote, int predicate, int line) {
    Worker& w = *worker;
    w.current->vote = predicate != 0;
    wait_at_barrier(line, EMULATOR_PC, EMULATOR_FRAME);
    int count = 0, voters = 0;
    for (int i = 0; i < w.threads; ++i)
        if (w.fibres[i].warp->existing >> w.fibres[i].lane & 1u) ++voters, count += w.fibres[i].vote;
    wait_at_barrier(line, EMULATOR_PC, EMULATOR_FRAME);  // all have counted before anyone votes again
    return vote == Vote::count ? count : vote == Vote::all ? count == voters : count != 0;
}

// ---- cp.async ----

void cp_async(void* to, const void* from, int bytes, int source_bytes) {
    Worker& w = *worker;
    Fibre& self = *w.current;
    self.pc = EMULATOR_PC;
    self.frame = EMULATOR_FRAME;
    if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes < 0 || source_bytes > bytes)
        fail(self, "cp.async of %d bytes, %d of them from memory", bytes, source_bytes);
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % static_cast<unsigned>(bytes))
        fail(self, "misaligned: cp.async of %d bytes at an address that is no multiple of it", bytes);
    const Copy copy = {
        static_cast<char*>(to), static_cast<const char*>(from), bytes, source_bytes, self.groups, self.pc};
    if (w.shadow) copy_begins(w, copy);
    self.copies.push_back(copy);
}

void cp_async_commit() { ++worker->current->groups; }

namespace {

void finish_copies(unsigned before_group) {
    Worker& w = *worker;
    auto& copies = w.current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < before_group; ++done) {
        const Copy& copy = copies[done];
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.source_bytes));
        std::memset(copy.to + copy.source_bytes, 0, static_cast<size_t>(copy.bytes - copy.source_bytes));
        if (w.shadow) copy_ends(w, copy);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace

void cp_async_wait(int groups) {
    const unsigned committed = worker->current->groups;
    finish_copies(committed - std::min(committed, static_cast<unsigned>(groups)));
}
void cp_async_wait_all() { finish_copies(~0u); }

// ---- atomics, fences ----

template <class T>
T atomic(T* address, Atomic how, T value, T compare) {
    using Word =
        std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    Worker& w = *worker;
    w.current->pc = EMULATOR_PC;
    w.current->frame = EMULATOR_FRAME;
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T))
        fail(*w.current, "misaligned: an atomic operation of %d bytes", int(sizeof(T)));
    if (w.shadow) check_atomic(w, address, sizeof(T), w.current->pc);
    auto word = reinterpret_cast<Word*>(address);
    Word old = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    for (;;) {
        const T before = bit_cast<T>(old);
        T after = value;
        switch (how) {
            case Atomic::add: after = before + value; break;
            case Atomic::sub: after = before - value; break;
            case Atomic::min: after = value < before ? value : before; break;
            case Atomic::max: after = before < value ? value : before; break;
            case Atomic::compare: after = before == compare ? value : before; break;
            case Atomic::exchange: break;
            default:
                if constexpr (std::is_integral<T>::value) {
                    if (how == Atomic::increment) after = before >= value ? 0 : before + 1;
                    if (how == Atomic::decrement) after = before == 0 || before > value ? value : before - 1;
                    if (how == Atomic::bit_and) after = before & value;
                    if (how == Atomic::bit_or) after = before | value;
                    if (how == Atomic::bit_xor) after = before ^ value;
                }
        }
        if (__atomic_compare_exchange_n(word, &old, bit_cast<Word>(after), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            return before;
    }
}
template int atomic(int*, Atomic, int, int);
template unsigned atomic(unsigned*, Atomic, unsigned, unsigned);
template unsigned long long atomic(unsigned long long*, Atomic, unsigned long long, unsigned long long);
template float atomic(float*, Atomic, float, float);
template double atomic(double*, Atomic, double, double);
template __half atomic(__half*, Atomic, __half, __half);
template __nv_bfloat16 atomic(__nv_bfloat16*, Atomic, __nv_bfloat16, __nv_bfloat16);

void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void trap(const char* why) {
    worker->current->pc = EMULATOR_PC;
    worker->current->frame = EMULATOR_FRAME;
    fail(*worker->current, "%s", why);
}

}  // namespace emulator

// ---- for Python ----

extern "C" __attribute__((visibility("default"))) void emulator_launch(emulator::Request* request) {
    using namespace emulator;
    std::lock_guard<std::mutex> lock(launching);
    next_block = 0;
    while (static_cast<int>(workers.size()) < request->workers) workers.push_back(std::make_unique<Worker>());
    if (request->checked) begin_launch(*request);
    const Handlers handlers;
    std::vector<std::thread> threads;
    for (int i = 1; i < request->workers; ++i) threads.emplace_back([=] { work(*workers[i], *request); });
    work(*workers[0], *request);
    for (std::thread& thread : threads) thread.join();
    if (request->checked) end_launch();
}

// Memory between two pages that nobody may touch, so that a stray store cannot reach Python's.
extern "C" __attribute__((visibility("default"))) void* emulator_map(size_t bytes) {
    auto memory = mmap(nullptr, bytes + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    auto begin = static_cast<char*>(memory);
    mprotect(begin, 4096, PROT_NONE);
    mprotect(begin + 4096 + bytes, 4096, PROT_NONE);
    return begin + 4096;
}
extern "C" __attribute__((visibility("default"))) void emulator_unmap(void* begin, size_t bytes) {
    munmap(static_cast<char*>(begin) - 4096, bytes + 8192);
}
