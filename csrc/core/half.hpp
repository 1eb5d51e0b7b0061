// Element types and the float arithmetic of the encodings: docs/kv-codecs.md, "Elements".
//
// Everything that rounds goes through multiply, divide, add and subtract, so that device code cannot contract
// it.
#ifndef WARMROUTE_CORE_HALF_HPP
#define WARMROUTE_CORE_HALF_HPP

#include "shape.hpp"

#if defined(__SSE2__) && !defined(__CUDA_ARCH__)
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "encoded units are little-endian, and so must be the processor"
#endif

namespace wr {

constexpr uint32_t F32_INFINITY = 0x7F800000u, F32_NAN = 0x7FC00000u, F32_MAGNITUDE = 0x7FFFFFFFu;
constexpr uint16_t F16_NAN = 0x7E00u, BF16_NAN = 0x7FC0u;
constexpr uint64_t F64_NAN = 0x7FF8000000000000ull;

WR_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

WR_HD float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(__CUDA_ARCH__)
WR_HD float multiply(float a, float b) { return __fmul_rn(a, b); }
WR_HD float divide(float a, float b) { return __fdiv_rn(a, b); }
WR_HD float add(float a, float b) { return __fadd_rn(a, b); }
WR_HD float subtract(float a, float b) { return __fsub_rn(a, b); }
WR_HD double multiply(double a, double b) { return __dmul_rn(a, b); }
WR_HD double add(double a, double b) { return __dadd_rn(a, b); }
WR_HD double subtract(double a, double b) { return __dsub_rn(a, b); }
#else
WR_HD float multiply(float a, float b) { return a * b; }
WR_HD float divide(float a, float b) { return a / b; }
WR_HD float add(float a, float b) { return a + b; }
WR_HD float subtract(float a, float b) { return a - b; }
WR_HD double multiply(double a, double b) { return a * b; }
WR_HD double add(double a, double b) { return a + b; }
WR_HD double subtract(double a, double b) { return a - b; }
#endif

WR_HD float widen_bf16(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

WR_HD float widen_f16(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFFu;
    const uint32_t special = magnitude >= 0x7C00u ? 112u << 23 : 0u;
    const uint32_t normal = (magnitude << 13) + (112u << 23) + special;
    const uint32_t denormal = float_bits(multiply(float(int32_t(magnitude)), 0x1p-24f));
    return bits_float(uint32_t(bits & 0x8000u) << 16 | (magnitude < 0x400u ? denormal : normal));
}

WR_HD uint16_t narrow_bf16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return uint16_t((bits & F32_MAGNITUDE) > F32_INFINITY ? uint32_t(BF16_NAN) : rounded);
}

// Adding 0.5 to a magnitude below 2^-14 leaves its multiple of 2^-24, rounded to even, in the last bits.
WR_HD uint16_t narrow_f16(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & F32_MAGNITUDE;
    const uint32_t normal = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    const uint32_t denormal = float_bits(add(bits_float(magnitude), 0.5f)) - 0x3F000000u;
    uint32_t rounded = magnitude < 0x38800000u ? denormal : normal;
    rounded = magnitude >= 0x477FF000u ? 0x7C00u : rounded;
    rounded |= bits >> 16 & 0x8000u;
    return uint16_t(magnitude > F32_INFINITY ? uint32_t(F16_NAN) : rounded);
}

WR_HD float canonical(float value) {
    const uint32_t bits = float_bits(value);
    return bits_float((bits & F32_MAGNITUDE) > F32_INFINITY ? F32_NAN : bits);
}

WR_HD double canonical(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    bits = (bits & ~(1ull << 63)) > 0x7FF0000000000000ull ? F64_NAN : bits;
    memcpy(&value, &bits, 8);
    return value;
}

WR_HD bool is_computable(int32_t dtype) { return dtype == WR_F32 || dtype == WR_F16 || dtype == WR_BF16; }

// One element of WR_F32, WR_F16 or WR_BF16.
WR_HD float load_element(int32_t dtype, const uint8_t *at) {
    if (dtype == WR_F32) {
        float value;
        memcpy(&value, at, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, at, 2);
    return dtype == WR_F16 ? widen_f16(bits) : widen_bf16(bits);
}

WR_HD void store_element(int32_t dtype, uint8_t *at, float value) {
    if (dtype == WR_F32) {
        value = canonical(value);
        memcpy(at, &value, 4);
        return;
    }
    const uint16_t bits = dtype == WR_F16 ? narrow_f16(value) : narrow_bf16(value);
    memcpy(at, &bits, 2);
}

// The bits of |value| if it is finite, else 0: magnitudes compare as their bits do.
WR_HD uint32_t finite_magnitude(float value) {
    const uint32_t magnitude = float_bits(value) & F32_MAGNITUDE;
    return magnitude < F32_INFINITY ? magnitude : 0u;
}

// Rounding to nearest without flushing denormals, which a caller's thread may have set otherwise (torch can).
// Returns what restore_floats() takes.
#if defined(__SSE2__) && !defined(__CUDA_ARCH__)
static inline uint64_t plain_floats() {
    const uint32_t mode = _mm_getcsr(), plain = mode & ~0xE040u;
    if (plain != mode) {
        _mm_setcsr(plain);
    }
    return mode;
}

static inline void restore_floats(uint64_t mode) {
    if ((mode & 0xE040u) != 0) {
        _mm_setcsr(uint32_t(mode));
    }
}
#elif defined(__aarch64__) && !defined(__CUDA_ARCH__)
static inline uint64_t plain_floats() {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    if ((mode & 0x3C00000ull) != 0) {
        __asm__ volatile("msr fpcr, %0" : : "r"(mode & ~0x3C00000ull));
    }
    return mode;
}

static inline void restore_floats(uint64_t mode) {
    if ((mode & 0x3C00000ull) != 0) {
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
    }
}
#else
WR_HD uint64_t plain_floats() { return 0; }
WR_HD void restore_floats(uint64_t) {}
#endif

} // namespace wr

#endif
