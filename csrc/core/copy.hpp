// Copying bytes between memory that does not overlap.
#ifndef WARMROUTE_CORE_COPY_HPP
#define WARMROUTE_CORE_COPY_HPP

#include "shape.hpp"

#if !defined(__CUDACC__) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#endif

namespace wr {

static inline void copy_bytes(uint8_t *to, const uint8_t *from, uint64_t size) { memcpy(to, from, size); }

// `rows` times `size` bytes, from rows that lie `from_stride` apart to rows that lie `to_stride` apart.
static inline void copy_rows(uint8_t *to, int64_t to_stride, const uint8_t *from, int64_t from_stride, uint64_t size,
                             int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) copy_bytes(to + row * to_stride, from + row * from_stride, size);
}

}  // namespace wr

#endif
