// The state of a launch. Included by the runtime's own files only; kernels see emulator.h.
//
// A Launch is one kernel call. Workers are OS threads; each takes one block after another and runs its
// threads as fibres, which change hands only where CUDA threads may wait for each other: at a barrier, in a
// warp-wide operation, at the end.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "context.h"
#include "emulator.h"

namespace emulator {

constexpr int max_threads = 1024, lanes = 32, max_frames = 12, max_reports = 16;
constexpr size_t stack_bytes = 128 * 1024;

// ---- what Python gives and gets; launch.py has the same structures ----

struct Region {  // a piece of global memory: one array, or several that overlap
    char* begin;
    uint64_t bytes;
    uint32_t granule;  // the smallest item size: what one thread may write beside another's
    int16_t argument;
    int16_t constant;  // the kernel takes it by const pointers only
};
struct Variable {  // a static __shared__ variable: its place in the module's thread-local block
    uint64_t offset, bytes;
    int64_t guard;  // the compiler's own, see launch.py
};
struct Counts {
    uint64_t global_read_bytes, global_written_bytes;
    uint64_t global_read_requests, global_written_requests;  // of a warp
    uint64_t global_read_sectors, global_written_sectors;  // of 32 bytes
    uint64_t shared_read_requests, shared_written_requests;
    uint64_t shared_read_conflicts, shared_written_conflicts;  // passes beyond those that the width needs
};
struct Report {
    uint64_t frames[max_frames], other_frames[max_frames];  // return addresses, innermost first
    uint64_t block, other_block;
    int32_t thread, other_thread;  // -1: none
    char text[200];
};
struct Request {
    void (*invoke)(void** arguments);
    void** arguments;
    void* (*dynamic_shared)();  // null if the kernel declares none
    uint64_t shared_bytes;
    uint32_t grid[3], block[3];
    int32_t workers, checked;
    const Region* regions;
    const Variable* variables;
    int32_t region_count, variable_count;
    Counts counts;
    Report* reports;
    int32_t report_count, stop;
};

// ---- a block ----

struct Copy {  // a cp.async on its way
    char* to;
    const char* from;
    int bytes, source_bytes;
    unsigned group;
    uintptr_t pc;
};

struct Warp;
struct Worker;

struct Fibre {
    Context context;
    int number, lane;
    Warp* warp;
    char* stack;
    // where it waits, for reports
    const char* waits_in;
    void* frame;
    uintptr_t pc;
    int line, vote;
    // cp.async
    std::vector<Copy> copies;
    unsigned groups;
};

using Compute = void (*)(Worker& worker, Warp& warp, unsigned lanes);

struct Warp {
    Fibre* fibres;  // 32, or what is left
    unsigned existing, live, ready, waiting, full;  // full: those whose log of accesses is
    void* slots[lanes];
    unsigned masks[lanes];
    Compute computes[lanes];
};

struct Shadow;  // checker.cpp

struct Worker {
    Request* request = nullptr;
    Fibre* current = nullptr;
    Fibre* fibres = nullptr;
    Warp warps[max_threads / lanes];
    unsigned ready_warps = 0;
    int threads = 0, live = 0, arrived = 0, prepared = 0;
    Context home;
    uint64_t block_number = 0;
    bool failed = false, running = false;  // running: in a fibre
    char* stacks = nullptr;
    Shadow* shadow = nullptr;  // in a checked launch
    Shadow* kept = nullptr;  // for the next one
};

#if defined(__GLIBC__)
#define EMULATOR_QUICK_TLS __attribute__((tls_model("initial-exec")))
#else
#define EMULATOR_QUICK_TLS
#endif
extern thread_local Worker* worker EMULATOR_QUICK_TLS;
extern thread_local char* own_stack EMULATOR_QUICK_TLS;  // of the running fibre

// Ends the launch with a report about a thread, where its pc and frame say; never comes back.
[[noreturn]] void fail(const Fibre& where, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Adds a report and goes on. `frame` and `pc` say where; `other_pc` is where the other thread was.
void report(Worker& worker, int thread, void* frame, uintptr_t pc, int64_t other_block, int other_thread,
            uintptr_t other_pc, const char* format, ...) __attribute__((format(printf, 8, 9)));

// The lanes of `mask` meet; the last to come computes for all from their slots.
void meet(const char* name, unsigned mask, void* slot, Compute compute, int line, uintptr_t pc, void* frame);

// Waits until the other lanes of the warp wait too, or have done as much.
void wait_for_lanes(Worker& worker);

// ---- checker.cpp: what a checked launch is told ----

void begin_launch(const Request& request);
void end_launch();
void begin_checks(Worker& worker);
void end_checks(Worker& worker);
void block_begins(Worker& worker);
void block_synchronized(Worker& worker);
void warp_synchronized(Worker& worker, Warp& warp, unsigned mask);
void count_accesses(Worker& worker, Warp& warp);
void check_atomic(Worker& worker, const void* address, unsigned bytes, uintptr_t pc);
void check_matrix_row(Worker& worker, Fibre& fibre, const void* row, bool store);
void copy_begins(Worker& worker, const Copy& copy);
void copy_ends(Worker& worker, const Copy& copy);

}  // namespace emulator

#define EMULATOR_PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define EMULATOR_FRAME __builtin_frame_address(0)
