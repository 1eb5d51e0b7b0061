// Encoding and decoding one unit, the (layer, block, head) of a view, on a CPU: docs/kv-codecs.md.
//
// Device code includes this too, for the layout and the arithmetic of single elements.
#ifndef WARMROUTE_CORE_CODEC_HPP
#define WARMROUTE_CORE_CODEC_HPP

#include "codec_elements.hpp"
#include "rotate.hpp"

#if !defined(__CUDACC__)

#include "codec_exp12.hpp"
#include "codec_scaled.hpp"

namespace wr {

// Kept apart, so that no arithmetic moves out of the plain float environment that its callers set.
__attribute__((noinline)) static int32_t encode_content(const UnitShape &shape, int32_t encoding,
                                                        const uint8_t *content, int64_t token_stride,
                                                        uint8_t *out) {
    if (encoding == WR_RAW) {
        copy_tokens(content, token_stride, out, shape.content_bytes, shape.tokens, shape.content_bytes);
    } else if (encoding == WR_EXP12) {
        return encode_exp12(shape, content, token_stride, out) ? WR_OK : WR_INCOMPRESSIBLE;
    } else if (shape.dtype == WR_BF16) {
        encode_scaled<WR_BF16>(shape, encoding, content, token_stride, out);
    } else if (shape.dtype == WR_F16) {
        encode_scaled<WR_F16>(shape, encoding, content, token_stride, out);
    } else {
        encode_scaled<WR_F32>(shape, encoding, content, token_stride, out);
    }
    return WR_OK;
}

__attribute__((noinline)) static int32_t decode_content(const UnitShape &shape, int32_t encoding,
                                                        const uint8_t *in, uint8_t *content,
                                                        int64_t token_stride) {
    bool sound = true;
    if (encoding == WR_RAW) {
        copy_tokens(in, shape.content_bytes, content, token_stride, shape.tokens, shape.content_bytes);
    } else if (encoding == WR_EXP12) {
        sound = decode_exp12(shape, in, content, token_stride);
    } else if (shape.dtype == WR_BF16) {
        sound = decode_scaled<WR_BF16>(shape, encoding, in, content, token_stride);
    } else if (shape.dtype == WR_F16) {
        sound = decode_scaled<WR_F16>(shape, encoding, in, content, token_stride);
    } else {
        sound = decode_scaled<WR_F32>(shape, encoding, in, content, token_stride);
    }
    return sound ? WR_OK : WR_CORRUPT;
}

// Writes unit_bytes() bytes to `out`. `content` is token 0's. The caller has unit_bytes() say yes first.
// WR_OK or WR_INCOMPRESSIBLE.
static inline int32_t encode_unit(const UnitShape &shape, int32_t encoding, const uint8_t *content,
                                  int64_t token_stride, uint8_t *out) {
    const uint64_t mode = plain_floats();
    const int32_t status = encode_content(shape, encoding, content, token_stride, out);
    restore_floats(mode);
    return status;
}

// Reads unit_bytes() bytes from `in`, whatever they are, and writes the K and V of `content`, rotated where
// `rotation` is not null (and check_rotation() said yes). WR_OK or WR_CORRUPT, after which the content may be
// partly written.
static inline int32_t decode_unit(const UnitShape &shape, int32_t encoding, const uint8_t *in,
                                  uint8_t *content, int64_t token_stride, const Rotation *rotation) {
    const uint64_t mode = plain_floats();
    const int32_t status = decode_content(shape, encoding, in, content, token_stride);
    if (status == WR_OK && rotation != nullptr) {
        rotate_content(shape, content, token_stride, *rotation);
    }
    restore_floats(mode);
    return status;
}

} // namespace wr

#endif

#endif
