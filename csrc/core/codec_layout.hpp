// Where the planes of an encoded unit are: docs/kv-codecs.md.
#ifndef WARMROUTE_CORE_CODEC_LAYOUT_HPP
#define WARMROUTE_CORE_CODEC_LAYOUT_HPP

#include "half.hpp"

namespace wr {

constexpr int32_t TILE_ELEMENTS = 8192; // most of a WR_EXP12 tile
constexpr int32_t TABLE_ENTRIES = 15, ESCAPE = 15;

WR_HD int64_t pad16(int64_t bytes) { return (bytes + 15) & ~int64_t(15); }

// The K or the V of a unit: `width` elements per token, from `offset` bytes into a token's content.
struct Half {
    int32_t offset, width;
};

WR_HD Half k_half(const UnitShape &shape) {
    return Half{shape.k_offset, shape.k_bytes / element_bytes(shape.dtype)};
}
WR_HD Half v_half(const UnitShape &shape) {
    return Half{shape.v_offset, shape.v_bytes / element_bytes(shape.dtype)};
}

// Byte offsets in a unit of WR_FP8, WR_K16_V8 (no K scales; `k_codes` is K itself) or WR_INT8.
struct ScaledPlanes {
    int64_t k_scales, v_scales, k_codes, v_codes, bytes;
};

WR_HD ScaledPlanes scaled_planes(const UnitShape &shape, int32_t encoding) {
    const int64_t tokens = shape.tokens, k_width = k_half(shape).width, v_width = v_half(shape).width;
    const int64_t v_scale_bytes = v_width != 0 ? pad16(4 * tokens) : 0;
    ScaledPlanes planes;
    planes.k_scales = 0;
    if (encoding == WR_K16_V8) {
        planes.k_codes = 0;
        planes.v_scales = pad16(tokens * shape.k_bytes);
        planes.v_codes = planes.v_scales + v_scale_bytes;
    } else {
        planes.v_scales = encoding == WR_INT8 ? pad16(4 * k_width) : k_width != 0 ? pad16(4 * tokens) : 0;
        planes.k_codes = planes.v_scales + v_scale_bytes;
        planes.v_codes = planes.k_codes + pad16(tokens * k_width);
    }
    planes.bytes = planes.v_codes + pad16(tokens * v_width);
    return planes;
}

// Byte offsets in a WR_EXP12 tile of `count` elements; the table is at 0. `capacity` is the room for escapes.
struct TilePlanes {
    int32_t count, capacity;
    int32_t escapes, codes, low, bytes;
};

WR_HD TilePlanes tile_planes(int32_t count) {
    TilePlanes planes;
    planes.count = count;
    planes.capacity = (count + 255) / 256 * 16;
    planes.escapes = 16;
    planes.codes = planes.escapes + planes.capacity;
    planes.low = planes.codes + int32_t(pad16((count + 1) / 2));
    planes.bytes = planes.low + int32_t(pad16(count));
    return planes;
}

// Tokens of every tile of a half but the last, which takes what is left.
WR_HD int32_t tile_tokens(int32_t width) { return width >= TILE_ELEMENTS ? 1 : TILE_ELEMENTS / width; }

WR_HD int32_t tile_count(int32_t tokens, int32_t width) {
    return width == 0 ? 0 : (tokens + tile_tokens(width) - 1) / tile_tokens(width);
}

WR_HD int64_t tiled_bytes(int32_t tokens, int32_t width) {
    if (width == 0) {
        return 0;
    }
    const int32_t each = tile_tokens(width), rest = tokens % each;
    const int64_t whole = int64_t(tokens / each) * tile_planes(each * width).bytes;
    return whole + (rest != 0 ? tile_planes(rest * width).bytes : 0);
}

WR_HD bool halves_fit(const UnitShape &shape) {
    if (shape.tokens < 1 || shape.content_bytes < 1 || shape.k_bytes < 0 || shape.v_bytes < 0 ||
        shape.k_offset < 0 || shape.v_offset < 0) {
        return false;
    }
    const int64_t k_end = int64_t(shape.k_offset) + shape.k_bytes,
                  v_end = int64_t(shape.v_offset) + shape.v_bytes;
    const bool apart =
        shape.k_bytes == 0 || shape.v_bytes == 0 || k_end <= shape.v_offset || v_end <= shape.k_offset;
    return k_end <= shape.content_bytes && v_end <= shape.content_bytes && apart;
}

WR_HD bool suits(const UnitShape &shape, int32_t encoding) {
    if (!is_computable(shape.dtype) || (encoding == WR_EXP12 && shape.dtype != WR_BF16)) {
        return false;
    }
    const int32_t size = element_bytes(shape.dtype), k_width = shape.k_bytes / size,
                  v_width = shape.v_bytes / size;
    if (k_width * size != shape.k_bytes || v_width * size != shape.v_bytes ||
        k_width + int64_t(v_width) == 0) {
        return false;
    }
    if (encoding == WR_K16_V8) {
        return k_width != 0 && v_width != 0;
    }
    return encoding != WR_EXP12 || (k_width <= TILE_ELEMENTS && v_width <= TILE_ELEMENTS);
}

// Bytes of one encoded unit, WR_UNSUPPORTED or WR_INVALID.
WR_HD int64_t unit_bytes(const UnitShape &shape, int32_t encoding) {
    if (encoding < WR_RAW || encoding > WR_INT8 || !halves_fit(shape)) {
        return WR_INVALID;
    }
    if (encoding == WR_RAW) {
        return int64_t(shape.tokens) * shape.content_bytes;
    }
    if (!suits(shape, encoding)) {
        return WR_UNSUPPORTED;
    }
    if (encoding == WR_EXP12) {
        return tiled_bytes(shape.tokens, k_half(shape).width) +
               tiled_bytes(shape.tokens, v_half(shape).width);
    }
    return scaled_planes(shape, encoding).bytes;
}

WR_HD int64_t unit_bytes(const wr_view &view, int32_t encoding) {
    return unit_bytes(unit_shape(view), encoding);
}

} // namespace wr

#endif
