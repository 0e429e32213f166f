// Operations of a whole warp: each lane brings a slot, the last to come computes for all.
//
// The layouts of matrix fragments are those of the PTX ISA, "Warp Level Matrix Multiply-Accumulate
// Instructions": with group = lane / 4 and pair = lane % 4, a register holds two elements of one row (of one
// column for B), at 2 pair and 2 pair + 1.
#include <algorithm>

#include "runtime.h"

namespace emulator {

namespace {

template <class Body>
inline void each(unsigned lanes, Body body) {
    for (; lanes; lanes &= lanes - 1) body(__builtin_ctz(lanes));
}

template <class Slot>
inline Slot& slot(Warp& warp, int lane) {
    return *static_cast<Slot*>(warp.slots[lane]);
}

// .aligned instructions need all 32 lanes; `lanes` are those that came.
void need_all(const Warp& warp, unsigned lanes) {
    if (lanes == 0xffffffffu) return;
    const Fibre& first = warp.fibres[__builtin_ctz(lanes)];
    fail(first, "%s needs all 32 lanes of the warp, and only %d came", first.waits_in,
         __builtin_popcount(lanes));
}

struct ShuffleSlot {
    uint64_t value, result;
    Shuffle how;
    int operand, width;
};

void compute_shuffle(Worker&, Warp& warp, unsigned lanes) {
    each(lanes, [&](int lane) {
        auto& self = slot<ShuffleSlot>(warp, lane);
        const int segment = lane & ~(self.width - 1), place = lane & (self.width - 1);
        int source = lane;
        switch (self.how) {
            case Shuffle::index: source = segment | (self.operand & (self.width - 1)); break;
            case Shuffle::up: source = place >= self.operand ? lane - self.operand : lane; break;
            case Shuffle::down:
                source = place + self.operand < self.width ? lane + self.operand : lane;
                break;
            case Shuffle::exclusive_or:
                source = lane ^ self.operand;
                if (source >= segment + self.width)
                    source = lane;  // an earlier segment may be read, no later one
        }
        if (source < 0 || source >= 32 || !(lanes >> source & 1u))
            fail(warp.fibres[lane], "a shuffle reads lane %d, which takes no part", source);
        self.result = slot<ShuffleSlot>(warp, source).value;
    });
}

struct BallotSlot {
    int predicate;
    unsigned result;
};

void compute_ballot(Worker&, Warp& warp, unsigned lanes) {
    unsigned votes = 0;
    each(lanes, [&](int lane) { votes |= slot<BallotSlot>(warp, lane).predicate ? 1u << lane : 0u; });
    each(lanes, [&](int lane) { slot<BallotSlot>(warp, lane).result = votes; });
}

struct MatchSlot {
    uint64_t value;
    unsigned result;
};

void compute_match(Worker&, Warp& warp, unsigned lanes) {
    each(lanes, [&](int lane) {
        auto& self = slot<MatchSlot>(warp, lane);
        self.result = 0;
        each(lanes, [&](int other) {
            if (slot<MatchSlot>(warp, other).value == self.value) self.result |= 1u << other;
        });
    });
}

template <class T>
struct ReduceSlot {
    T value, result;
    Reduce how;
};

template <class T>
void compute_reduce(Worker&, Warp& warp, unsigned lanes) {
    T total = slot<ReduceSlot<T>>(warp, __builtin_ctz(lanes)).value;
    each(lanes & (lanes - 1), [&](int lane) {
        const auto& self = slot<ReduceSlot<T>>(warp, lane);
        switch (self.how) {
            case Reduce::add: total += self.value; break;
            case Reduce::min: total = std::min(total, self.value); break;
            case Reduce::max: total = std::max(total, self.value); break;
            case Reduce::bit_and: total &= self.value; break;
            case Reduce::bit_or: total |= self.value; break;
            case Reduce::bit_xor: total ^= self.value; break;
        }
    });
    each(lanes, [&](int lane) { slot<ReduceSlot<T>>(warp, lane).result = total; });
}

struct MatrixSlot {
    uint32_t* registers;
    char* row;
    int matrices;
    bool transposed;
};

// Matrix m of 8 x 8 elements: its row r is the 16 bytes at the address that lane 8 m + r brings. Lane l gets
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; of column l / 4 if transposed.
template <bool store>
void compute_matrices(Worker& w, Warp& warp, unsigned lanes) {
    need_all(warp, lanes);
    const int matrices = slot<MatrixSlot>(warp, 0).matrices;
    const bool transposed = slot<MatrixSlot>(warp, 0).transposed;
    uint16_t elements[4][8][8];
    for (int i = 0; i < 8 * matrices; ++i) {
        char* row = slot<MatrixSlot>(warp, i).row;
        if (reinterpret_cast<uintptr_t>(row) % 16)
            fail(warp.fibres[i], "misaligned: %s at a row that does not start at a multiple of 16 bytes",
                 warp.fibres[i].waits_in);
        if (w.shadow) check_matrix_row(w, warp.fibres[i], row, store);
        if (!store) std::memcpy(elements[i / 8][i % 8], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < matrices; ++m)
            for (int half = 0; half < 2; ++half) {
                const int major = lane / 4, minor = lane % 4 * 2 + half;
                uint16_t& element = transposed ? elements[m][minor][major] : elements[m][major][minor];
                uint32_t& pair = slot<MatrixSlot>(warp, lane).registers[m];
                if (store) element = static_cast<uint16_t>(pair >> (16 * half));
                else pair = half ? pair | static_cast<uint32_t>(element) << 16 : element;
            }
    for (int i = 0; store && i < 8 * matrices; ++i)
        std::memcpy(slot<MatrixSlot>(warp, i).row, elements[i / 8][i % 8], 16);
}

struct MultiplySlot {
    void* d;
    const uint32_t *a, *b;
    const void* c;
};

template <class A>
inline float element(uint32_t pair, int half) {
    return float(A::of_bits((pair >> (16 * half)) & 0xffffu));
}

// D (16, 8) = A (16, depth) B (depth, 8) + C, products exact, sums in float in the order of k.
template <class A, int depth, bool half_sums>
void compute_multiply(Worker&, Warp& warp, unsigned lanes) {
    need_all(warp, lanes);
    float a[16][depth], b[depth][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& self = slot<MultiplySlot>(warp, lane);
        const int group = lane / 4, pair = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < depth / 4; ++i)  // rows group and group + 8, then the next 8 columns
                a[group + i % 2 * 8][pair * 2 + half + i / 2 * 8] = element<A>(self.a[i], half);
            for (int i = 0; i < depth / 8; ++i)
                b[pair * 2 + half + i * 8][group] = element<A>(self.b[i], half);
            for (int i = 0; i < 2; ++i)
                d[group + i * 8][pair * 2 + half] =
                    half_sums ? element<__half>(static_cast<const uint32_t*>(self.c)[i], half)
                              : static_cast<const float*>(self.c)[i * 2 + half];
        }
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < depth; ++k)
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& self = slot<MultiplySlot>(warp, lane);
        const int group = lane / 4, pair = lane % 4;
        for (int i = 0; i < 2; ++i) {
            const float low = d[group + i * 8][pair * 2], high = d[group + i * 8][pair * 2 + 1];
            if (half_sums) {
                static_cast<uint32_t*>(self.d)[i] =
                    __half(low).bits | static_cast<uint32_t>(__half(high).bits) << 16;
            } else {
                static_cast<float*>(self.d)[i * 2] = low;
                static_cast<float*>(self.d)[i * 2 + 1] = high;
            }
        }
    }
}

}  // namespace

void warp_barrier(unsigned mask, int line) {
    meet(
        "__syncwarp()", mask, nullptr,
        [](Worker& w, Warp& warp, unsigned lanes) {
            if (w.shadow) warp_synchronized(w, warp, lanes);
        },
        line, EMULATOR_PC, EMULATOR_FRAME);
}

uint64_t shuffle(unsigned mask, uint64_t value, Shuffle how, int operand, int width, int line) {
    ShuffleSlot slot = {value, 0, how, operand, width};
    meet("a shuffle", mask, &slot, compute_shuffle, line, EMULATOR_PC, EMULATOR_FRAME);
    return slot.result;
}

unsigned ballot(unsigned mask, int predicate, int line) {
    BallotSlot slot = {predicate, 0};
    meet("a vote", mask, &slot, compute_ballot, line, EMULATOR_PC, EMULATOR_FRAME);
    return slot.result;
}

unsigned match_any(unsigned mask, uint64_t value, int line) {
    MatchSlot slot = {value, 0};
    meet("__match_any_sync()", mask, &slot, compute_match, line, EMULATOR_PC, EMULATOR_FRAME);
    return slot.result;
}

template <class T>
T reduce(unsigned mask, T value, Reduce how, int line) {
    ReduceSlot<T> slot = {value, value, how};
    meet("a reduction", mask, &slot, compute_reduce<T>, line, EMULATOR_PC, EMULATOR_FRAME);
    return slot.result;
}
template int reduce(unsigned, int, Reduce, int);
template unsigned reduce(unsigned, unsigned, Reduce, int);

void load_matrices(uint32_t* registers, const void* row, int matrices, bool transposed, int line) {
    MatrixSlot slot = {registers, static_cast<char*>(const_cast<void*>(row)), matrices, transposed};
    meet("ldmatrix", 0xffffffffu, &slot, compute_matrices<false>, line, EMULATOR_PC, EMULATOR_FRAME);
}

void store_matrices(void* row, const uint32_t* registers, int matrices, bool transposed, int line) {
    MatrixSlot slot = {const_cast<uint32_t*>(registers), static_cast<char*>(row), matrices, transposed};
    meet("stmatrix", 0xffffffffu, &slot, compute_matrices<true>, line, EMULATOR_PC, EMULATOR_FRAME);
}

template <class A, int depth>
void multiply(float* d, const uint32_t* a, const uint32_t* b, const float* c, int line) {
    MultiplySlot slot = {d, a, b, c};
    meet("mma", 0xffffffffu, &slot, compute_multiply<A, depth, false>, line, EMULATOR_PC, EMULATOR_FRAME);
}
template void multiply<__half, 16>(float*, const uint32_t*, const uint32_t*, const float*, int);
template void multiply<__half, 8>(float*, const uint32_t*, const uint32_t*, const float*, int);
template void multiply<__nv_bfloat16, 16>(float*, const uint32_t*, const uint32_t*, const float*, int);
template void multiply<__nv_bfloat16, 8>(float*, const uint32_t*, const uint32_t*, const float*, int);

void multiply_f16(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, int line) {
    MultiplySlot slot = {d, a, b, c};
    meet("mma", 0xffffffffu, &slot, compute_multiply<__half, 16, true>, line, EMULATOR_PC, EMULATOR_FRAME);
}

}  // namespace emulator
