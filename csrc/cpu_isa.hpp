// Included by one source file per instruction set, which is compiled with its flags: WR_KERNELS is the table's name and
// WR_KERNELS_TEXT what wr_describe calls it.
#include "core/checksum.hpp"
#include "core/codec.hpp"
#include "core/copy.hpp"
#include "core/crc32c.hpp"
#include "core/rotate.hpp"
#include "cpu_kernels.hpp"

namespace wr {

extern const Kernels WR_KERNELS;
const Kernels WR_KERNELS = {WR_KERNELS_TEXT, prefetch_bytes, copy_bytes,  stream_bytes, stream_end, copy_grid,
                            checksum_words,  crc32c,         encode_unit, decode_unit,  rotate_unit};

}  // namespace wr
