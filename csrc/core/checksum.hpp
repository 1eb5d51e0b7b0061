// The checksum of packed pages: the sum over all 8-byte words w at index i of mix(w, i), modulo 2^64, plus the length.
//
// mix is three rounds of a Feistel network on the halves of w, so a bijection for each i: a change within one word is
// always seen. Each round's function is the middle 32 bits of a 64-bit product, which every bit of its half reaches; two
// flips of the same bit in two words cancel with a probability below 2^-29, other damage with about 2^-64. Only 32-bit
// multiplications are needed, which AVX2, AVX-512, NEON and GPUs all have.
#ifndef WARMROUTE_CORE_CHECKSUM_HPP
#define WARMROUTE_CORE_CHECKSUM_HPP

#include "shape.hpp"

#if !defined(__CUDACC__) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#endif
#if !defined(__CUDACC__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace wr {

#define WR_MIX_STEP 0x9E3779B97F4A7C15ull
#define WR_MIX_1 0x85EBCA77u
#define WR_MIX_2 0xC2B2AE3Du
#define WR_MIX_3 0x27D4EB2Fu

// The value that word `index` is combined with.
WR_HD uint64_t checksum_key(uint64_t index) { return (index + 1) * WR_MIX_STEP; }

WR_HD uint64_t checksum_mix(uint64_t word, uint64_t key) {
    uint64_t low = 0xFFFFFFFFull, high = 0xFFFFFFFF00000000ull, x = word ^ key;
    x ^= (((x & low) * WR_MIX_1) << 16) & high;
    x ^= (((x >> 32) * WR_MIX_2) >> 16) & low;
    x ^= (((x & low) * WR_MIX_3) << 16) & high;
    return x;
}

// What a length adds to the sum; of no bytes it is the whole checksum.
WR_HD uint64_t checksum_length(uint64_t size) { return checksum_mix(size, 0); }

// The sum over `size` bytes whose first word has index `first`; a last partial word is filled with zeros.
WR_HD uint64_t checksum_tail(const uint8_t *bytes, uint64_t size, uint64_t first) {
    uint64_t sum = 0, key = checksum_key(first);
    for (; size >= 8; bytes += 8, size -= 8, key += WR_MIX_STEP) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        sum += checksum_mix(word, key);
    }
    if (size > 0) {
        uint64_t word = 0;
        for (uint64_t i = 0; i < size; ++i) word |= (uint64_t)bytes[i] << (8 * i);
        sum += checksum_mix(word, key);
    }
    return sum;
}

#if !defined(__CUDACC__) && defined(__AVX512F__)

static inline __m512i checksum_mix8(__m512i word, __m512i key) {
    const __m512i high = _mm512_set1_epi64((long long)0xFFFFFFFF00000000ull), low = _mm512_set1_epi64(0xFFFFFFFFll);
    const int and_xor = 0x78;  // a ^ (b & c)
    __m512i x = _mm512_xor_si512(word, key);
    __m512i p = _mm512_slli_epi64(_mm512_mul_epu32(x, _mm512_set1_epi64(WR_MIX_1)), 16);
    x = _mm512_ternarylogic_epi64(x, p, high, and_xor);
    p = _mm512_srli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(x, 32), _mm512_set1_epi64(WR_MIX_2)), 16);
    x = _mm512_ternarylogic_epi64(x, p, low, and_xor);
    p = _mm512_slli_epi64(_mm512_mul_epu32(x, _mm512_set1_epi64(WR_MIX_3)), 16);
    return _mm512_ternarylogic_epi64(x, p, high, and_xor);
}

static inline uint64_t checksum_words(const uint8_t *bytes, uint64_t size, uint64_t first) {
    uint64_t keys[8], sums[8], sum = 0, done = size & ~(uint64_t)127;
    for (uint64_t i = 0; i < 8; ++i) keys[i] = checksum_key(first + i);
    const __m512i step = _mm512_set1_epi64((long long)(8 * WR_MIX_STEP)), both = _mm512_add_epi64(step, step);
    __m512i even_key = _mm512_loadu_si512(keys), odd_key = _mm512_add_epi64(even_key, step);
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (uint64_t at = 0; at < done; at += 128) {
        even = _mm512_add_epi64(even, checksum_mix8(_mm512_loadu_si512(bytes + at), even_key));
        odd = _mm512_add_epi64(odd, checksum_mix8(_mm512_loadu_si512(bytes + at + 64), odd_key));
        even_key = _mm512_add_epi64(even_key, both);
        odd_key = _mm512_add_epi64(odd_key, both);
    }
    _mm512_storeu_si512(sums, _mm512_add_epi64(even, odd));
    for (uint64_t each : sums) sum += each;
    return sum + checksum_tail(bytes + done, size - done, first + done / 8);
}

#elif !defined(__CUDACC__) && defined(__AVX2__)

static inline __m256i checksum_mix4(__m256i word, __m256i key) {
    const __m256i high = _mm256_set1_epi64x((long long)0xFFFFFFFF00000000ull), low = _mm256_set1_epi64x(0xFFFFFFFFll);
    __m256i x = _mm256_xor_si256(word, key);
    __m256i p = _mm256_slli_epi64(_mm256_mul_epu32(x, _mm256_set1_epi64x(WR_MIX_1)), 16);
    x = _mm256_xor_si256(x, _mm256_and_si256(p, high));
    p = _mm256_srli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_set1_epi64x(WR_MIX_2)), 16);
    x = _mm256_xor_si256(x, _mm256_and_si256(p, low));
    p = _mm256_slli_epi64(_mm256_mul_epu32(x, _mm256_set1_epi64x(WR_MIX_3)), 16);
    return _mm256_xor_si256(x, _mm256_and_si256(p, high));
}

static inline uint64_t checksum_words(const uint8_t *bytes, uint64_t size, uint64_t first) {
    uint64_t keys[4], sums[4], done = size & ~(uint64_t)63;
    for (uint64_t i = 0; i < 4; ++i) keys[i] = checksum_key(first + i);
    const __m256i step = _mm256_set1_epi64x((long long)(4 * WR_MIX_STEP)), both = _mm256_add_epi64(step, step);
    __m256i even_key = _mm256_loadu_si256((const __m256i *)keys), odd_key = _mm256_add_epi64(even_key, step);
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (uint64_t at = 0; at < done; at += 64) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(bytes + at));
        __m256i b = _mm256_loadu_si256((const __m256i *)(bytes + at + 32));
        even = _mm256_add_epi64(even, checksum_mix4(a, even_key));
        odd = _mm256_add_epi64(odd, checksum_mix4(b, odd_key));
        even_key = _mm256_add_epi64(even_key, both);
        odd_key = _mm256_add_epi64(odd_key, both);
    }
    _mm256_storeu_si256((__m256i *)sums, _mm256_add_epi64(even, odd));
    return sums[0] + sums[1] + sums[2] + sums[3] + checksum_tail(bytes + done, size - done, first + done / 8);
}

#elif !defined(__CUDACC__) && defined(__ARM_NEON)

static inline uint64x2_t checksum_mix2(uint64x2_t word, uint64x2_t key) {
    const uint64x2_t high = vdupq_n_u64(0xFFFFFFFF00000000ull), low = vdupq_n_u64(0xFFFFFFFFull);
    uint64x2_t x = veorq_u64(word, key);
    uint64x2_t p = vshlq_n_u64(vmull_n_u32(vmovn_u64(x), WR_MIX_1), 16);
    x = veorq_u64(x, vandq_u64(p, high));
    p = vshrq_n_u64(vmull_n_u32(vshrn_n_u64(x, 32), WR_MIX_2), 16);
    x = veorq_u64(x, vandq_u64(p, low));
    p = vshlq_n_u64(vmull_n_u32(vmovn_u64(x), WR_MIX_3), 16);
    return veorq_u64(x, vandq_u64(p, high));
}

static inline uint64_t checksum_words(const uint8_t *bytes, uint64_t size, uint64_t first) {
    uint64_t keys[2] = {checksum_key(first), checksum_key(first + 1)}, done = size & ~(uint64_t)31;
    const uint64x2_t step = vdupq_n_u64(2 * WR_MIX_STEP), both = vaddq_u64(step, step);
    uint64x2_t even_key = vld1q_u64(keys), odd_key = vaddq_u64(even_key, step);
    uint64x2_t even = vdupq_n_u64(0), odd = even;
    for (uint64_t at = 0; at < done; at += 32) {
        uint64x2_t a = vreinterpretq_u64_u8(vld1q_u8(bytes + at)), b = vreinterpretq_u64_u8(vld1q_u8(bytes + at + 16));
        even = vaddq_u64(even, checksum_mix2(a, even_key));
        odd = vaddq_u64(odd, checksum_mix2(b, odd_key));
        even_key = vaddq_u64(even_key, both);
        odd_key = vaddq_u64(odd_key, both);
    }
    return vaddvq_u64(vaddq_u64(even, odd)) + checksum_tail(bytes + done, size - done, first + done / 8);
}

#else

WR_HD uint64_t checksum_words(const uint8_t *bytes, uint64_t size, uint64_t first) {
    return checksum_tail(bytes, size, first);
}

#endif

WR_HD uint64_t checksum(const uint8_t *bytes, uint64_t size) {
    return checksum_words(bytes, size, 0) + checksum_length(size);
}

}  // namespace wr

#endif
