// CUDA C++ for an ordinary C++ compiler: what a kernel may say, in the words of the CUDA headers.
//
// Included before every .cu. The state of threads lives in runtime.cpp, behind functions of namespace
// emulator that are never inlined: so the checked build, which instruments the kernel's own loads and
// stores, sees those and nothing of ours.
//
// For the emulator half of a PTX header (`#ifdef CUDA_EMULATOR`), with the operands of the instruction:
//
//   emulator::cp_async(to, from, bytes, source_bytes)   cp.async.ca/cg.shared.global: `bytes` 4, 8 or 16; the
//                                                       last bytes - source_bytes are filled with zeros
//   emulator::cp_async_commit(), cp_async_wait(n), cp_async_wait_all()       the bytes move at the wait
//   emulator::ldmatrix<N, transposed>(registers, row)   ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16
//   emulator::stmatrix<N, transposed>(row, registers)   stmatrix, likewise (sm_90)
//   emulator::mma_m16n8k16<A>(d, a, b, c)               mma.sync.aligned.m16n8k16.row.col.f32.A.A.f32,
//                                                       A = __half or __nv_bfloat16; float d[4], c[4]
//   emulator::mma_m16n8k16_f16(d, a, b, c)              the same with f16 accumulators; uint32_t d[2], c[2]
//   emulator::mma_m16n8k8<A>(d, a, b, c)                mma.sync.aligned.m16n8k8, a[2], b[1]
//
// with uint32_t a[4], b[2] each holding two 16-bit elements. Shared addresses are plain pointers.
#pragma once

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "small_floats.h"

#define CUDA_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define alignas(bytes) __attribute__((aligned(bytes)))  // which may stand after __shared__
#define __shared__ static __thread  // of the OS thread, which runs one block at a time
#define __extern_shared__ __thread  // what build.py makes of `extern __shared__`

// ---- vector types ----

#define EMULATOR_VECTOR(T, name, two, four)                                                                  \
    struct alignas(two) name##2 { T x, y; };                                                                 \
    struct name##3 { T x, y, z; };                                                                           \
    struct alignas(four) name##4 { T x, y, z, w; };                                                          \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                               \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                       \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR(signed char, char, 2, 4)
EMULATOR_VECTOR(unsigned char, uchar, 2, 4)
EMULATOR_VECTOR(short, short, 4, 8)
EMULATOR_VECTOR(unsigned short, ushort, 4, 8)
EMULATOR_VECTOR(int, int, 8, 16)
EMULATOR_VECTOR(unsigned, uint, 8, 16)
EMULATOR_VECTOR(float, float, 8, 16)
EMULATOR_VECTOR(long long, longlong, 16, 16)
EMULATOR_VECTOR(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTOR(double, double, 16, 16)
#undef EMULATOR_VECTOR

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }

// ---- threads ----

namespace emulator {

// x in the lower 32 bits, then y and z in 16 each. A thread's place never changes while it runs, so the
// compiler may keep it: `const`.
__attribute__((const)) uint64_t thread_index();
__attribute__((const)) uint64_t block_index();
__attribute__((const)) uint64_t block_size();
__attribute__((const)) uint64_t grid_size();
template <class T>
inline T unpacked(uint64_t place) {
    const auto y = static_cast<unsigned>(place >> 32 & 0xffff), z = static_cast<unsigned>(place >> 48);
    return {static_cast<unsigned>(place), y, z};
}

enum class Vote { count, all, any };
enum class Shuffle { index, up, down, exclusive_or };
enum class Reduce { add, min, max, bit_and, bit_or, bit_xor };
enum class Atomic { add, sub, exchange, min, max, increment, decrement, compare, bit_and, bit_or, bit_xor };

// `line`, that of the call, tells barriers apart.
void barrier(int line);
int barrier_vote(Vote vote, int predicate, int line);
void warp_barrier(unsigned mask, int line);
uint64_t shuffle(unsigned mask, uint64_t value, Shuffle how, int operand, int width, int line);
unsigned ballot(unsigned mask, int predicate, int line);
unsigned match_any(unsigned mask, uint64_t value, int line);
unsigned active_mask();
template <class T>
T reduce(unsigned mask, T value, Reduce how, int line);  // int and unsigned
template <class T>
T atomic(T* address, Atomic how, T value, T compare);
void fence();
[[noreturn]] void trap(const char* why = "__trap()");
void* copy_bytes(void* to, const void* from, size_t bytes);  // in the checked build, which sees no memcpy
void* set_bytes(void* to, int value, size_t bytes);

void cp_async(void* to, const void* from, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups);  // until at most so many of the newest groups are on their way
void cp_async_wait_all();
void load_matrices(uint32_t* registers, const void* row, int matrices, bool transposed, int line);
void store_matrices(void* row, const uint32_t* registers, int matrices, bool transposed, int line);
template <class A, int depth>
void multiply(float* d, const uint32_t* a, const uint32_t* b, const float* c, int line);
void multiply_f16(uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, int line);

template <int matrices, bool transposed = false>
inline void ldmatrix(uint32_t (&registers)[matrices], const void* row, int line = __builtin_LINE()) {
    load_matrices(registers, row, matrices, transposed, line);
}
template <int matrices, bool transposed = false>
inline void stmatrix(void* row, const uint32_t (&registers)[matrices], int line = __builtin_LINE()) {
    store_matrices(row, registers, matrices, transposed, line);
}
template <class A>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                         int line = __builtin_LINE()) {
    multiply<A, 16>(d, a, b, c, line);
}
template <class A>
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const float (&c)[4],
                        int line = __builtin_LINE()) {
    multiply<A, 8>(d, a, b, c, line);
}
inline void mma_m16n8k16_f16(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const uint32_t (&c)[2], int line = __builtin_LINE()) {
    multiply_f16(d, a, b, c, line);
}

template <class T>
inline uint64_t widen(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t wide = 0;
    __builtin_memcpy(&wide, &value, sizeof(T));
    return wide;
}
template <class T>
inline T narrow(uint64_t wide) {
    T value;
    __builtin_memcpy(&value, &wide, sizeof(T));
    return value;
}

}  // namespace emulator

#define threadIdx (::emulator::unpacked<uint3>(::emulator::thread_index()))
#define blockIdx (::emulator::unpacked<uint3>(::emulator::block_index()))
#define blockDim (::emulator::unpacked<dim3>(::emulator::block_size()))
#define gridDim (::emulator::unpacked<dim3>(::emulator::grid_size()))
constexpr int warpSize = 32;

inline void __syncthreads(int line = __builtin_LINE()) { emulator::barrier(line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
    return emulator::barrier_vote(emulator::Vote::count, predicate, line);
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
    return emulator::barrier_vote(emulator::Vote::all, predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
    return emulator::barrier_vote(emulator::Vote::any, predicate, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulator::warp_barrier(mask, line);
}
inline unsigned __activemask() { return emulator::active_mask(); }
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return emulator::ballot(mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return emulator::ballot(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return emulator::ballot(mask, !predicate, line) == 0;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
    return emulator::match_any(mask, emulator::widen(value), line);
}

#define EMULATOR_SHUFFLE(name, how, Operand)                                                                 \
    template <class T>                                                                                       \
    inline T name(unsigned mask, T value, Operand operand, int width = 32, int line = __builtin_LINE()) {    \
        return emulator::narrow<T>(emulator::shuffle(mask, emulator::widen(value), emulator::Shuffle::how,   \
                                                     static_cast<int>(operand), width, line));               \
    }
EMULATOR_SHUFFLE(__shfl_sync, index, int)
EMULATOR_SHUFFLE(__shfl_up_sync, up, unsigned)
EMULATOR_SHUFFLE(__shfl_down_sync, down, unsigned)
EMULATOR_SHUFFLE(__shfl_xor_sync, exclusive_or, int)
#undef EMULATOR_SHUFFLE

#define EMULATOR_REDUCE(name, how, T)                                                                        \
    inline T name(unsigned mask, T value, int line = __builtin_LINE()) {                                     \
        return emulator::reduce<T>(mask, value, emulator::Reduce::how, line);                                \
    }
EMULATOR_REDUCE(__reduce_add_sync, add, unsigned)
EMULATOR_REDUCE(__reduce_add_sync, add, int)
EMULATOR_REDUCE(__reduce_min_sync, min, unsigned)
EMULATOR_REDUCE(__reduce_min_sync, min, int)
EMULATOR_REDUCE(__reduce_max_sync, max, unsigned)
EMULATOR_REDUCE(__reduce_max_sync, max, int)
EMULATOR_REDUCE(__reduce_and_sync, bit_and, unsigned)
EMULATOR_REDUCE(__reduce_or_sync, bit_or, unsigned)
EMULATOR_REDUCE(__reduce_xor_sync, bit_xor, unsigned)
#undef EMULATOR_REDUCE

#define EMULATOR_ATOMIC(name, how, T)                                                                        \
    inline T name(T* address, T value) {                                                                     \
        return emulator::atomic<T>(address, emulator::Atomic::how, value, static_cast<T>(0));                \
    }
#define EMULATOR_ATOMIC_INTEGERS(name, how)                                                                  \
    EMULATOR_ATOMIC(name, how, int)                                                                          \
    EMULATOR_ATOMIC(name, how, unsigned)                                                                     \
    EMULATOR_ATOMIC(name, how, unsigned long long)
EMULATOR_ATOMIC_INTEGERS(atomicAdd, add)
EMULATOR_ATOMIC(atomicAdd, add, float)
EMULATOR_ATOMIC(atomicAdd, add, double)
EMULATOR_ATOMIC(atomicAdd, add, __half)
EMULATOR_ATOMIC(atomicAdd, add, __nv_bfloat16)
EMULATOR_ATOMIC(atomicSub, sub, int)
EMULATOR_ATOMIC(atomicSub, sub, unsigned)
EMULATOR_ATOMIC_INTEGERS(atomicExch, exchange)
EMULATOR_ATOMIC(atomicExch, exchange, float)
EMULATOR_ATOMIC_INTEGERS(atomicMin, min)
EMULATOR_ATOMIC_INTEGERS(atomicMax, max)
EMULATOR_ATOMIC_INTEGERS(atomicAnd, bit_and)
EMULATOR_ATOMIC_INTEGERS(atomicOr, bit_or)
EMULATOR_ATOMIC_INTEGERS(atomicXor, bit_xor)
EMULATOR_ATOMIC(atomicInc, increment, unsigned)
EMULATOR_ATOMIC(atomicDec, decrement, unsigned)
#undef EMULATOR_ATOMIC_INTEGERS
#undef EMULATOR_ATOMIC
template <class T>
inline T atomicCAS(T* address, T compare, T value) {
    return emulator::atomic<T>(address, emulator::Atomic::compare, value, compare);
}

inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
[[noreturn]] inline void __trap() { emulator::trap(); }
#undef assert
#define assert(condition) ((condition) ? (void)0 : ::emulator::trap("assert(" #condition ")"))

#ifdef EMULATOR_CHECKED
#define memcpy ::emulator::copy_bytes
#define memmove ::emulator::copy_bytes
#define memset ::emulator::set_bytes
#endif

// ---- arithmetic ----

template <class T>
inline T __ldg(const T* address) {
    return *address;
}
template <class A, class B>
inline auto max(A a, B b) -> std::common_type_t<A, B> {
    return emulator::larger<std::common_type_t<A, B>>(a, b);
}
template <class A, class B>
inline auto min(A a, B b) -> std::common_type_t<A, B> {
    return emulator::smaller<std::common_type_t<A, B>>(a, b);
}
using std::abs;
using std::isfinite;
using std::isinf;
using std::isnan;

namespace emulator {  // C libraries declare these too, some since 2025
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float fmaxf(float a, float b) { return larger(a, b); }
inline float fminf(float a, float b) { return smaller(a, b); }
}  // namespace emulator
#define rsqrtf ::emulator::rsqrtf
#define rsqrt ::emulator::rsqrt
#define fmaxf ::emulator::fmaxf
#define fminf ::emulator::fminf
inline float __expf(float a) { return ::expf(a); }
inline float __exp10f(float a) { return ::powf(10.0f, a); }
inline float __logf(float a) { return ::logf(a); }
inline float __log2f(float a) { return ::log2f(a); }
inline float __log10f(float a) { return ::log10f(a); }
inline float __sinf(float a) { return ::sinf(a); }
inline float __cosf(float a) { return ::cosf(a); }
inline float __tanf(float a) { return ::tanf(a); }
inline float __powf(float a, float b) { return ::powf(a, b); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline int __float2int_rn(float a) { return static_cast<int>(::nearbyintf(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline int __float2int_rd(float a) { return static_cast<int>(::floorf(a)); }
inline int __float2int_ru(float a) { return static_cast<int>(::ceilf(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline int __float_as_int(float a) { return emulator::bit_cast<int>(a); }
inline unsigned __float_as_uint(float a) { return emulator::bit_cast<unsigned>(a); }
inline float __int_as_float(int a) { return emulator::bit_cast<float>(a); }
inline float __uint_as_float(unsigned a) { return emulator::bit_cast<float>(a); }
inline long long __double_as_longlong(double a) { return emulator::bit_cast<long long>(a); }
inline double __longlong_as_double(long long a) { return emulator::bit_cast<double>(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __brev(unsigned a) {
    a = (a >> 16) | (a << 16);
    a = ((a >> 8) & 0x00ff00ffu) | ((a & 0x00ff00ffu) << 8);
    a = ((a >> 4) & 0x0f0f0f0fu) | ((a & 0x0f0f0f0fu) << 4);
    a = ((a >> 2) & 0x33333333u) | ((a & 0x33333333u) << 2);
    return ((a >> 1) & 0x55555555u) | ((a & 0x55555555u) << 1);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> (4 * i);
        unsigned byte = (bytes >> (8 * (pick & 7u))) & 0xffu;
        if (pick & 8u) byte = byte & 0x80u ? 0xffu : 0u;  // the sign, spread
        result |= byte << (8 * i);
    }
    return result;
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<long long>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
