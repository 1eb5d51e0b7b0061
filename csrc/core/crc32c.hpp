// CRC-32C (Castagnoli; RFC 3720, appendix B.4). With CRC instructions three streams run at once, whose results are joined
// by tables that carry a checksum over as many zero bytes as follow it (Mark Adler's method). Without, eight tables.
#ifndef WARMROUTE_CORE_CRC32C_HPP
#define WARMROUTE_CORE_CRC32C_HPP

#include "shape.hpp"

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

static inline uint32_t crc32c(uint32_t before, const uint8_t *bytes, uint64_t size) {
    uint64_t crc = ~before;
    uint64_t done = crc_triples(crc, bytes, size, WR_CRC_LONG, CRC_LONG_SHIFT);
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
