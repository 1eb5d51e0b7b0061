// One element, one scale, one exponent table: the arithmetic that the portable, SIMD and device forms share.
// docs/kv-codecs.md specifies it.
#ifndef WARMROUTE_CORE_CODEC_ELEMENTS_HPP
#define WARMROUTE_CORE_CODEC_ELEMENTS_HPP

#include "codec_layout.hpp"

namespace wr {

constexpr float FP8_PEAK = 448.0f, INT8_PEAK = 127.0f;
constexpr uint32_t SCALE_FLOOR = 0x0D800000u; // 2^-100
constexpr uint32_t SCALE_LIMIT = 0x7C010203u; // the largest that 127 can be multiplied by

// `largest` is the largest finite_magnitude() of what shares the scale.
WR_HD float scale_of(uint32_t largest, float peak) {
    const uint32_t bits = float_bits(divide(bits_float(largest), peak));
    const uint32_t raised = bits < SCALE_FLOOR ? SCALE_FLOOR : bits;
    return bits_float(raised > SCALE_LIMIT ? SCALE_LIMIT : raised);
}

// Whether an encoder may have written it; no code of such a scale overflows the element type.
WR_HD bool is_scale(uint32_t bits, int32_t dtype, bool fp8) {
    const uint32_t most = dtype == WR_F32   ? (fp8 ? 0x7B124924u : 0x7C010203u)
                          : dtype == WR_F16 ? (fp8 ? 0x431236DBu : 0x4400F1E4u)
                                            : (fp8 ? 0x7B11B6DBu : 0x7C008102u);
    return bits >= SCALE_FLOOR && bits <= most;
}

// Adding 2^14 to a magnitude below 2^-6 leaves its multiple of 2^-9, rounded to even, in the last bits.
WR_HD uint8_t to_e4m3(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & F32_MAGNITUDE;
    const uint32_t normal = ((magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20) - 960u;
    const uint32_t denormal = float_bits(add(bits_float(magnitude), 16384.0f)) - 0x46800000u;
    uint32_t code = magnitude < 0x3C800000u ? denormal : normal;
    code = magnitude >= 0x43E00000u ? 0x7Eu : code;
    code |= bits >> 24 & 0x80u;
    return uint8_t(magnitude > F32_INFINITY ? 0x7Fu : code);
}

WR_HD float from_e4m3(uint8_t code) {
    const uint32_t magnitude = code & 0x7Fu;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t denormal = float_bits(multiply(float(int32_t(magnitude)), 0x1p-9f));
    const uint32_t bits = (magnitude < 8u ? denormal : normal) | uint32_t(code & 0x80u) << 24;
    return bits_float(magnitude == 0x7Fu ? F32_NAN : bits);
}

// Adding 1.5 * 2^23 to a magnitude up to 127 leaves the integer, rounded to even, in the last bits.
WR_HD int8_t to_int8(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & F32_MAGNITUDE;
    const uint32_t limited = magnitude > 0x42FE0000u ? 0x42FE0000u : magnitude;
    const float clamped = bits_float(limited | (bits & ~F32_MAGNITUDE));
    const uint32_t code = float_bits(add(clamped, 12582912.0f)) - 0x4B400000u;
    return int8_t(magnitude > F32_INFINITY ? -128 : int32_t(code));
}

WR_HD float from_int8(int8_t code) { return code == -128 ? bits_float(F32_NAN) : float(code); }

WR_HD uint8_t exponent_of(uint16_t bf16) { return uint8_t(bf16 >> 7); }
WR_HD uint8_t low_of(uint16_t bf16) { return uint8_t((bf16 >> 8 & 0x80) | (bf16 & 0x7F)); }
WR_HD uint16_t join_bf16(uint8_t exponent, uint8_t low) {
    return uint16_t((low & 0x80) << 8 | exponent << 7 | (low & 0x7F));
}

WR_HD int32_t lowest_bit(uint64_t word) {
#if defined(__CUDA_ARCH__)
    return __ffsll(static_cast<long long>(word)) - 1;
#else
    return __builtin_ctzll(word);
#endif
}

// Ranks the exponents that occur by count, the lower first where counts are equal; returns how many, at
// most 15.
WR_HD int32_t rank_exponents(const uint16_t *counts, int32_t *ranked) {
    int32_t held = 0;
    for (int32_t four = 0; four < 256; four += 4) {
        uint64_t any;
        memcpy(&any, counts + four, 8);
        for (int32_t exponent = four; any != 0 && exponent < four + 4; ++exponent) {
            const uint32_t count = counts[exponent];
            if (count == 0 || (held == TABLE_ENTRIES && count <= counts[ranked[held - 1]])) {
                continue;
            }
            int32_t at = held < TABLE_ENTRIES ? held++ : TABLE_ENTRIES - 1;
            for (; at > 0 && counts[ranked[at - 1]] < count; --at) {
                ranked[at] = ranked[at - 1];
            }
            ranked[at] = exponent;
        }
    }
    return held;
}

// The 16 bytes of a tile's table, from how often each of the 256 exponents occurs.
WR_HD void choose_exponents(const uint16_t *counts, uint8_t *table) {
    int32_t ranked[TABLE_ENTRIES];
    int32_t held = rank_exponents(counts, ranked);
    uint64_t wanted[4] = {0, 0, 0, 0};
    for (int32_t i = 0; i < held; ++i) {
        wanted[ranked[i] >> 6] |= uint64_t(1) << (ranked[i] & 63);
    }
    for (int32_t exponent = 0; held < TABLE_ENTRIES; ++exponent) {
        if (counts[exponent] == 0) {
            wanted[0] |= uint64_t(1) << exponent; // below 30: fewer than 15 exponents occur
            ++held;
        }
    }
    int32_t filled = 0;
    for (int32_t word = 0; word < 4; ++word) {
        for (; wanted[word] != 0; wanted[word] &= wanted[word] - 1) {
            table[filled++] = uint8_t(64 * word + lowest_bit(wanted[word]));
        }
    }
    table[TABLE_ENTRIES] = 0;
}

WR_HD bool is_table(const uint8_t *table) {
    bool ascending = table[TABLE_ENTRIES] == 0;
    for (int32_t i = 1; i < TABLE_ENTRIES; ++i) {
        ascending = ascending && table[i] > table[i - 1];
    }
    return ascending;
}

} // namespace wr

#endif
