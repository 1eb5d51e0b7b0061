// Included by one source file per instruction set, which is compiled with its flags: WR_KERNELS is the table's name and
// WR_KERNELS_TEXT what wr_describe calls it.
#include "core/checksum.hpp"
#if __has_include("core/codec.hpp")
#include "core/codec.hpp"
#include "core/rotate.hpp"
#else
namespace wr {
static inline int64_t unit_bytes(const wr_view &v, int e) { return e == WR_RAW ? (int64_t)v.tokens * v.content_bytes : (int64_t)WR_UNSUPPORTED; }
static inline int encode_unit(const UnitShape &, int, const uint8_t *, int64_t, uint8_t *) { return WR_UNSUPPORTED; }
static inline int decode_unit(const UnitShape &, int, const uint8_t *, uint8_t *, int64_t, const Rotation *) { return WR_UNSUPPORTED; }
static inline void rotate_unit(const UnitShape &, uint8_t *, int64_t, const Rotation &) {}
}
#endif
#include "core/copy.hpp"
#include "core/crc32c.hpp"

#include "cpu_kernels.hpp"

namespace wr {

const Kernels WR_KERNELS = {WR_KERNELS_TEXT, copy_bytes,  copy_rows,   checksum_words,
                            crc32c,          encode_unit, decode_unit, rotate_unit};

}  // namespace wr
