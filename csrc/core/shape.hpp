// The shapes that the parts of the core agree on, for g++ and nvcc.
//
// The core is compiled several times into one library, each time for another instruction set. So that the linker never
// gives code for one to another, every function of the core is WR_HD (internal linkage), its structs have no member
// functions, and it uses no template of the standard library. Floating-point contraction is off (-ffp-contract=off,
// --fmad=false), so that all of them round alike.
#ifndef WARMROUTE_CORE_SHAPE_HPP
#define WARMROUTE_CORE_SHAPE_HPP

#include <stdint.h>
#include <string.h>

#include "../warmroute.h"

#if defined(__CUDACC__)
#define WR_HD static inline __host__ __device__
#else
#define WR_HD static inline
#endif

namespace wr {

// The content of one unit, which is a (layer, block, head): `tokens` times `content_bytes`, of which k_bytes at k_offset
// are K and v_bytes at v_offset are V. What is neither is padding, which raw forms carry along.
struct UnitShape {
    int32_t tokens, content_bytes, dtype;
    int32_t k_offset, k_bytes, v_offset, v_bytes;
};

// A wr_rotation, prepared: the same factors in the precision of the arithmetic. `cosines` and `sines` are used for
// WR_F32, WR_F16 and WR_BF16, `wide_*` for WR_F64. [count] each, in memory that the executing processor can read.
struct Rotation {
    const float *cosines, *sines;
    const double *wide_cosines, *wide_sines;
    int32_t count, rotary_offset, interleaved;
};

WR_HD int32_t element_bytes(int32_t dtype) {
    return dtype == WR_F64 ? 8 : dtype == WR_F32 ? 4 : dtype == WR_F16 || dtype == WR_BF16 ? 2 : 1;
}

WR_HD UnitShape unit_shape(const wr_view &view) {
    return UnitShape{view.tokens,  view.content_bytes, view.dtype,  view.k_offset,
                     view.k_bytes, view.v_offset,      view.v_bytes};
}

}  // namespace wr

#endif
