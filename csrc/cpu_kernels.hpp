// The core compiled for one instruction set, as functions to choose from at run time.
#ifndef WARMROUTE_CPU_KERNELS_HPP
#define WARMROUTE_CPU_KERNELS_HPP

#include "core/shape.hpp"

namespace wr {

struct Kernels {
    const char *name;
    void (*copy)(uint8_t *to, const uint8_t *from, uint64_t size);
    void (*copy_rows)(uint8_t *to, int64_t to_stride, const uint8_t *from, int64_t from_stride, uint64_t size,
                      int64_t rows);
    uint64_t (*checksum_words)(const uint8_t *bytes, uint64_t size, uint64_t first);
    uint32_t (*crc32c)(uint32_t crc, const uint8_t *bytes, uint64_t size);
    int (*encode)(const UnitShape &shape, int encoding, const uint8_t *content, int64_t token_stride, uint8_t *out);
    int (*decode)(const UnitShape &shape, int encoding, const uint8_t *in, uint8_t *content, int64_t token_stride,
                  const Rotation *rotation);
    void (*rotate)(const UnitShape &shape, uint8_t *content, int64_t token_stride, const Rotation &rotation);
};

extern const Kernels PORTABLE_KERNELS;
#if defined(WR_WITH_X86)
extern const Kernels AVX2_KERNELS, AVX512_KERNELS;
#endif
#if defined(WR_WITH_NEON)
extern const Kernels NEON_KERNELS;
#endif

}  // namespace wr

#endif
