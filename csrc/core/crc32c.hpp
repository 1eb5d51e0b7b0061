// CRC-32C (Castagnoli; RFC 3720, appendix B.4). With CRC instructions three streams run at once, whose results are joined
// by tables that carry a checksum over as many zero bytes as follow it (Mark Adler's method). Without, eight tables. Where
// vectors can be multiplied without carry, long runs are folded instead: 16 bytes are replaced by what has the same
// remainder further on (Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ, Intel 2009).
#ifndef WARMROUTE_CORE_CRC32C_HPP
#define WARMROUTE_CORE_CRC32C_HPP

#include "shape.hpp"

#if defined(__AVX512BW__) && !defined(__CUDACC__)
#define WR_CRC_FOLDS __attribute__((target("pclmul,vpclmulqdq")))
#include <immintrin.h>
#endif
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace wr {

#define WR_CRC_POLYNOMIAL 0x82F63B78u

struct CrcTables {
    uint32_t of[8][256];
};

struct CrcShift {
    uint32_t of[4][256];
};

static constexpr CrcTables make_crc_tables() {
    CrcTables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ WR_CRC_POLYNOMIAL : crc >> 1;
        tables.of[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; ++byte)
        for (int table = 1; table < 8; ++table) {
            uint32_t crc = tables.of[table - 1][byte];
            tables.of[table][byte] = (crc >> 8) ^ tables.of[0][crc & 255];
        }
    return tables;
}

static constexpr CrcTables CRC_TABLES = make_crc_tables();

static inline uint64_t crc_word(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    return word;
}

#if defined(__SSE4_2__) || defined(__ARM_FEATURE_CRC32)

#define WR_CRC_LONG 2048
#define WR_CRC_SHORT 256

// A linear map over GF(2) of 32 bits: the images of the single bits.
struct CrcMap {
    uint32_t of[32];
};

static constexpr uint32_t crc_apply(const CrcMap &map, uint32_t value) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit)
        if ((value >> bit) & 1) result ^= map.of[bit];
    return result;
}

// What `bytes` zero bytes, a power of two, make of a checksum.
static constexpr CrcMap crc_zeros(uint32_t bytes) {
    CrcMap map{};
    map.of[0] = WR_CRC_POLYNOMIAL;  // one zero bit
    for (int bit = 1; bit < 32; ++bit) map.of[bit] = 1u << (bit - 1);
    for (uint32_t bits = 1; bits < 8 * bytes; bits *= 2) {
        CrcMap twice{};
        for (int bit = 0; bit < 32; ++bit) twice.of[bit] = crc_apply(map, map.of[bit]);
        map = twice;
    }
    return map;
}

static constexpr CrcShift make_crc_shift(uint32_t bytes) {
    CrcMap map = crc_zeros(bytes);
    CrcShift shift{};
    for (uint32_t byte = 0; byte < 256; ++byte)
        for (int at = 0; at < 4; ++at) shift.of[at][byte] = crc_apply(map, byte << (8 * at));
    return shift;
}

static constexpr CrcShift CRC_LONG_SHIFT = make_crc_shift(WR_CRC_LONG), CRC_SHORT_SHIFT = make_crc_shift(WR_CRC_SHORT);

static inline uint64_t crc_shift(const CrcShift &shift, uint64_t crc) {
    return shift.of[0][crc & 255] ^ shift.of[1][(crc >> 8) & 255] ^ shift.of[2][(crc >> 16) & 255] ^
           shift.of[3][(crc >> 24) & 255];
}

#if defined(__SSE4_2__)
static inline uint64_t crc_step(uint64_t crc, uint64_t word) { return _mm_crc32_u64(crc, word); }
static inline uint64_t crc_step_byte(uint64_t crc, uint8_t byte) { return _mm_crc32_u8((uint32_t)crc, byte); }
#else
static inline uint64_t crc_step(uint64_t crc, uint64_t word) { return __crc32cd((uint32_t)crc, word); }
static inline uint64_t crc_step_byte(uint64_t crc, uint8_t byte) { return __crc32cb((uint32_t)crc, byte); }
#endif

// Whole triples of `part` bytes; returns how many bytes were taken.
static inline uint64_t crc_triples(uint64_t &crc, const uint8_t *bytes, uint64_t size, uint64_t part,
                                   const CrcShift &shift) {
    uint64_t done = 0;
    for (; size - done >= 3 * part; done += 3 * part) {
        uint64_t second = 0, third = 0;
        const uint8_t *at = bytes + done;
        for (const uint8_t *end = at + part; at < end; at += 8) {
            crc = crc_step(crc, crc_word(at));
            second = crc_step(second, crc_word(at + part));
            third = crc_step(third, crc_word(at + 2 * part));
        }
        crc = crc_shift(shift, crc_shift(shift, crc) ^ second) ^ third;
    }
    return done;
}

#if defined(WR_CRC_FOLDS)

#define WR_CRC_FOLDED 1024  // from here on folding pays

// x to a power, modulo the polynomial.
static constexpr uint64_t crc_power(uint32_t exponent) {
    uint64_t value = 0x80000000u;
    for (uint32_t at = 0; at < exponent; ++at) value = (value >> 1) ^ ((value & 1) ? WR_CRC_POLYNOMIAL : 0);
    return value;
}

// What the halves of 16 bytes are multiplied by to stand for them `bytes` further on.
template <uint32_t bytes>
struct CrcFold {
    static constexpr long long low = (long long)crc_power(8 * bytes + 31), high = (long long)crc_power(8 * bytes - 33);
};

WR_CRC_FOLDS static inline __m512i crc_fold(__m512i value, __m512i factors, __m512i onto) {
    __m512i low = _mm512_clmulepi64_epi128(value, factors, 0x00), high = _mm512_clmulepi64_epi128(value, factors, 0x11);
    return _mm512_ternarylogic_epi64(low, high, onto, 0x96);
}

template <uint32_t bytes>
WR_CRC_FOLDS static inline __m512i crc_factors() {
    return _mm512_broadcast_i32x4(_mm_set_epi64x(CrcFold<bytes>::high, CrcFold<bytes>::low));
}

// Whole runs of 256 bytes, one at least; returns how many bytes were taken.
WR_CRC_FOLDS static inline uint64_t crc_runs(uint64_t &crc, const uint8_t *bytes, uint64_t size) {
    __m512i runs[4];
    for (int i = 0; i < 4; ++i) runs[i] = _mm512_loadu_si512(bytes + 64 * i);
    runs[0] = _mm512_xor_si512(runs[0], _mm512_maskz_set1_epi64(1, (long long)crc));
    uint64_t done = 256;
    const __m512i ahead = crc_factors<256>(), beside = crc_factors<64>();
    for (; size - done >= 256; done += 256)
        for (int i = 0; i < 4; ++i) runs[i] = crc_fold(runs[i], ahead, _mm512_loadu_si512(bytes + done + 64 * i));
    for (int i = 0; i < 3; ++i) runs[i + 1] = crc_fold(runs[i], beside, runs[i + 1]);
    const __m512i within = _mm512_set_epi64(0, 0, CrcFold<16>::high, CrcFold<16>::low, CrcFold<32>::high,
                                            CrcFold<32>::low, CrcFold<48>::high, CrcFold<48>::low);
    __m512i parts = crc_fold(runs[3], within, _mm512_maskz_mov_epi64(0xC0, runs[3]));
    uint64_t words[8], last[2] = {0, 0};
    _mm512_storeu_si512(words, parts);
    for (int i = 0; i < 8; ++i) last[i & 1] ^= words[i];
    crc = crc_step(crc_step(0, last[0]), last[1]);
    return done;
}

static inline uint64_t crc_folded(uint64_t &crc, const uint8_t *bytes, uint64_t size) {
    return size >= WR_CRC_FOLDED && __builtin_cpu_supports("vpclmulqdq") ? crc_runs(crc, bytes, size) : 0;
}

#else

static inline uint64_t crc_folded(uint64_t &, const uint8_t *, uint64_t) { return 0; }

#endif

static inline uint32_t crc32c(uint32_t before, const uint8_t *bytes, uint64_t size) {
    uint64_t crc = ~before & 0xFFFFFFFFu;
    uint64_t done = crc_folded(crc, bytes, size);
    done += crc_triples(crc, bytes + done, size - done, WR_CRC_LONG, CRC_LONG_SHIFT);
    done += crc_triples(crc, bytes + done, size - done, WR_CRC_SHORT, CRC_SHORT_SHIFT);
    for (; size - done >= 8; done += 8) crc = crc_step(crc, crc_word(bytes + done));
    for (; done < size; ++done) crc = crc_step_byte(crc, bytes[done]);
    return ~(uint32_t)crc;
}

#else

static inline uint32_t crc32c(uint32_t before, const uint8_t *bytes, uint64_t size) {
    uint32_t crc = ~before;
    for (; size >= 8; bytes += 8, size -= 8) {
        uint64_t word = crc_word(bytes) ^ crc;
        uint32_t next = 0;
        for (int at = 0; at < 8; ++at) next ^= CRC_TABLES.of[7 - at][(word >> (8 * at)) & 255];
        crc = next;
    }
    for (; size > 0; ++bytes, --size) crc = (crc >> 8) ^ CRC_TABLES.of[0][(crc ^ *bytes) & 255];
    return ~crc;
}

#endif

}  // namespace wr

#endif
