// WR_EXP12 on a CPU: docs/kv-codecs.md.
//
// A tile is split into its exponents, kept on the stack, and its low bytes, which go straight into their
// plane. Vector code runs over rows of tokens; the codes and exponents of a tile are contiguous whatever the
// tokens' stride is.
#ifndef WARMROUTE_CORE_CODEC_EXP12_HPP
#define WARMROUTE_CORE_CODEC_EXP12_HPP

#include "bytes.hpp"

namespace wr {

// Encodes one tile: `tokens` rows of `width` elements. False if it has more escapes than there is room for.
static inline bool encode_tile(const uint8_t *rows, int64_t token_stride, int32_t tokens, int32_t width,
                               uint8_t *out) {
    const TilePlanes planes = tile_planes(tokens * width);
    uint8_t exponents[TILE_ELEMENTS + SLACK];
    uint16_t counts[256];
    for (int32_t token = 0; token < tokens; ++token) {
        split_row(rows + token * token_stride, width, exponents + token * width,
                  out + planes.low + token * width);
    }
    count_exponents(exponents, planes.count, counts);
    choose_exponents(counts, out);
    uint32_t escaped = uint32_t(planes.count);
    for (int32_t i = 0; i < TABLE_ENTRIES; ++i) {
        escaped -= counts[out[i]];
    }
    if (escaped > uint32_t(planes.capacity)) {
        return false;
    }
    memset(out + planes.escapes + escaped, 0, size_t(planes.capacity) - escaped);
    encode_exponents(exponents, planes.count, out, counts, out + planes.codes, out + planes.escapes);
    memset(out + planes.low + planes.count, 0, size_t(planes.bytes - planes.low - planes.count));
    const int32_t code_bytes = (planes.count + 1) / 2;
    memset(out + planes.codes + code_bytes, 0, size_t(planes.low - planes.codes - code_bytes));
    return true;
}

// False if no encoder wrote it.
static inline bool decode_tile(const uint8_t *in, uint8_t *rows, int64_t token_stride, int32_t tokens,
                               int32_t width) {
    const TilePlanes planes = tile_planes(tokens * width);
    uint8_t exponents[TILE_ELEMENTS + SLACK];
    if (!is_table(in) || !decode_exponents(in + planes.codes, planes.count, in, in + planes.escapes,
                                           planes.capacity, exponents)) {
        return false;
    }
    for (int32_t token = 0; token < tokens; ++token) {
        join_row(exponents + token * width, in + planes.low + token * width, width,
                 rows + token * token_stride);
    }
    return true;
}

// Visits the tiles of a half; `encode` gives the direction. Returns the bytes of its tiles, or -1.
template <bool encode, typename Content, typename Encoded> static inline int64_t
visit_tiles(Half half, int32_t tokens, Content *content, int64_t token_stride, Encoded *encoded) {
    int64_t at = 0;
    const int32_t each = half.width == 0 ? tokens : tile_tokens(half.width);
    for (int32_t token = 0; half.width != 0 && token < tokens; token += each) {
        const int32_t now = tokens - token < each ? tokens - token : each;
        Content *rows = content + half.offset + token * token_stride;
        bool done;
        if constexpr (encode) {
            done = encode_tile(rows, token_stride, now, half.width, encoded + at);
        } else {
            done = decode_tile(encoded + at, rows, token_stride, now, half.width);
        }
        if (!done) {
            return -1;
        }
        at += tile_planes(now * half.width).bytes;
    }
    return at;
}

static inline bool encode_exp12(const UnitShape &shape, const uint8_t *content, int64_t token_stride,
                                uint8_t *out) {
    const int64_t k_bytes = visit_tiles<true>(k_half(shape), shape.tokens, content, token_stride, out);
    return k_bytes >= 0 &&
           visit_tiles<true>(v_half(shape), shape.tokens, content, token_stride, out + k_bytes) >= 0;
}

static inline bool decode_exp12(const UnitShape &shape, const uint8_t *in, uint8_t *content,
                                int64_t token_stride) {
    const int64_t k_bytes = visit_tiles<false>(k_half(shape), shape.tokens, content, token_stride, in);
    return k_bytes >= 0 &&
           visit_tiles<false>(v_half(shape), shape.tokens, content, token_stride, in + k_bytes) >= 0;
}

} // namespace wr

#endif
