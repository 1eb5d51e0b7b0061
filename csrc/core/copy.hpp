// Copying bytes between memory that does not overlap, on a CPU.
//
// Blocks are small and scattered, so that what limits a copy is how soon the processor asks for the next block: callers
// announce blocks with prefetch_bytes() a little ahead. Runs from `string_from` bytes on are left to the processor's own
// string copy, which on Intel's processors writes without reading what it overwrites; elsewhere, to the C library.
#ifndef WARMROUTE_CORE_COPY_HPP
#define WARMROUTE_CORE_COPY_HPP

#include "shape.hpp"

#if !defined(__CUDACC__) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

namespace wr {

#define WR_NO_STRING_COPY UINT64_MAX
#define WR_SHORT_COPY 512

// At most a memory page of it: what follows, the processor foresees.
static inline void prefetch_bytes(const uint8_t *bytes, uint64_t size, bool written) {
    uint64_t end = size < 4096 ? size : 4096;
    if (written)
        for (uint64_t at = 0; at < end; at += 64) __builtin_prefetch(bytes + at, 1, 3);
    else
        for (uint64_t at = 0; at < end; at += 64) __builtin_prefetch(bytes + at, 0, 3);
}

// Up to WR_SHORT_COPY bytes.
#if defined(__AVX512BW__)
static inline void copy_short(uint8_t *to, const uint8_t *from, uint64_t size) {
    uint64_t at = 0;
    for (; at + 64 <= size; at += 64) _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
    if (at == size) return;
    __mmask64 rest = (1ull << (size - at)) - 1;
    _mm512_mask_storeu_epi8(to + at, rest, _mm512_maskz_loadu_epi8(rest, from + at));
}
#elif defined(__AVX2__)
static inline void copy_short(uint8_t *to, const uint8_t *from, uint64_t size) {
    if (size < 32) {
        memcpy(to, from, size);
        return;
    }
    __m256i last = _mm256_loadu_si256((const __m256i *)(from + size - 32));
    for (uint64_t at = 0; at + 32 <= size; at += 32)
        _mm256_storeu_si256((__m256i *)(to + at), _mm256_loadu_si256((const __m256i *)(from + at)));
    _mm256_storeu_si256((__m256i *)(to + size - 32), last);
}
#else
static inline void copy_short(uint8_t *to, const uint8_t *from, uint64_t size) { memcpy(to, from, size); }
#endif

static inline void copy_bytes(uint8_t *to, const uint8_t *from, uint64_t size, uint64_t string_from) {
#if defined(__x86_64__)
    if (size >= string_from) {
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
        return;
    }
#else
    (void)string_from;
#endif
    if (size <= WR_SHORT_COPY)
        copy_short(to, from, size);
    else
        memcpy(to, from, size);
}

// `outer` times `inner` runs of `size` bytes, which lie as far apart as the strides say.
struct Grid {
    int64_t outer, inner;
    int64_t to_outer, to_inner, from_outer, from_inner;
    uint64_t size;
};

static inline void copy_grid(uint8_t *to, const uint8_t *from, const Grid &grid, uint64_t string_from) {
    for (int64_t i = 0; i < grid.outer; ++i)
        for (int64_t j = 0; j < grid.inner; ++j)
            copy_bytes(to + i * grid.to_outer + j * grid.to_inner, from + i * grid.from_outer + j * grid.from_inner,
                       grid.size, string_from);
}

}  // namespace wr

#endif
