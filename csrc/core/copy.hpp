// Copying bytes between memory that does not overlap, on a CPU.
//
// Blocks lie scattered, so what limits reading them is how soon the processor asks for the next one: prefetch_bytes()
// announces it a little ahead. Much that is written all over a cache of gigabytes goes past the processor's caches
// (stream_bytes), which saves reading what is overwritten.
#ifndef WARMROUTE_CORE_COPY_HPP
#define WARMROUTE_CORE_COPY_HPP

#include "shape.hpp"

#if !defined(__CUDACC__) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

namespace wr {

#define WR_SHORT_COPY 512    // up to here calling the C library costs more than it saves
#define WR_PART 4096         // of what is streamed
#define WR_PREFETCH 2048     // of a run; the processor foresees what follows

// How many runs ahead one of `size` bytes is announced.
static inline int64_t runs_ahead(uint64_t size) { return size < WR_PREFETCH ? 4 : 2; }

static inline void prefetch_bytes(const uint8_t *bytes, uint64_t size, bool written) {
    uint64_t end = size < WR_PREFETCH ? size : WR_PREFETCH;
    if (written)
        for (uint64_t at = 0; at < end; at += 64) __builtin_prefetch(bytes + at, 1, 3);
    else
        for (uint64_t at = 0; at < end; at += 64) __builtin_prefetch(bytes + at, 0, 3);
}

#if defined(__AVX512BW__)

static inline void copy_short(uint8_t *to, const uint8_t *from, uint64_t size) {
    uint64_t at = 0;
    for (; at + 64 <= size; at += 64) _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
    if (at == size) return;
    __mmask64 rest = (1ull << (size - at)) - 1;
    _mm512_mask_storeu_epi8(to + at, rest, _mm512_maskz_loadu_epi8(rest, from + at));
}

static inline void stream_line(uint8_t *to, const uint8_t *from) {
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
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

static inline void stream_line(uint8_t *to, const uint8_t *from) {
    __m256i first = _mm256_loadu_si256((const __m256i *)from);
    __m256i second = _mm256_loadu_si256((const __m256i *)(from + 32));
    _mm256_stream_si256((__m256i *)to, first);
    _mm256_stream_si256((__m256i *)(to + 32), second);
}

#else

static inline void copy_short(uint8_t *to, const uint8_t *from, uint64_t size) { memcpy(to, from, size); }

#endif

static inline void copy_bytes(uint8_t *to, const uint8_t *from, uint64_t size) {
    if (size <= WR_SHORT_COPY)
        copy_short(to, from, size);
    else
        memcpy(to, from, size);
}

#if defined(__AVX2__)

// `parts` of WR_PART bytes side by side: memory answers for several of its pages at once, as the C library has it do.
template <uint64_t parts>
static inline uint64_t stream_parts(uint8_t *to, const uint8_t *from, uint64_t size) {
    uint64_t done = 0;
    for (; size - done >= parts * WR_PART; done += parts * WR_PART)
        for (uint64_t at = done; at < done + WR_PART; at += 64)
            for (uint64_t part = 0; part < parts; ++part) {
                __builtin_prefetch(from + at + part * WR_PART + 512, 0, 3);
                stream_line(to + at + part * WR_PART, from + at + part * WR_PART);
            }
    return done;
}

#endif

// Visible to other threads only after stream_end().
static inline void stream_bytes(uint8_t *to, const uint8_t *from, uint64_t size) {
#if defined(__AVX2__)
    if ((((uintptr_t)to | size) & 63) == 0) {
        uint64_t at = stream_parts<4>(to, from, size);
        for (; at < size; at += 64) {
            __builtin_prefetch(from + at + 512, 0, 3);
            stream_line(to + at, from + at);
        }
        return;
    }
#endif
    copy_bytes(to, from, size);
}

static inline void stream_end() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// `outer` times `inner` runs of `size` bytes, which lie as far apart as the strides say. Where each of `outer` is one run,
// those to come are announced on the side that is scattered, `to` or `from`.
struct Grid {
    int64_t outer, inner;
    int64_t to_outer, to_inner, from_outer, from_inner;
    uint64_t size;
    bool to_scattered, stream;
};

static inline void copy_grid(uint8_t *to, const uint8_t *from, const Grid &grid) {
    const int64_t ahead = runs_ahead(grid.size);
    for (int64_t i = 0; i < grid.outer; ++i, to += grid.to_outer, from += grid.from_outer) {
        if (grid.inner == 1 && !grid.stream && i + ahead < grid.outer)
            prefetch_bytes(grid.to_scattered ? to + ahead * grid.to_outer : from + ahead * grid.from_outer, grid.size,
                           grid.to_scattered);
        for (int64_t j = 0; j < grid.inner; ++j) {
            uint8_t *target = to + j * grid.to_inner;
            const uint8_t *source = from + j * grid.from_inner;
            if (grid.stream)
                stream_bytes(target, source, grid.size);
            else
                copy_bytes(target, source, grid.size);
        }
    }
}

}  // namespace wr

#endif
