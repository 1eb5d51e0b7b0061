// Vectors of binary32 for the instruction set that this translation unit is compiled for: AVX-512 (F, BW, DQ,
// VL) or AVX2 with F16C. WR_LANES is how many elements a vector has, and is not defined where there is
// neither: loops over single elements, which compilers may vectorize, are then all there is.
#ifndef WARMROUTE_CORE_LANES_HPP
#define WARMROUTE_CORE_LANES_HPP

#include "half.hpp"

#if !defined(__CUDACC__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#define WR_LANES 16

namespace wr {

typedef __m512 Floats;
typedef __m512i Words;
typedef __mmask16 Mask;

static inline Words words(uint32_t value) { return _mm512_set1_epi32(int32_t(value)); }
static inline Floats floats(float value) { return _mm512_set1_ps(value); }
static inline Floats as_floats(Words v) { return _mm512_castsi512_ps(v); }
static inline Words as_words(Floats v) { return _mm512_castps_si512(v); }
static inline Floats vmul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats vadd(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats vsub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Words vadd(Words a, Words b) { return _mm512_add_epi32(a, b); }
static inline Words vsub(Words a, Words b) { return _mm512_sub_epi32(a, b); }
static inline Words vand(Words a, Words b) { return _mm512_and_si512(a, b); }
static inline Words vor(Words a, Words b) { return _mm512_or_si512(a, b); }
static inline Words vmin(Words a, Words b) { return _mm512_min_epi32(a, b); }
static inline Words vmax(Words a, Words b) { return _mm512_max_epi32(a, b); }
template <int bits> static inline Words shift_left(Words v) { return _mm512_slli_epi32(v, bits); }
template <int bits> static inline Words shift_right(Words v) { return _mm512_srli_epi32(v, bits); }
static inline Mask greater(Words a, Words b) { return _mm512_cmpgt_epi32_mask(a, b); }
static inline Words select(Mask mask, Words yes, Words no) { return _mm512_mask_mov_epi32(no, mask, yes); }

static inline bool any_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
static inline Floats swap_neighbours(Floats v) { return _mm512_permute_ps(v, 0xB1); }

static inline Floats load_floats(const void *at) { return _mm512_loadu_ps(at); }
static inline Words load_words(const void *at) { return _mm512_loadu_si512(at); }
static inline void store_words(void *at, Words v) { _mm512_storeu_si512(at, v); }
static inline __m256i load_halves(const void *at) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(at));
}
static inline Words widen_halves(const void *at) { return _mm512_cvtepu16_epi32(load_halves(at)); }
static inline Words widen_bytes(const void *at) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(at)));
}
static inline Words widen_signed_bytes(const void *at) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(at)));
}
static inline void store_halves(void *at, Words v) {
    _mm256_storeu_si256(static_cast<__m256i *>(at), _mm512_cvtepi32_epi16(v));
}
static inline void store_bytes(void *at, Words v) {
    _mm_storeu_si128(static_cast<__m128i *>(at), _mm512_cvtepi32_epi8(v));
}
static inline Floats to_floats(Words v) { return _mm512_cvtepi32_ps(v); }
static inline Words to_integers(Floats v) { return _mm512_cvtps_epi32(v); }
static inline Floats load_f16(const void *at) { return _mm512_cvtph_ps(load_halves(at)); }
static inline void store_f16(void *at, Floats v) {
    _mm256_storeu_si256(static_cast<__m256i *>(at), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline uint32_t largest_word(Words v) { return uint32_t(_mm512_reduce_max_epi32(v)); }

// 32 elements of 16 bits, compared as signed numbers.
static inline Words halves(uint16_t value) { return _mm512_set1_epi16(int16_t(value)); }
static inline Words max_halves(Words a, Words b) { return _mm512_max_epi16(a, b); }
static inline Words min_halves(Words a, Words b) { return _mm512_min_epi16(a, b); }
static inline Words where_greater(Words a, Words b, Words yes, Words no) {
    return _mm512_mask_mov_epi16(no, _mm512_cmpgt_epi16_mask(a, b), yes);
}
static inline Words shift_halves_right_8(Words v) { return _mm512_srli_epi16(v, 8); }
static inline Words merge_halves(Words even, Words odd) {
    return _mm512_mask_mov_epi16(even, 0xAAAAAAAAu, _mm512_slli_epi32(odd, 16));
}
static inline void store_low_bytes(void *at, Words v) {
    _mm256_storeu_si256(static_cast<__m256i *>(at), _mm512_cvtepi16_epi8(v));
}
// Words below 2^16, those of `low` first.
static inline Words pack_halves(Words low, Words high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high),
                              1);
}
static inline uint16_t largest_half(Words v) {
    const __m256i some = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(some), _mm256_extracti128_si256(some, 1));
    return uint16_t(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)))));
}

// 256 times smaller than the e4m3 values of 16 codes: e4m3 is an f16 with a shorter mantissa and another
// bias.
static inline Floats load_e4m3(const void *at) {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i *>(at)));
    const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(0x3F80));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(codes, 8), _mm256_set1_epi16(int16_t(0x8000)));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x3F80));
    const __m256i values = _mm256_or_si256(magnitude, sign);
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(values, nan, _mm256_set1_epi16(0x7E00)));
}

} // namespace wr

#elif !defined(__CUDACC__) && defined(__AVX2__) && defined(__F16C__)

#define WR_LANES 8

namespace wr {

typedef __m256 Floats;
typedef __m256i Words;
typedef __m256i Mask;

static inline Words words(uint32_t value) { return _mm256_set1_epi32(int32_t(value)); }
static inline Floats floats(float value) { return _mm256_set1_ps(value); }
static inline Floats as_floats(Words v) { return _mm256_castsi256_ps(v); }
static inline Words as_words(Floats v) { return _mm256_castps_si256(v); }
static inline Floats vmul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats vadd(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats vsub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Words vadd(Words a, Words b) { return _mm256_add_epi32(a, b); }
static inline Words vsub(Words a, Words b) { return _mm256_sub_epi32(a, b); }
static inline Words vand(Words a, Words b) { return _mm256_and_si256(a, b); }
static inline Words vor(Words a, Words b) { return _mm256_or_si256(a, b); }
static inline Words vmin(Words a, Words b) { return _mm256_min_epi32(a, b); }
static inline Words vmax(Words a, Words b) { return _mm256_max_epi32(a, b); }
template <int bits> static inline Words shift_left(Words v) { return _mm256_slli_epi32(v, bits); }
template <int bits> static inline Words shift_right(Words v) { return _mm256_srli_epi32(v, bits); }
static inline Mask greater(Words a, Words b) { return _mm256_cmpgt_epi32(a, b); }
static inline Words select(Mask mask, Words yes, Words no) { return _mm256_blendv_epi8(no, yes, mask); }

static inline bool any_nan(Floats a, Floats b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
}
static inline Floats swap_neighbours(Floats v) { return _mm256_permute_ps(v, 0xB1); }

static inline Floats load_floats(const void *at) { return _mm256_loadu_ps(static_cast<const float *>(at)); }
static inline Words load_words(const void *at) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(at));
}
static inline void store_words(void *at, Words v) { _mm256_storeu_si256(static_cast<__m256i *>(at), v); }
static inline __m128i load_halves(const void *at) {
    return _mm_loadu_si128(static_cast<const __m128i *>(at));
}
static inline __m128i load_eight(const void *at) { return _mm_loadl_epi64(static_cast<const __m128i *>(at)); }
static inline Words widen_halves(const void *at) { return _mm256_cvtepu16_epi32(load_halves(at)); }
static inline Words widen_bytes(const void *at) { return _mm256_cvtepu8_epi32(load_eight(at)); }
static inline Words widen_signed_bytes(const void *at) { return _mm256_cvtepi8_epi32(load_eight(at)); }
static inline __m128i low_halves(Words v) {
    const __m256i in_lanes =
        _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                                1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(in_lanes, 0x08));
}
static inline void store_halves(void *at, Words v) {
    _mm_storeu_si128(static_cast<__m128i *>(at), low_halves(v));
}
static inline void store_bytes(void *at, Words v) {
    const __m256i in_lanes =
        _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i bytes =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(in_lanes), _mm256_extracti128_si256(in_lanes, 1));
    _mm_storel_epi64(static_cast<__m128i *>(at), bytes);
}
static inline Floats to_floats(Words v) { return _mm256_cvtepi32_ps(v); }
static inline Words to_integers(Floats v) { return _mm256_cvtps_epi32(v); }
static inline Floats load_f16(const void *at) { return _mm256_cvtph_ps(load_halves(at)); }
static inline void store_f16(void *at, Floats v) {
    _mm_storeu_si128(static_cast<__m128i *>(at), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline uint32_t largest_word(Words v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return uint32_t(_mm_cvtsi128_si32(four));
}

// 16 elements of 16 bits, compared as signed numbers.
static inline Words halves(uint16_t value) { return _mm256_set1_epi16(int16_t(value)); }
static inline Words max_halves(Words a, Words b) { return _mm256_max_epi16(a, b); }
static inline Words min_halves(Words a, Words b) { return _mm256_min_epi16(a, b); }
static inline Words where_greater(Words a, Words b, Words yes, Words no) {
    return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi16(a, b));
}
static inline Words shift_halves_right_8(Words v) { return _mm256_srli_epi16(v, 8); }
static inline Words merge_halves(Words even, Words odd) {
    return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
}
static inline void store_low_bytes(void *at, Words v) {
    const __m256i in_lanes = _mm256_packus_epi16(v, v);
    _mm_storeu_si128(static_cast<__m128i *>(at),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(in_lanes, 0x08)));
}
// Words below 2^16, those of `low` first.
static inline Words pack_halves(Words low, Words high) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}
static inline uint16_t largest_half(Words v) {
    const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return uint16_t(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)))));
}

// 256 times smaller than the e4m3 values of 8 codes: e4m3 is an f16 with a shorter mantissa and another bias.
static inline Floats load_e4m3(const void *at) {
    const __m128i codes = _mm_cvtepu8_epi16(load_eight(at));
    const __m128i magnitude = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(0x3F80));
    const __m128i sign = _mm_and_si128(_mm_slli_epi16(codes, 8), _mm_set1_epi16(int16_t(0x8000)));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x3F80));
    return _mm256_cvtph_ps(_mm_blendv_epi8(_mm_or_si128(magnitude, sign), _mm_set1_epi16(0x7E00), nan));
}

} // namespace wr

#endif

#endif
