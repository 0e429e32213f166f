// The instructions that CUDA C++ has no words for, as functions: asynchronous copies, and the tensor cores.
//
// The NVIDIA "Parallel Thread Execution ISA", section 9.7, is the source of every meaning given here. On CPUs
// the emulator carries the same instructions out; this file alone knows that there is more than one machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A 16 x 8 result of the tensor cores, and what they multiply, lie in the registers of a warp like this. With
// g = lane / 4 and t = lane % 4, the numbers of thread (g, t):
//
//   A, 16 x 16:   a[0] (g, 2t) (g, 2t+1)   a[1] the same in row g+8   a[2], a[3] the same eight columns later
//   B, 16 x 8:    b0 (2t, g) (2t+1, g)     b1 the same eight rows later
//   C, 16 x 8:    c[0] (g, 2t)  c[1] (g, 2t+1)  c[2], c[3] the same in row g+8
//
// Two 16-bit numbers share a register, the first in its lower half.

#ifndef CUDA_EMULATOR

__device__ inline unsigned shared_address(const void* pointer) { return __cvta_generic_to_shared(pointer); }

template <int bytes>
struct Piece {
    using type = unsigned;
};
template <>
struct Piece<16> {
    using type = uint4;
};

// Start to copy 4 or 16 bytes from global to shared memory, past the registers; zeros if not `inside`, and
// then nothing is read. The bytes are there after wait_for_copies, for this thread; after a barrier, for all.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
#if __CUDA_ARCH__ < 800  // no such instruction: the bytes pass through registers, and are there at once
    using Bytes = typename Piece<bytes>::type;
    *(Bytes*)shared = inside ? *(const Bytes*)global : Bytes{};
#else
    const int read = inside ? bytes : 0;
    if constexpr (bytes == 16) {  // not by way of the L1 cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(shared)), "l"(global), "r"(read)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(shared_address(shared)), "l"(global), "n"(bytes), "r"(read)
                     : "memory");
    }
#endif
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Read four 8 x 8 matrices of 16-bit numbers from shared memory. Lane i gives the address of row i % 8 of
// matrix i / 8, and thread (g, t) gets the numbers (g, 2t) and (g, 2t+1) of each matrix.
__device__ inline void load_matrices(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices: thread (g, t) gets (2t, g) and (2t+1, g).
__device__ inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// C += A B, products exact, sums in float.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                   unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

template <int bytes>
inline void copy_async(void* shared, const void* global, bool inside) {
    emulator::cp_async(shared, global, bytes, inside ? bytes : 0);
}
inline void wait_for_copies() { emulator::cp_async_wait_all(); }
inline void load_matrices(unsigned (&r)[4], const void* row) { emulator::ldmatrix<4>(r, row); }
inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    emulator::ldmatrix<4, true>(r, row);
}
template <class T>
inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned b[2] = {b0, b1};
    emulator::mma_m16n8k16<T>(c, a, b, c);
}

#endif

// e^x. Where the result is rounded to 16 bits anyway, by the fast unit of the card: 2^(x log2 e) in one step.
template <class T>
__device__ inline float exponential(float x) {
    return __expf(x);
}
template <>
__device__ inline float exponential<float>(float x) {
    return expf(x);
}

// Two numbers in one register.
template <class T>
__device__ inline unsigned pack(float low, float high);

template <>
__device__ inline unsigned pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *(const unsigned*)&pair;
}
template <>
__device__ inline unsigned pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(const unsigned*)&pair;
}

// to[0] = a, to[1] = b
template <class T>
__device__ inline void store_pair(T* to, float a, float b) {
    *(unsigned*)to = pack<T>(a, b);
}
__device__ inline void store_pair(float* to, float a, float b) { *(float2*)to = make_float2(a, b); }
