// The checked build. Kernels are compiled with -fsanitize=thread, which puts a call before every load and
// store; no sanitizer is linked, the calls end here.
//
// Beside memory lies shadow memory: for each word of shared memory, and for each item of the arrays that the
// kernel may write, who wrote it last and who has read it since, where and when. When: a clock that moves on
// at every barrier and __syncwarp. Two accesses of different threads, one of them a write, are a race if
// nothing between them made one wait for the other:
//
//   same block:  both after the last __syncthreads(); and, in one warp, after the last __syncwarp() of both
//   else:        always; blocks do not wait for each other
#ifdef __linux__
#include <link.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>

#include "runtime.h"

namespace emulator {

namespace {

enum Flags : uint8_t {
    initialized = 15,
    pending = 16,
    atomically = 32
};  // `initialized`: which bytes of the word

struct Access {
    uint32_t time, pc;
    uint16_t thread;
    uint8_t bytes, flags;  // which bytes of the word
};
struct Word {  // of shared memory
    Access write, reads[2];
};
struct Item {  // of global memory
    uint32_t writer, reader;  // block + 1; `many` for several readers
    Access write, read;
};
constexpr uint32_t many = 0xffffffffu;
constexpr uint8_t compilers = 16;
constexpr int log_length = 64;

struct Entry {  // one access of one lane, for the counts
    uint64_t address;
    uint32_t pc;
    uint8_t bytes;
    bool shared, write;
};

struct Log {
    int length;
    Entry entries[log_length];
};

struct Global {  // what all workers share
    const Region* regions;
    int count;
    Item* items[64];
    uintptr_t image_begin, image_end;  // the kernel's library: constants lie there
    size_t module;  // its number, for __tls_get_addr
    size_t shared_span;  // bytes of its thread-local block
    const Variable* variables;
    int variable_count;
    size_t dynamic_bytes;
} global;

uint32_t short_pc(uintptr_t pc) { return static_cast<uint32_t>(pc - global.image_begin); }
uintptr_t long_pc(uint32_t pc) { return pc + global.image_begin; }

}  // namespace

struct Shadow {
    uint32_t now, barrier, start;  // the clock; when the last barrier was, and the start of the block
    uint32_t warp_barrier[max_threads / lanes];
    bool divided[max_threads / lanes];  // some lanes of the warp have met without the others
    uint32_t known[max_threads / lanes][lanes][lanes];  // then: up to when a lane knows another
    char* shared;  // this worker's thread-local block
    std::unique_ptr<Word[]> words;
    size_t word_count;
    std::unique_ptr<uint8_t[]> valid;  // which bytes of the word belong to a variable; `compilers`: look away
    char* dynamic;
    Counts counts;
    std::unique_ptr<Log[]> logs;
    uint64_t reported[256];
};

namespace {

// ---- reports ----

struct Site {  // the access being checked
    Worker& w;
    Fibre& fibre;
    void* frame;
    uintptr_t pc;
    const char* what;
    bool whole_warp;
};

template <class... Values>
void complain(const Site& site, int64_t other_block, int other_thread, uint32_t other_pc, const char* format,
              Values... values) {
    const uintptr_t there = other_pc ? long_pc(other_pc) : 0;
    const uint64_t key = site.pc * 0x9e3779b97f4a7c15ull ^ there;
    uint64_t& seen = site.w.shadow->reported[key >> 56];
    if (seen == key) return;
    seen = key;
    report(site.w, site.fibre.number, site.frame, site.pc, other_block, other_thread, there, format,
           values...);
}

// Ends the launch: the access must not happen.
template <class... Values>
[[noreturn]] void refuse(const Site& site, const char* format, Values... values) {
    site.fibre.pc = site.pc;
    site.fibre.frame = site.frame;
    fail(site.fibre, format, values...);
}

[[noreturn]] void out_of_bounds(const Site& site, const char* address, size_t bytes) {
    const Shadow& s = *site.w.shadow;
    if (address >= s.shared - 4096 && address < s.shared + global.shared_span + 4096) {
        if (s.dynamic && address >= s.dynamic)
            refuse(site,
                   "out of bounds: %s %zu bytes at byte %td of the extern __shared__ memory, which has %zu",
                   site.what, bytes, address - s.dynamic, global.dynamic_bytes);
        refuse(site, "out of bounds: %s %zu bytes beyond a __shared__ variable", site.what, bytes);
    }
    if (address >= site.w.stacks && address < site.w.stacks + stack_bytes * max_threads)
        refuse(site, "out of bounds: %s %zu bytes of another thread's local memory", site.what, bytes);
    const Region* nearest = nullptr;
    uint64_t least = uint64_t{1} << 40;
    for (int i = 0; i < global.count; ++i) {
        const Region& region = global.regions[i];
        const char* end = region.begin + region.bytes;
        const ptrdiff_t beyond = address < region.begin ? region.begin - address : address - end;
        const auto distance = static_cast<uint64_t>(beyond < 0 ? 0 : beyond);
        if (distance < least) least = distance, nearest = &region;
    }
    if (!nearest)
        refuse(site, "out of bounds: %s %zu bytes at address %p", site.what, bytes,
               static_cast<const void*>(address));
    refuse(site, "out of bounds: %s %zu bytes at byte %td of argument %d, which has %llu", site.what, bytes,
           address - nearest->begin, static_cast<int>(nearest->argument),
           static_cast<unsigned long long>(nearest->bytes));
}

// ---- order ----

// Whether the access of `thread` at `time`, in this block, came before all that `fibre` does now.
inline bool ordered(const Shadow& s, const Fibre& fibre, int thread, uint32_t time) {
    if (time <= s.barrier) return true;
    const int warp = fibre.number / lanes;
    if (thread / lanes != warp) return false;
    return time <= s.warp_barrier[warp] ||
           (s.divided[warp] && time <= s.known[warp][fibre.lane][thread % lanes]);
}

inline bool conflicts(const Site& site, const Access& access, unsigned bytes) {
    if (!(access.bytes & bytes)) return false;
    if (access.thread == site.fibre.number && !site.whole_warp) return false;
    return !ordered(*site.w.shadow, site.fibre, access.thread, access.time);
}

const char* between(const Site& site, int thread) {
    return thread / lanes == site.fibre.number / lanes ? "no barrier or __syncwarp() between"
                                                       : "no barrier between";
}

// ---- shared memory ----

// Two readers since the last barrier stand for all. They are of two warps if there are two: then whoever
// writes without a barrier meets one of another warp, and what a __syncwarp() orders does not matter.
inline void note_read(const Shadow& s, const Fibre& fibre, Word& word, const Access& access) {
    Access &first = word.reads[0], &second = word.reads[1];
    const int warp = access.thread / lanes, of_first = first.thread / lanes,
              of_second = second.thread / lanes;
    const bool two = first.time > s.barrier && second.time > s.barrier;
    if (two && of_first != of_second && first.thread != access.thread && second.thread != access.thread)
        return;
    for (Access* read : {&first, &second})
        if (read->thread == access.thread && read->time > s.barrier) {
            const uint8_t bytes = access.bytes | (read->time == access.time ? read->bytes : 0);
            *read = access;
            read->bytes = bytes;
            return;
        }
    for (Access* read : {&first, &second})
        if (ordered(s, fibre, read->thread, read->time)) {
            *read = access;
            return;
        }
    if (of_first == of_second && of_first != warp) second = access;
}

inline void read_word(const Site& site, Word& word, unsigned bytes) {
    const Shadow& s = *site.w.shadow;
    const Access& write = word.write;
    const bool fresh = write.time > s.start;
    if (fresh && write.flags & pending && write.bytes & bytes)
        complain(site, -1, write.thread, write.pc,
                 "%s shared memory that a cp.async of thread %d is still filling", site.what, write.thread);
    else if (!fresh || (write.flags & bytes) != bytes)
        complain(site, -1, -1, 0, "%s shared memory that nobody has written", site.what);
    else if (conflicts(site, write, bytes))
        complain(site, -1, write.thread, write.pc,
                 "race: %s shared memory that thread %d has written, with %s", site.what, write.thread,
                 between(site, write.thread));
    const Access access = {s.now, short_pc(site.pc), static_cast<uint16_t>(site.fibre.number),
                           static_cast<uint8_t>(bytes), 0};
    note_read(s, site.fibre, word, access);
}

inline void write_word(const Site& site, Word& word, unsigned bytes, unsigned flags) {
    const Shadow& s = *site.w.shadow;
    Access& write = word.write;
    const bool fresh = write.time > s.start;
    if (fresh && write.flags & pending && write.bytes & bytes)
        complain(site, -1, write.thread, write.pc,
                 "%s shared memory that a cp.async of thread %d is still filling", site.what, write.thread);
    else if (!(flags & write.flags & atomically) && conflicts(site, write, bytes))
        complain(site, -1, write.thread, write.pc,
                 "race: %s shared memory that thread %d has written, with %s", site.what, write.thread,
                 between(site, write.thread));
    for (const Access& read : word.reads)
        if (conflicts(site, read, bytes)) {
            complain(site, -1, read.thread, read.pc,
                     "race: %s shared memory that thread %d has read, with %s", site.what, read.thread,
                     between(site, read.thread));
            break;
        }
    unsigned known = fresh ? write.flags & initialized : 0u;
    if (!(flags & pending)) known |= bytes;
    write = {s.now, short_pc(site.pc), static_cast<uint16_t>(site.fibre.number), static_cast<uint8_t>(bytes),
             static_cast<uint8_t>(flags | known)};
}

// Calls body(word, bytes of it) for each word of shared memory that the access touches.
template <class Body>
inline void each_word(const Site& site, const char* address, size_t bytes, Body body) {
    Shadow& s = *site.w.shadow;
    auto offset = static_cast<size_t>(address - s.shared);
    if (offset + bytes > global.shared_span) out_of_bounds(site, address, bytes);
    if ((offset | bytes) % 4 == 0) {
        for (size_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
            if (s.valid[i] != 15) out_of_bounds(site, address, bytes);
            body(s.words[i], 15u);
        }
        return;
    }
    for (size_t done = 0; done < bytes;) {
        const size_t in_word = (offset + done) % 4,
                     count = bytes - done < 4 - in_word ? bytes - done : 4 - in_word;
        const unsigned mask = ((1u << count) - 1) << in_word;
        const size_t index = (offset + done) / 4;
        if ((s.valid[index] & mask) != mask) out_of_bounds(site, address, bytes);
        body(s.words[index], mask);
        done += count;
    }
}

// ---- global memory ----

inline void read_item(const Site& site, Item& item) {
    const Shadow& s = *site.w.shadow;
    const auto block = static_cast<uint32_t>(site.w.block_number) + 1;
    if (item.writer && !(item.write.flags & atomically)) {
        if (item.writer != block)
            complain(site, item.writer - 1, item.write.thread, item.write.pc,
                     "race: %s global memory that block %u writes", site.what, item.writer - 1);
        else if (conflicts(site, item.write, 1))
            complain(site, -1, item.write.thread, item.write.pc,
                     "race: %s global memory that thread %d has written, with %s", site.what,
                     item.write.thread, between(site, item.write.thread));
    }
    if (item.reader == block && !ordered(s, site.fibre, item.read.thread, item.read.time) &&
        item.read.thread != site.fibre.number)
        return;  // one reader stands for all
    item.reader = item.reader && item.reader != block ? many : block;
    item.read = {s.now, short_pc(site.pc), static_cast<uint16_t>(site.fibre.number), 1, 0};
}

inline void write_item(const Site& site, Item& item, unsigned flags) {
    const Shadow& s = *site.w.shadow;
    const auto block = static_cast<uint32_t>(site.w.block_number) + 1;
    const Access before = item.write;
    const uint32_t writer = __atomic_exchange_n(&item.writer, block, __ATOMIC_RELAXED);
    if (writer && !(flags & before.flags & atomically)) {
        if (writer != block)
            complain(site, writer - 1, before.thread, before.pc,
                     "race: %s global memory that block %u has written", site.what, writer - 1);
        else if (conflicts(site, before, 1))
            complain(site, -1, before.thread, before.pc,
                     "race: %s global memory that thread %d has written, with %s", site.what, before.thread,
                     between(site, before.thread));
    }
    if (item.reader && item.reader != block)
        complain(site, -1, item.read.thread, item.read.pc, "race: %s global memory that another block reads",
                 site.what);
    else if (item.reader && conflicts(site, item.read, 1))
        complain(site, -1, item.read.thread, item.read.pc,
                 "race: %s global memory that thread %d has read, with %s", site.what, item.read.thread,
                 between(site, item.read.thread));
    item.write = {s.now, short_pc(site.pc), static_cast<uint16_t>(site.fibre.number), 1,
                  static_cast<uint8_t>(flags)};
}

inline int region_of(const char* address) {
    for (int i = 0; i < global.count; ++i)
        if (static_cast<uint64_t>(address - global.regions[i].begin) < global.regions[i].bytes) return i;
    return -1;
}

inline void access_global(const Site& site, const char* address, size_t bytes, bool write, unsigned flags) {
    const int index = region_of(address);
    if (index < 0) {
        const auto place = reinterpret_cast<uintptr_t>(address);
        if (place >= global.image_begin && place + bytes <= global.image_end) return;  // a table of constants
        out_of_bounds(site, address, bytes);
    }
    const Region& region = global.regions[index];
    const auto offset = static_cast<uint64_t>(address - region.begin);
    if (offset + bytes > region.bytes) out_of_bounds(site, address, bytes);
    if (region.constant) {
        if (write)
            refuse(site, "%s argument %d, which the kernel takes as const", site.what,
                   static_cast<int>(region.argument));
        return;
    }
    Item* items = global.items[index];
    for (uint64_t i = offset / region.granule; i <= (offset + bytes - 1) / region.granule; ++i)
        write ? write_item(site, items[i], flags) : read_item(site, items[i]);
}

// ---- counts ----

// Passes over the 32 banks beyond the one that each part of 128 bytes needs.
int conflicts_of(const uint64_t* addresses, unsigned which, int bytes) {
    const int part = bytes <= 4 ? 32 : 128 / bytes;  // lanes served at once
    int extra = 0;
    for (int first = 0; first < lanes; first += part) {
        uint64_t found[lanes][8];
        uint8_t passes[lanes] = {};
        int most = 1;
        for (int lane = first; lane < first + part; ++lane) {
            if (!(which >> lane & 1u)) continue;
            for (uint64_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
                const int bank = static_cast<int>(word % 32);
                int i = 0;
                while (i < passes[bank] && i < 8 && found[bank][i] != word) ++i;
                if (i < passes[bank] && i < 8) continue;
                if (i < 8) found[bank][i] = word;
                if (++passes[bank] > most) most = passes[bank];
            }
        }
        extra += most - 1;
    }
    return extra;
}

int sectors_of(const uint64_t* addresses, unsigned which, int bytes) {
    uint64_t found[2 * lanes];
    int count = 0;
    for (unsigned rest = which; rest; rest &= rest - 1) {
        const uint64_t address = addresses[__builtin_ctz(rest)];
        for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector) {
            int i = count - 1;
            while (i >= 0 && found[i] != sector) --i;
            if (i < 0) found[count++] = sector;
        }
    }
    return count;
}

void count_request(Counts& counts, const Entry& entry, const uint64_t* addresses, unsigned which) {
    if (entry.shared) {
        (entry.write ? counts.shared_written_requests : counts.shared_read_requests) += 1;
        (entry.write ? counts.shared_written_conflicts : counts.shared_read_conflicts) +=
            conflicts_of(addresses, which, entry.bytes);
    } else {
        (entry.write ? counts.global_written_requests : counts.global_read_requests) += 1;
        (entry.write ? counts.global_written_sectors : counts.global_read_sectors) +=
            sectors_of(addresses, which, entry.bytes);
    }
}

void note(Worker& w, Fibre& fibre, uintptr_t pc, const char* address, size_t bytes, bool shared, bool write) {
    Log& log = w.shadow->logs[fibre.number];
    if (log.length == log_length) wait_for_lanes(w);
    log.entries[log.length++] = {reinterpret_cast<uint64_t>(address), short_pc(pc),
                                 static_cast<uint8_t>(bytes), shared, write};
}

}  // namespace

// All lanes of the warp wait, or have a full log: now their accesses are put together again, as the warp made
// them. Lanes at different places of the code are taken in the order of the code, as a card does.
void count_accesses(Worker& w, Warp& warp) {
    Shadow& s = *w.shadow;
    Log* logs = &s.logs[warp.fibres->number];
    int place[lanes] = {};
    for (;;) {
        const Entry* next = nullptr;
        for (int lane = 0; lane < lanes; ++lane) {
            if (place[lane] == logs[lane].length) continue;
            const Entry& entry = logs[lane].entries[place[lane]];
            if (!next || entry.pc < next->pc) next = &entry;
        }
        if (!next) break;
        uint64_t addresses[lanes];
        unsigned which = 0;
        for (int lane = 0; lane < lanes; ++lane) {
            if (place[lane] == logs[lane].length) continue;
            const Entry& entry = logs[lane].entries[place[lane]];
            if (entry.pc != next->pc || entry.write != next->write || entry.shared != next->shared) continue;
            addresses[lane] = entry.address;
            which |= 1u << lane;
        }
        count_request(s.counts, *next, addresses, which);
        for (unsigned rest = which; rest; rest &= rest - 1) ++place[__builtin_ctz(rest)];
    }
    for (int lane = 0; lane < lanes; ++lane) logs[lane].length = 0;
}

// ---- an access ----

namespace {

template <bool write>
__attribute__((noinline)) void check(const char* address, size_t bytes, size_t alignment, uintptr_t pc,
                                     void* frame) {
    Worker* w = worker;
    if (!w || !w->shadow) return;  // the library is being loaded
    Fibre& fibre = *w->current;
    Shadow& s = *w->shadow;
    const Site site = {*w, fibre, frame, pc, write ? "writes" : "reads", false};
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        refuse(site, "misaligned: %s %zu bytes at an address that is no multiple of %zu", site.what, bytes,
               alignment);
    if (const auto offset = static_cast<size_t>(address - s.shared); offset < global.shared_span) {
        if (s.valid[offset / 4] == compilers) return;
        each_word(site, address, bytes, [&](Word& word, unsigned mask) {
            write ? write_word(site, word, mask, 0) : read_word(site, word, mask);
        });
        note(*w, fibre, pc, address, bytes, true, write);
    } else {
        access_global(site, address, bytes, write, 0);
        (write ? s.counts.global_written_bytes : s.counts.global_read_bytes) += bytes;
        note(*w, fibre, pc, address, bytes, false, write);
    }
}

template <bool write>
__attribute__((always_inline)) inline void access(const void* where, size_t bytes, size_t alignment,
                                                  uintptr_t pc, void* frame) {
    auto address = static_cast<const char*>(where);
    if (static_cast<size_t>(address - own_stack) < stack_bytes) return;  // the thread's own variables
    check<write>(address, bytes, alignment, pc, frame);
}

}  // namespace

void check_atomic(Worker& w, const void* where, unsigned bytes, uintptr_t pc) {
    Shadow& s = *w.shadow;
    auto address = static_cast<const char*>(where);
    const Site site = {w, *w.current, w.current->frame, pc, "atomically changes", false};
    const bool shared = static_cast<size_t>(address - s.shared) < global.shared_span;
    if (shared) {
        each_word(site, address, bytes, [&](Word& word, unsigned mask) {
            if (word.write.time <= s.start || (word.write.flags & mask) != mask)
                complain(site, -1, -1, 0, "%s shared memory that nobody has written", site.what);
            write_word(site, word, mask, atomically);
        });
    } else {
        access_global(site, address, bytes, true, atomically);
        s.counts.global_read_bytes += bytes;
        s.counts.global_written_bytes += bytes;
    }
    note(w, *w.current, pc, address, bytes, shared, true);
}

void check_matrix_row(Worker& w, Fibre& fibre, const void* row, bool store) {
    auto address = static_cast<const char*>(row);
    const Site site = {w, fibre, fibre.frame, fibre.pc, store ? "stmatrix writes" : "ldmatrix reads", true};
    if (static_cast<size_t>(address - w.shadow->shared) >= global.shared_span)
        refuse(site, "out of bounds: %s 16 bytes that are not in shared memory", site.what);
    each_word(site, address, 16, [&](Word& word, unsigned mask) {
        store ? write_word(site, word, mask, 0) : read_word(site, word, mask);
    });
    Log& log = w.shadow->logs[fibre.number];
    if (log.length == log_length) count_accesses(w, *fibre.warp);
    log.entries[log.length++] = {reinterpret_cast<uint64_t>(address), short_pc(fibre.pc), 16, true, store};
}

void copy_begins(Worker& w, const Copy& copy) {
    Shadow& s = *w.shadow;
    Fibre& fibre = *w.current;
    const Site reads = {w, fibre, fibre.frame, copy.pc, "cp.async reads", false};
    const Site writes = {w, fibre, fibre.frame, copy.pc, "cp.async writes", false};
    if (static_cast<size_t>(copy.to - s.shared) >= global.shared_span)
        refuse(writes, "out of bounds: %s %d bytes that are not in shared memory", writes.what, copy.bytes);
    if (copy.source_bytes) {
        access_global(reads, copy.from, copy.source_bytes, false, 0);
        s.counts.global_read_bytes += copy.source_bytes;
        note(w, fibre, copy.pc, copy.from, copy.source_bytes, false, false);
    }
    each_word(writes, copy.to, copy.bytes,
              [&](Word& word, unsigned mask) { write_word(writes, word, mask, pending); });
    note(w, fibre, copy.pc, copy.to, copy.bytes, true, true);
}

void copy_ends(Worker& w, const Copy& copy) {
    Shadow& s = *w.shadow;
    const Site site = {w, *w.current, nullptr, copy.pc, "cp.async writes", false};
    each_word(site, copy.to, copy.bytes, [&](Word& word, unsigned mask) {
        Access& write = word.write;
        write.time = s.now;
        write.flags = static_cast<uint8_t>((write.flags & ~pending) | mask);
    });
}

// ---- the clock ----

void block_synchronized(Worker& w) { w.shadow->barrier = w.shadow->now++; }

void warp_synchronized(Worker& w, Warp& warp, unsigned mask) {
    Shadow& s = *w.shadow;
    const int index = static_cast<int>(&warp - w.warps);
    if (mask == warp.existing) {
        s.warp_barrier[index] = s.now++;
        return;
    }
    auto& known = s.known[index];
    if (!s.divided[index]) std::memset(known, 0, sizeof known);
    s.divided[index] = true;
    for (int other = 0; other < lanes; ++other) {  // what one of them knows, all know
        uint32_t latest = mask >> other & 1u ? s.now : 0;
        for (int lane = 0; lane < lanes; ++lane)
            if (mask >> lane & 1u && known[lane][other] > latest) latest = known[lane][other];
        for (int lane = 0; lane < lanes; ++lane)
            if (mask >> lane & 1u) known[lane][other] = latest;
    }
    ++s.now;
}

void block_begins(Worker& w) {
    Shadow& s = *w.shadow;
    s.start = s.barrier = s.now++;
    std::memset(s.divided, 0, sizeof s.divided);
}

// ---- a launch ----

// Where the kernel's library lies in memory, and its thread-local block.
#ifdef __linux__
namespace {

struct Search {
    uintptr_t address;
    bool found;
};

int find_image(dl_phdr_info* info, size_t, void* data) {
    auto& search = *static_cast<Search*>(data);
    uintptr_t begin = ~uintptr_t{0}, end = 0;
    size_t span = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        const uintptr_t low = info->dlpi_addr + part.p_vaddr, high = low + part.p_memsz;
        if (part.p_type == PT_TLS) span = part.p_memsz;
        if (part.p_type != PT_LOAD) continue;
        if (low < begin) begin = low;
        if (high > end) end = high;
    }
    if (search.address < begin || search.address >= end) return 0;
    global.image_begin = info->dlpi_addr;
    global.image_end = end;
    global.module = info->dlpi_tls_modid;
    global.shared_span = span;
    search.found = true;
    return 1;
}

}  // namespace

extern "C" void* __tls_get_addr(size_t*);

namespace {

void find_kernel(const Request& request) {
    Search search = {reinterpret_cast<uintptr_t>(request.invoke), false};
    dl_iterate_phdr(find_image, &search);
}
char* shared_block() {
    size_t index[2] = {global.module, 0};
    return global.shared_span ? static_cast<char*>(__tls_get_addr(index)) : nullptr;
}

}  // namespace
#else  // build.py offers no checks
namespace {

void find_kernel(const Request&) {}
char* shared_block() { return nullptr; }

}  // namespace
#endif

void begin_launch(const Request& request) {
    find_kernel(request);
    global.regions = request.regions;
    global.count = request.region_count;
    global.variables = request.variables;
    global.variable_count = request.variable_count;
    global.dynamic_bytes = request.shared_bytes;
    for (int i = 0; i < global.count; ++i) {
        const Region& region = global.regions[i];
        global.items[i] = nullptr;
        if (!region.constant)
            global.items[i] =
                static_cast<Item*>(std::calloc(region.bytes / region.granule + 1, sizeof(Item)));
    }
}

void end_launch() {
    for (int i = 0; i < global.count; ++i) std::free(global.items[i]);
}

void begin_checks(Worker& w) {
    if (!w.kept) w.kept = new Shadow{};
    Shadow& s = *w.kept;
    w.shadow = &s;
    s.counts = {};
    std::memset(s.reported, 0, sizeof s.reported);
    s.shared = shared_block();
    const size_t count = global.shared_span / 4 + 1;
    if (count > s.word_count) {
        s.words.reset(new Word[count]());
        s.valid.reset(new uint8_t[count]);
        s.word_count = count;
    }
    if (s.now > 1u << 31) {  // the clock goes on from launch to launch, so that old accesses are old
        std::memset(s.words.get(), 0, s.word_count * sizeof(Word));
        std::memset(s.warp_barrier, 0, sizeof s.warp_barrier);
        s.now = 0;
    }
    ++s.now;
    std::memset(s.valid.get(), 0, count);
    const auto declare = [&](size_t offset, size_t bytes) {
        for (size_t i = offset; i < offset + bytes; ++i) s.valid[i / 4] |= 1u << i % 4;
    };
    for (int i = 0; i < global.variable_count; ++i) {
        const Variable& variable = global.variables[i];
        declare(variable.offset, variable.bytes);
        if (variable.guard) s.valid[variable.offset / 4] = compilers;
    }
    s.dynamic = w.request->dynamic_shared ? static_cast<char*>(w.request->dynamic_shared()) : nullptr;
    if (s.dynamic) declare(static_cast<size_t>(s.dynamic - s.shared), global.dynamic_bytes);
    if (!s.logs) s.logs.reset(new Log[max_threads]);
    for (int i = 0; i < max_threads; ++i) s.logs[i].length = 0;
}

void end_checks(Worker& w) {
    auto from = reinterpret_cast<const uint64_t*>(&w.shadow->counts);
    auto to = reinterpret_cast<uint64_t*>(&w.request->counts);
    for (size_t i = 0; i < sizeof(Counts) / sizeof(uint64_t); ++i)
        __atomic_fetch_add(to + i, from[i], __ATOMIC_RELAXED);
    w.shadow = nullptr;
}

void* copy_bytes(void* to, const void* from, size_t bytes) {
    const uintptr_t pc = EMULATOR_PC;
    for (size_t i = 0; i < bytes; ++i) {
        access<false>(static_cast<const char*>(from) + i, 1, 1, pc, EMULATOR_FRAME);
        access<true>(static_cast<char*>(to) + i, 1, 1, pc, EMULATOR_FRAME);
    }
    return std::memmove(to, from, bytes);
}
void* set_bytes(void* to, int value, size_t bytes) {
    const uintptr_t pc = EMULATOR_PC;
    for (size_t i = 0; i < bytes; ++i) access<true>(static_cast<char*>(to) + i, 1, 1, pc, EMULATOR_FRAME);
    return std::memset(to, value, bytes);
}

}  // namespace emulator

// ---- what -fsanitize=thread calls; the names are the compiler's ----

#define EMULATOR_CALLBACKS(bytes)                                                                            \
    void __tsan_read##bytes(void* p) {                                                                       \
        emulator::access<false>(p, bytes, bytes, EMULATOR_PC, EMULATOR_FRAME);                               \
    }                                                                                                        \
    void __tsan_write##bytes(void* p) {                                                                      \
        emulator::access<true>(p, bytes, bytes, EMULATOR_PC, EMULATOR_FRAME);                                \
    }                                                                                                        \
    void __tsan_unaligned_read##bytes(void* p) {                                                             \
        emulator::access<false>(p, bytes, 1, EMULATOR_PC, EMULATOR_FRAME);                                   \
    }                                                                                                        \
    void __tsan_unaligned_write##bytes(void* p) {                                                            \
        emulator::access<true>(p, bytes, 1, EMULATOR_PC, EMULATOR_FRAME);                                    \
    }

extern "C" {
EMULATOR_CALLBACKS(1)
EMULATOR_CALLBACKS(2)
EMULATOR_CALLBACKS(4)
EMULATOR_CALLBACKS(8)
EMULATOR_CALLBACKS(16)
void __tsan_read_range(void* p, size_t bytes) {
    for (size_t done = 0; done < bytes; done += 16)
        emulator::access<false>(static_cast<char*>(p) + done, bytes - done < 16 ? bytes - done : 16, 1,
                                EMULATOR_PC, EMULATOR_FRAME);
}
void __tsan_write_range(void* p, size_t bytes) {
    for (size_t done = 0; done < bytes; done += 16)
        emulator::access<true>(static_cast<char*>(p) + done, bytes - done < 16 ? bytes - done : 16, 1,
                               EMULATOR_PC, EMULATOR_FRAME);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
}
