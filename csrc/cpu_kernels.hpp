// The core compiled for one instruction set, as functions to choose from at run time.
#ifndef WARMROUTE_CPU_KERNELS_HPP
#define WARMROUTE_CPU_KERNELS_HPP

#include "core/shape.hpp"

namespace wr {

struct Grid;

struct Kernels {
    const char *name;
    void (*prefetch)(const uint8_t *bytes, uint64_t size, bool written);
    void (*copy)(uint8_t *to, const uint8_t *from, uint64_t size);
    void (*stream)(uint8_t *to, const uint8_t *from, uint64_t size);
    void (*stream_end)();
    void (*copy_grid)(uint8_t *to, const uint8_t *from, const Grid &grid);
    uint64_t (*checksum_words)(const uint8_t *bytes, uint64_t size, uint64_t first);
    uint32_t (*crc32c)(uint32_t crc, const uint8_t *bytes, uint64_t size);
    int (*encode)(const UnitShape &shape, int encoding, const uint8_t *content, int64_t token_stride, uint8_t *out);
    int (*decode)(const UnitShape &shape, int encoding, const uint8_t *in, uint8_t *content, int64_t token_stride,
                  const Rotation *rotation);
    void (*rotate)(const UnitShape &shape, uint8_t *content, int64_t token_stride, const Rotation &rotation);
};

// What this processor runs of a wr_isa; null if it does not, or this build lacks it.
const Kernels *kernels_of(int32_t isa);

// The best of them.
const Kernels &best_kernels();

}  // namespace wr

#endif
