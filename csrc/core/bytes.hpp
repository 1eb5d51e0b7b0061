// Runs of bf16 elements as exponents and low bytes, and runs of exponents as codes: the inner loops of
// WR_EXP12.
#ifndef WARMROUTE_CORE_BYTES_HPP
#define WARMROUTE_CORE_BYTES_HPP

#include "codec_elements.hpp"
#include "lanes.hpp"

namespace wr {

constexpr int32_t SLACK = 64; // bytes that may be written after a tile's exponents

// Exponents that share their upper four bits, and what to look up by the lower four: the code, inverted, so
// that 0 is an escape and tables can be or'ed.
struct Segments {
    int32_t count;
    uint8_t upper[TABLE_ENTRIES];
    uint8_t inverted[TABLE_ENTRIES][16];
};

static inline Segments make_segments(const uint8_t *table, const uint16_t *counts) {
    Segments segments;
    segments.count = 0;
    for (int32_t code = 0; code < TABLE_ENTRIES; ++code) {
        const uint8_t exponent = table[code], upper = exponent & 0xF0;
        if (counts[exponent] == 0) {
            continue;
        }
        if (segments.count == 0 || segments.upper[segments.count - 1] != upper) {
            memset(segments.inverted[segments.count], 0, 16);
            segments.upper[segments.count++] = upper;
        }
        segments.inverted[segments.count - 1][exponent & 15] = uint8_t(code ^ ESCAPE);
    }
    return segments;
}

#if WR_LANES == 16

constexpr int32_t WIDE = 64; // exponents at a time
typedef __m512i Bytes;

static inline Bytes load_wide(const uint8_t *at) { return _mm512_loadu_si512(at); }
static inline void store_wide(uint8_t *at, Bytes v) { _mm512_storeu_si512(at, v); }
static inline Bytes repeat16(const uint8_t *at) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
}
static inline Bytes look_up(Bytes lookup, Bytes index) { return _mm512_shuffle_epi8(lookup, index); }
static inline Bytes minus_byte(Bytes v, uint8_t value) {
    return _mm512_sub_epi8(v, _mm512_set1_epi8(char(value)));
}
static inline Bytes plus_saturated(Bytes v, uint8_t value) {
    return _mm512_adds_epu8(v, _mm512_set1_epi8(char(value)));
}
static inline Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
static inline Bytes xor_byte(Bytes v, uint8_t value) {
    return _mm512_xor_si512(v, _mm512_set1_epi8(char(value)));
}
static inline uint64_t equal_to(Bytes v, uint8_t value) {
    return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(char(value)));
}
static inline Bytes no_bytes() { return _mm512_setzero_si512(); }
static inline void store_codes(uint8_t *at, Bytes codes) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), _mm512_cvtepi16_epi8(pairs));
}
static inline Bytes load_codes(const uint8_t *at) {
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
    return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(0x0F));
}

static inline Bytes count_equal(Bytes counts, Bytes v, uint8_t value) {
    return _mm512_mask_sub_epi8(counts, equal_to(v, value), counts, _mm512_set1_epi8(-1));
}
static inline uint64_t sum_bytes(Bytes v) {
    return uint64_t(_mm512_reduce_add_epi64(_mm512_sad_epu8(v, _mm512_setzero_si512())));
}
static inline uint64_t above(Bytes v, uint8_t value) {
    return _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8(char(value)));
}

constexpr int32_t SPLIT = 32;   // elements at a time
constexpr int32_t AT_ONCE = 16; // exponents counted in one pass

static inline void split_some(const uint8_t *row, uint8_t *exponents, uint8_t *low) {
    const __m512i x = _mm512_loadu_si512(row);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(x, 8), _mm512_set1_epi16(0x80));
    const __m512i rest = _mm512_and_si512(x, _mm512_set1_epi16(0x7F));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(exponents),
                        _mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 7)));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(low), _mm512_cvtepi16_epi8(_mm512_or_si512(sign, rest)));
}

static inline void join_some(const uint8_t *exponents, const uint8_t *low, uint8_t *row) {
    const __m512i e = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(exponents)));
    const __m512i l = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(low)));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(l, 8), _mm512_set1_epi16(int16_t(0x8000)));
    const __m512i rest = _mm512_and_si512(l, _mm512_set1_epi16(0x7F));
    _mm512_storeu_si512(row, _mm512_or_si512(_mm512_or_si512(sign, rest), _mm512_slli_epi16(e, 7)));
}

#elif WR_LANES == 8

constexpr int32_t WIDE = 32;
typedef __m256i Bytes;

static inline Bytes load_wide(const uint8_t *at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
}
static inline void store_wide(uint8_t *at, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), v);
}
static inline Bytes repeat16(const uint8_t *at) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
}
static inline Bytes look_up(Bytes lookup, Bytes index) { return _mm256_shuffle_epi8(lookup, index); }
static inline Bytes minus_byte(Bytes v, uint8_t value) {
    return _mm256_sub_epi8(v, _mm256_set1_epi8(char(value)));
}
static inline Bytes plus_saturated(Bytes v, uint8_t value) {
    return _mm256_adds_epu8(v, _mm256_set1_epi8(char(value)));
}
static inline Bytes or_bytes(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
static inline Bytes xor_byte(Bytes v, uint8_t value) {
    return _mm256_xor_si256(v, _mm256_set1_epi8(char(value)));
}
static inline uint64_t equal_to(Bytes v, uint8_t value) {
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8(char(value)))));
}
static inline Bytes no_bytes() { return _mm256_setzero_si256(); }
static inline __m128i low_bytes(__m256i v) {
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(v, v), 0x08));
}
static inline void store_codes(uint8_t *at, Bytes codes) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(at), low_bytes(pairs));
}
static inline Bytes load_codes(const uint8_t *at) {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(0x0F));
}

static inline Bytes count_equal(Bytes counts, Bytes v, uint8_t value) {
    return _mm256_sub_epi8(counts, _mm256_cmpeq_epi8(v, _mm256_set1_epi8(char(value))));
}
static inline uint64_t sum_bytes(Bytes v) {
    const __m256i four = _mm256_sad_epu8(v, _mm256_setzero_si256());
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return uint64_t(_mm_cvtsi128_si64(two)) + uint64_t(_mm_extract_epi64(two, 1));
}
static inline uint64_t above(Bytes v, uint8_t value) {
    const __m256i least = _mm256_set1_epi8(char(value + 1));
    return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, least), v)));
}

constexpr int32_t SPLIT = 16;
constexpr int32_t AT_ONCE = 8;

static inline void split_some(const uint8_t *row, uint8_t *exponents, uint8_t *low) {
    const __m256i x = load_wide(row);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(x, 8), _mm256_set1_epi16(0x80));
    const __m256i rest = _mm256_and_si256(x, _mm256_set1_epi16(0x7F));
    const __m256i exponent = _mm256_and_si256(_mm256_srli_epi16(x, 7), _mm256_set1_epi16(0xFF));
    const __m256i both =
        _mm256_permute4x64_epi64(_mm256_packus_epi16(exponent, _mm256_or_si256(sign, rest)), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(exponents), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(low), _mm256_extracti128_si256(both, 1));
}

static inline void join_some(const uint8_t *exponents, const uint8_t *low, uint8_t *row) {
    const __m256i e = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(exponents)));
    const __m256i l = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(low)));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(l, 8), _mm256_set1_epi16(int16_t(0x8000)));
    const __m256i rest = _mm256_and_si256(l, _mm256_set1_epi16(0x7F));
    store_wide(row, _mm256_or_si256(_mm256_or_si256(sign, rest), _mm256_slli_epi16(e, 7)));
}

#endif

// The elements that do not fill a vector are done again as part of one that ends with the row.
static inline void split_row(const uint8_t *row, int32_t width, uint8_t *exponents, uint8_t *low) {
    int32_t i = 0;
#if defined(WR_LANES)
    for (; i + SPLIT <= width; i += SPLIT) {
        split_some(row + 2 * i, exponents + i, low + i);
    }
    if (i < width && width >= SPLIT) {
        split_some(row + 2 * (width - SPLIT), exponents + width - SPLIT, low + width - SPLIT);
        return;
    }
#endif
    for (; i < width; ++i) {
        uint16_t bits;
        memcpy(&bits, row + 2 * i, 2);
        exponents[i] = exponent_of(bits);
        low[i] = low_of(bits);
    }
}

static inline void join_row(const uint8_t *exponents, const uint8_t *low, int32_t width, uint8_t *row) {
    int32_t i = 0;
#if defined(WR_LANES)
    for (; i + SPLIT <= width; i += SPLIT) {
        join_some(exponents + i, low + i, row + 2 * i);
    }
    if (i < width && width >= SPLIT) {
        join_some(exponents + width - SPLIT, low + width - SPLIT, row + 2 * (width - SPLIT));
        return;
    }
#endif
    for (; i < width; ++i) {
        const uint16_t bits = join_bf16(exponents[i], low[i]);
        memcpy(row + 2 * i, &bits, 2);
    }
}

#if defined(WR_LANES)

static inline uint64_t first_lanes(int32_t count) {
    return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

static inline Bytes inverted_codes(Bytes exponents, const Segments &segments) {
    Bytes inverted = no_bytes();
    for (int32_t i = 0; i < segments.count; ++i) {
        const Bytes index =
            plus_saturated(minus_byte(exponents, segments.upper[i]), 0x70); // 0x80 and above give 0
        inverted = or_bytes(inverted, look_up(repeat16(segments.inverted[i]), index));
    }
    return inverted;
}

static inline uint8_t *append_escapes(uint64_t escaped, const uint8_t *exponents, uint8_t *escapes) {
    for (; escaped != 0; escaped &= escaped - 1) {
        *escapes++ = exponents[__builtin_ctzll(escaped)];
    }
    return escapes;
}

constexpr int32_t WINDOW = 16;          // exponents that are counted by vectors
constexpr int32_t COUNTED = 128 * WIDE; // exponents before a byte's count could overflow

static inline void count_few(const uint8_t *exponents, int32_t count, uint16_t *counts) {
    for (int32_t i = 0; i < count; ++i) {
        ++counts[exponents[i]];
    }
}

// Where most exponents are: about the mean of those that are not of zeros, most of the room below it.
static inline int32_t find_window(const uint8_t *exponents, int32_t count) {
    uint64_t sum = 0, others = 1;
    for (int32_t i = 0; i + WIDE <= count; i += 4 * WIDE) {
        const Bytes v = load_wide(exponents + i);
        sum += sum_bytes(v);
        others += uint64_t(WIDE - __builtin_popcountll(equal_to(v, 0)));
    }
    const int32_t first = int32_t(sum / others) - WINDOW * 5 / 8;
    return first < 0 ? 0 : first > 256 - WINDOW ? 256 - WINDOW : first;
}

static inline void count_window(const uint8_t *exponents, int32_t count, int32_t first, uint16_t *counts) {
    Bytes found[AT_ONCE];
#pragma GCC unroll 16
    for (int32_t j = 0; j < AT_ONCE; ++j) {
        found[j] = no_bytes();
    }
    for (int32_t i = 0; i < count; i += WIDE) {
        const Bytes v = minus_byte(load_wide(exponents + i), uint8_t(first));
#pragma GCC unroll 16
        for (int32_t j = 0; j < AT_ONCE; ++j) {
            found[j] = count_equal(found[j], v, uint8_t(j));
        }
    }
#pragma GCC unroll 16
    for (int32_t j = 0; j < AT_ONCE; ++j) {
        counts[first + j] = uint16_t(counts[first + j] + sum_bytes(found[j]));
    }
}

// How often each exponent occurs: those of a window by vectors, which is nearly all, and the others one by
// one.
static inline void count_exponents(const uint8_t *exponents, int32_t count, uint16_t *counts) {
    memset(counts, 0, 512);
    const int32_t first = find_window(exponents, count), whole = count - count % WIDE;
    for (int32_t from = 0; from < whole; from += COUNTED) {
        const int32_t now = whole - from < COUNTED ? whole - from : COUNTED;
        for (int32_t at = 0; at < WINDOW; at += AT_ONCE) {
            count_window(exponents + from, now, first + at, counts);
        }
    }
    for (int32_t i = 0; i < whole; i += WIDE) {
        uint64_t outside = above(minus_byte(load_wide(exponents + i), uint8_t(first)), WINDOW - 1);
        for (; outside != 0; outside &= outside - 1) {
            ++counts[exponents[i + __builtin_ctzll(outside)]];
        }
    }
    count_few(exponents + whole, count - whole, counts);
}

// Writes the codes of `count` exponents and the escaped ones, for which there is room. `exponents` has SLACK.
static inline void encode_exponents(uint8_t *exponents, int32_t count, const uint8_t *table,
                                    const uint16_t *counts, uint8_t *codes, uint8_t *escapes) {
    const Segments segments = make_segments(table, counts);
    int32_t i = 0;
    for (; i + WIDE <= count; i += WIDE) {
        const Bytes inverted = inverted_codes(load_wide(exponents + i), segments);
        escapes = append_escapes(equal_to(inverted, 0), exponents + i, escapes);
        store_codes(codes + i / 2, xor_byte(inverted, ESCAPE));
    }
    if (i == count) {
        return;
    }
    memset(exponents + count, 0, size_t(SLACK));
    uint8_t rest[WIDE], packed[WIDE / 2];
    const Bytes inverted = inverted_codes(load_wide(exponents + i), segments);
    append_escapes(equal_to(inverted, 0) & first_lanes(count - i), exponents + i, escapes);
    store_wide(rest, xor_byte(inverted, ESCAPE));
    memset(rest + (count - i), 0, size_t(WIDE - (count - i)));
    store_codes(packed, load_wide(rest));
    memcpy(codes + i / 2, packed, size_t(count - i + 1) / 2);
}

// False if there are more escapes than `capacity`. May read 32 bytes from the last code on, and writes SLACK.
static inline bool decode_exponents(const uint8_t *codes, int32_t count, const uint8_t *table,
                                    const uint8_t *escapes, int32_t capacity, uint8_t *exponents) {
    const Bytes lookup = repeat16(table);
    int32_t used = 0;
    for (int32_t i = 0; i < count; i += WIDE) {
        const Bytes some = load_codes(codes + i / 2);
        store_wide(exponents + i, look_up(lookup, some));
        uint64_t escaped = equal_to(some, ESCAPE) & first_lanes(count - i);
        if (escaped == 0) {
            continue;
        }
        if (used + __builtin_popcountll(escaped) > capacity) {
            return false;
        }
        for (; escaped != 0; escaped &= escaped - 1) {
            exponents[i + __builtin_ctzll(escaped)] = escapes[used++];
        }
    }
    return true;
}

#else

// Four tables, so that equal neighbours do not wait for each other.
static inline void count_exponents(const uint8_t *exponents, int32_t count, uint16_t *counts) {
    uint16_t parts[4][256];
    memset(parts, 0, sizeof(parts));
    for (int32_t i = 0; i < count; ++i) {
        ++parts[i & 3][exponents[i]];
    }
    for (int32_t exponent = 0; exponent < 256; ++exponent) {
        counts[exponent] =
            uint16_t(parts[0][exponent] + parts[1][exponent] + parts[2][exponent] + parts[3][exponent]);
    }
}

static inline void encode_exponents(uint8_t *exponents, int32_t count, const uint8_t *table, const uint16_t *,
                                    uint8_t *codes, uint8_t *escapes) {
    uint8_t code_of[256];
    memset(code_of, ESCAPE, sizeof(code_of));
    for (int32_t code = 0; code < TABLE_ENTRIES; ++code) {
        code_of[table[code]] = uint8_t(code);
    }
    for (int32_t i = 0; i < count; ++i) {
        const uint8_t code = code_of[exponents[i]];
        if (code == ESCAPE) {
            *escapes++ = exponents[i];
        }
        codes[i / 2] = uint8_t((i & 1) != 0 ? codes[i / 2] | code << 4 : code);
    }
}

static inline bool decode_exponents(const uint8_t *codes, int32_t count, const uint8_t *table,
                                    const uint8_t *escapes, int32_t capacity, uint8_t *exponents) {
    int32_t used = 0;
    for (int32_t i = 0; i < count; ++i) {
        const int32_t code = codes[i / 2] >> (4 * (i & 1)) & 15;
        if (code != ESCAPE) {
            exponents[i] = table[code];
        } else if (used == capacity) {
            return false;
        } else {
            exponents[i] = escapes[used++];
        }
    }
    return true;
}

#endif

} // namespace wr

#endif
