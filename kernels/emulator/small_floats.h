// float16 and bfloat16 as CUDA names them, rounded to nearest even as NumPy and ml_dtypes round.
//
// Arithmetic goes through float and rounds once more. That is correctly rounded: for + - * / and the square
// root a format of p bits may be computed in one of 2 p + 2 or more (Figueroa 1995, "When is double rounding
// innocuous?"), and float has 24 >= 2 * 11 + 2. Only the fused multiply-add needs care.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace emulator {

template <class To, class From>
inline To bit_cast(const From& value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To result;
    __builtin_memcpy(&result, &value, sizeof(To));
    return result;
}

// The double value as a float rounded to odd: cut off, with the last bit set if anything was cut. Rounding
// that to fewer bits then gives what rounding the exact value gives, because ties stay told apart.
inline float round_to_odd(double value) {
    float cut = static_cast<float>(value);
    if (static_cast<double>(cut) == value || value != value || std::isinf(value)) return cut;
    auto bits = bit_cast<uint32_t>(cut);
    if (std::fabs(static_cast<double>(cut)) > std::fabs(value)) --bits;
    return bit_cast<float>(bits | 1u);
}

// The other number if one is NaN.
template <class T>
inline T larger(T a, T b) {
    return a > b || b != b ? a : b;
}
template <class T>
inline T smaller(T a, T b) {
    return a < b || b != b ? a : b;
}

struct HalfFormat {  // 1 sign, 5 exponent, 10 mantissa bits
    static float decode(uint16_t bits) {
#if defined(__F16C__) && defined(__clang__)  // x86 has an instruction for it
        return static_cast<float>(bit_cast<_Float16>(bits));
#elif defined(__F16C__)  // whose header would take half of the time of compiling a kernel
        typedef short Eight __attribute__((vector_size(16)));
        return __builtin_ia32_vcvtph2ps(Eight{static_cast<short>(bits)})[0];
#else
        const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
        if (rest >= 0x7c00u << 13) return bit_cast<float>(sign | rest | 0x7f800000u);  // infinity, NaN
        return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f));
#endif
    }
    static uint16_t encode(float value) {
        const auto word = bit_cast<uint32_t>(value);
        const uint32_t sign = (word >> 16) & 0x8000u, rest = word & 0x7fffffffu;
        if (rest > 0x7f800000u) return 0x7fff;                                // CUDA's one NaN
        if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more: infinity
        if (rest < 0x38800000u)  // below 2^-14 steps are 2^-24, the step of the floats from 0.5 to 1
            return static_cast<uint16_t>(
                sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u));
        return static_cast<uint16_t>(sign | ((rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13));
    }
};

struct BrainFormat {  // the upper half of a float
    static float decode(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
    static uint16_t encode(float value) {
        const auto word = bit_cast<uint32_t>(value);
        if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
        return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
};

template <class Format>
struct Small {
    uint16_t bits;

    Small() = default;
    template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>>
    Small(T value)
        : bits(Format::encode(std::is_same<T, float>::value ? static_cast<float>(value)
                                                            : round_to_odd(static_cast<double>(value)))) {}
    operator float() const { return Format::decode(bits); }

    Small operator-() const { return of_bits(bits ^ 0x8000u); }
    friend Small operator+(Small a, Small b) { return float(a) + float(b); }
    friend Small operator-(Small a, Small b) { return float(a) - float(b); }
    friend Small operator*(Small a, Small b) { return float(a) * float(b); }
    friend Small operator/(Small a, Small b) { return float(a) / float(b); }
    Small& operator+=(Small b) { return *this = *this + b; }
    Small& operator-=(Small b) { return *this = *this - b; }
    Small& operator*=(Small b) { return *this = *this * b; }
    Small& operator/=(Small b) { return *this = *this / b; }
    friend bool operator<(Small a, Small b) { return float(a) < float(b); }
    friend bool operator>(Small a, Small b) { return float(a) > float(b); }
    friend bool operator<=(Small a, Small b) { return float(a) <= float(b); }
    friend bool operator>=(Small a, Small b) { return float(a) >= float(b); }
    friend bool operator==(Small a, Small b) { return float(a) == float(b); }
    friend bool operator!=(Small a, Small b) { return float(a) != float(b); }

    static Small of_bits(unsigned bits) {
        Small result;
        result.bits = static_cast<uint16_t>(bits);
        return result;
    }
};

template <class Format>
struct alignas(4) Small2 {
    Small<Format> x, y;
};

// a b + c rounded once. a b is exact in double; where the sum is not, it is rounded to odd.
template <class Format>
Small<Format> fused_multiply_add(Small<Format> a, Small<Format> b, Small<Format> c) {
    const double product = static_cast<double>(float(a)) * float(b), addend = float(c);
    double sum = product + addend;
    const double back = sum - product;
    const double error = (product - (sum - back)) + (addend - back);  // Knuth's two-sum
    if (std::isfinite(sum) && error != 0) {
        auto bits = bit_cast<uint64_t>(sum);
        if ((error < 0) != (sum < 0)) --bits;
        sum = bit_cast<double>(bits | 1u);
    }
    return Small<Format>(sum);
}

}  // namespace emulator

using __half = emulator::Small<emulator::HalfFormat>;
using __half2 = emulator::Small2<emulator::HalfFormat>;
using __nv_bfloat16 = emulator::Small<emulator::BrainFormat>;
using __nv_bfloat162 = emulator::Small2<emulator::BrainFormat>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// Names with the format in them.
inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline __half __double2half(double a) { return a; }
inline __half __int2half_rn(int a) { return a; }
inline float __half2float(__half a) { return a; }
inline int __half2int_rn(__half a) { return static_cast<int>(std::nearbyint(float(a))); }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half::of_bits(bits); }
inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline __nv_bfloat16 __double2bfloat16(double a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16::of_bits(bits); }

// Names that both formats share.
#define EMULATOR_SMALL template <class Format> inline
#define EMULATOR_ONE emulator::Small<Format>
#define EMULATOR_TWO emulator::Small2<Format>
EMULATOR_SMALL float __low2float(EMULATOR_TWO a) { return a.x; }
EMULATOR_SMALL float __high2float(EMULATOR_TWO a) { return a.y; }
EMULATOR_SMALL EMULATOR_ONE __hadd(EMULATOR_ONE a, EMULATOR_ONE b) { return a + b; }
EMULATOR_SMALL EMULATOR_ONE __hsub(EMULATOR_ONE a, EMULATOR_ONE b) { return a - b; }
EMULATOR_SMALL EMULATOR_ONE __hmul(EMULATOR_ONE a, EMULATOR_ONE b) { return a * b; }
EMULATOR_SMALL EMULATOR_ONE __hdiv(EMULATOR_ONE a, EMULATOR_ONE b) { return a / b; }
EMULATOR_SMALL EMULATOR_ONE __hneg(EMULATOR_ONE a) { return -a; }
EMULATOR_SMALL EMULATOR_ONE __habs(EMULATOR_ONE a) { return EMULATOR_ONE::of_bits(a.bits & 0x7fffu); }
EMULATOR_SMALL EMULATOR_ONE __hmax(EMULATOR_ONE a, EMULATOR_ONE b) { return emulator::larger<float>(a, b); }
EMULATOR_SMALL EMULATOR_ONE __hmin(EMULATOR_ONE a, EMULATOR_ONE b) { return emulator::smaller<float>(a, b); }
EMULATOR_SMALL EMULATOR_ONE __hfma(EMULATOR_ONE a, EMULATOR_ONE b, EMULATOR_ONE c) {
    return emulator::fused_multiply_add(a, b, c);
}
EMULATOR_SMALL bool __hlt(EMULATOR_ONE a, EMULATOR_ONE b) { return a < b; }
EMULATOR_SMALL bool __hle(EMULATOR_ONE a, EMULATOR_ONE b) { return a <= b; }
EMULATOR_SMALL bool __hgt(EMULATOR_ONE a, EMULATOR_ONE b) { return a > b; }
EMULATOR_SMALL bool __hge(EMULATOR_ONE a, EMULATOR_ONE b) { return a >= b; }
EMULATOR_SMALL bool __heq(EMULATOR_ONE a, EMULATOR_ONE b) { return a == b; }
EMULATOR_SMALL bool __hne(EMULATOR_ONE a, EMULATOR_ONE b) { return a != b; }
EMULATOR_SMALL bool __hisnan(EMULATOR_ONE a) { return float(a) != float(a); }
EMULATOR_SMALL int __hisinf(EMULATOR_ONE a) { return std::isinf(float(a)) ? (float(a) > 0 ? 1 : -1) : 0; }
EMULATOR_SMALL EMULATOR_ONE hexp(EMULATOR_ONE a) { return std::exp(float(a)); }
EMULATOR_SMALL EMULATOR_ONE hexp2(EMULATOR_ONE a) { return std::exp2(float(a)); }
EMULATOR_SMALL EMULATOR_ONE hlog(EMULATOR_ONE a) { return std::log(float(a)); }
EMULATOR_SMALL EMULATOR_ONE hsqrt(EMULATOR_ONE a) { return std::sqrt(float(a)); }
EMULATOR_SMALL EMULATOR_ONE hrsqrt(EMULATOR_ONE a) { return 1.0f / std::sqrt(float(a)); }
EMULATOR_SMALL EMULATOR_TWO __hadd2(EMULATOR_TWO a, EMULATOR_TWO b) { return {a.x + b.x, a.y + b.y}; }
EMULATOR_SMALL EMULATOR_TWO __hsub2(EMULATOR_TWO a, EMULATOR_TWO b) { return {a.x - b.x, a.y - b.y}; }
EMULATOR_SMALL EMULATOR_TWO __hmul2(EMULATOR_TWO a, EMULATOR_TWO b) { return {a.x * b.x, a.y * b.y}; }
EMULATOR_SMALL EMULATOR_TWO __hneg2(EMULATOR_TWO a) { return {-a.x, -a.y}; }
EMULATOR_SMALL EMULATOR_TWO __hmax2(EMULATOR_TWO a, EMULATOR_TWO b) {
    return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
EMULATOR_SMALL EMULATOR_TWO __hmin2(EMULATOR_TWO a, EMULATOR_TWO b) {
    return {__hmin(a.x, b.x), __hmin(a.y, b.y)};
}
EMULATOR_SMALL EMULATOR_TWO __hfma2(EMULATOR_TWO a, EMULATOR_TWO b, EMULATOR_TWO c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
#undef EMULATOR_SMALL
#undef EMULATOR_ONE
#undef EMULATOR_TWO
