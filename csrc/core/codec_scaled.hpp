// WR_FP8, WR_K16_V8 and WR_INT8 of one half of a unit, on a CPU: docs/kv-codecs.md.
#ifndef WARMROUTE_CORE_CODEC_SCALED_HPP
#define WARMROUTE_CORE_CODEC_SCALED_HPP

#include "rows.hpp"

namespace wr {

constexpr int32_t TOKENS = 8;     // whose scales are computed ahead, so that divisions overlap
constexpr int32_t CHANNELS = 512; // of one pass over the tokens, whose scales are on the stack

// The tokens of a half in the content, and its planes in the encoded unit.
struct ScaledHalf {
    int32_t tokens, width;
    int64_t token_stride;
};

template <int32_t dtype> static inline void encode_fp8(const ScaledHalf &half, const uint8_t *content,
                                                       uint8_t *scales, uint8_t *codes) {
    for (int32_t from = 0; from < half.tokens; from += TOKENS) {
        const int32_t until = half.tokens - from < TOKENS ? half.tokens : from + TOKENS;
        float inverses[TOKENS];
        for (int32_t token = from; token < until; ++token) {
            const uint8_t *row = content + token * half.token_stride;
            const float scale = scale_of(largest_magnitude<dtype>(row, half.width), FP8_PEAK);
            memcpy(scales + 4 * int64_t(token), &scale, 4);
            inverses[token - from] = divide(1.0f, scale);
        }
        for (int32_t token = from; token < until; ++token) {
            encode_fp8_row<dtype>(content + token * half.token_stride, half.width, inverses[token - from],
                                  codes + int64_t(token) * half.width);
        }
    }
}

template <int32_t dtype> static inline bool decode_fp8(const ScaledHalf &half, const uint8_t *scales,
                                                       const uint8_t *codes, uint8_t *content) {
    for (int32_t token = 0; token < half.tokens; ++token) {
        float scale;
        memcpy(&scale, scales + 4 * int64_t(token), 4);
        if (!is_scale(float_bits(scale), dtype, true)) {
            return false;
        }
        decode_fp8_row<dtype>(codes + int64_t(token) * half.width, half.width, scale,
                              content + token * half.token_stride);
    }
    return true;
}

template <int32_t dtype> static inline void encode_int8_tokens(const ScaledHalf &half, const uint8_t *content,
                                                               uint8_t *scales, uint8_t *codes) {
    for (int32_t token = 0; token < half.tokens; ++token) {
        const uint8_t *row = content + token * half.token_stride;
        const float scale = scale_of(largest_magnitude<dtype>(row, half.width), INT8_PEAK);
        const float inverse = divide(1.0f, scale);
        memcpy(scales + 4 * int64_t(token), &scale, 4);
        encode_int8_row<dtype, false>(row, half.width, &inverse, codes + int64_t(token) * half.width);
    }
}

template <int32_t dtype> static inline bool decode_int8_tokens(const ScaledHalf &half, const uint8_t *scales,
                                                               const uint8_t *codes, uint8_t *content) {
    for (int32_t token = 0; token < half.tokens; ++token) {
        float scale;
        memcpy(&scale, scales + 4 * int64_t(token), 4);
        if (!is_scale(float_bits(scale), dtype, false)) {
            return false;
        }
        decode_int8_row<dtype, false>(codes + int64_t(token) * half.width, half.width, &scale,
                                      content + token * half.token_stride);
    }
    return true;
}

template <int32_t dtype> static inline void
encode_int8_channels(const ScaledHalf &half, const uint8_t *content, uint8_t *scales, uint8_t *codes) {
    for (int32_t from = 0; from < half.width; from += CHANNELS) {
        const int32_t count = half.width - from < CHANNELS ? half.width - from : CHANNELS;
        const uint8_t *rows = content + int64_t(from) * Element<dtype>::bytes;
        uint32_t largest[CHANNELS];
        float factors[CHANNELS];
        memset(largest, 0, sizeof(largest));
        for (int32_t token = 0; token < half.tokens; ++token) {
            raise_magnitudes<dtype>(rows + token * half.token_stride, count, largest);
        }
        for (int32_t i = 0; i < count; ++i) {
            factors[i] = scale_of(largest[i], INT8_PEAK);
        }
        memcpy(scales + 4 * int64_t(from), factors, size_t(count) * 4);
        for (int32_t i = 0; i < count; ++i) {
            factors[i] = divide(1.0f, factors[i]);
        }
        for (int32_t token = 0; token < half.tokens; ++token) {
            encode_int8_row<dtype, true>(rows + token * half.token_stride, count, factors,
                                         codes + int64_t(token) * half.width + from);
        }
    }
}

template <int32_t dtype> static inline bool
decode_int8_channels(const ScaledHalf &half, const uint8_t *scales, const uint8_t *codes, uint8_t *content) {
    for (int32_t from = 0; from < half.width; from += CHANNELS) {
        const int32_t count = half.width - from < CHANNELS ? half.width - from : CHANNELS;
        uint8_t *rows = content + int64_t(from) * Element<dtype>::bytes;
        float factors[CHANNELS];
        memcpy(factors, scales + 4 * int64_t(from), size_t(count) * 4);
        for (int32_t i = 0; i < count; ++i) {
            if (!is_scale(float_bits(factors[i]), dtype, false)) {
                return false;
            }
        }
        for (int32_t token = 0; token < half.tokens; ++token) {
            decode_int8_row<dtype, true>(codes + int64_t(token) * half.width + from, count, factors,
                                         rows + token * half.token_stride);
        }
    }
    return true;
}

static inline void copy_tokens(const uint8_t *from, int64_t from_stride, uint8_t *to, int64_t to_stride,
                               int32_t rows, int32_t bytes) {
    for (int32_t row = 0; row < rows; ++row) {
        memcpy(to + row * to_stride, from + row * from_stride, size_t(bytes));
    }
}

// Planes are padded with zeros, so that equal content has equal encoded bytes.
static inline void clear_padding(uint8_t *plane, int64_t bytes) {
    memset(plane + bytes, 0, size_t(pad16(bytes) - bytes));
}

static inline void clear_paddings(const UnitShape &shape, int32_t encoding, const ScaledPlanes &planes,
                                  uint8_t *out) {
    const int64_t tokens = shape.tokens, k_width = k_half(shape).width, v_width = v_half(shape).width;
    if (encoding != WR_K16_V8) {
        clear_padding(out + planes.k_scales, k_width == 0 ? 0 : 4 * (encoding == WR_INT8 ? k_width : tokens));
    }
    clear_padding(out + planes.k_codes, encoding == WR_K16_V8 ? tokens * shape.k_bytes : tokens * k_width);
    clear_padding(out + planes.v_scales, v_width == 0 ? 0 : 4 * tokens);
    clear_padding(out + planes.v_codes, tokens * v_width);
}

template <int32_t dtype> static inline void encode_scaled(const UnitShape &shape, int32_t encoding,
                                                          const uint8_t *content, int64_t token_stride,
                                                          uint8_t *out) {
    const Half k = k_half(shape), v = v_half(shape);
    const ScaledPlanes planes = scaled_planes(shape, encoding);
    const ScaledHalf keys = {shape.tokens, k.width, token_stride},
                     values = {shape.tokens, v.width, token_stride};
    clear_paddings(shape, encoding, planes, out);
    if (encoding == WR_K16_V8) {
        copy_tokens(content + k.offset, token_stride, out + planes.k_codes, shape.k_bytes, shape.tokens,
                    shape.k_bytes);
    } else if (encoding == WR_INT8) {
        encode_int8_channels<dtype>(keys, content + k.offset, out + planes.k_scales, out + planes.k_codes);
    } else if (k.width != 0) {
        encode_fp8<dtype>(keys, content + k.offset, out + planes.k_scales, out + planes.k_codes);
    }
    if (v.width == 0) {
        return;
    }
    if (encoding == WR_INT8) {
        encode_int8_tokens<dtype>(values, content + v.offset, out + planes.v_scales, out + planes.v_codes);
    } else {
        encode_fp8<dtype>(values, content + v.offset, out + planes.v_scales, out + planes.v_codes);
    }
}

template <int32_t dtype> static inline bool decode_scaled(const UnitShape &shape, int32_t encoding,
                                                          const uint8_t *in, uint8_t *content,
                                                          int64_t token_stride) {
    const Half k = k_half(shape), v = v_half(shape);
    const ScaledPlanes planes = scaled_planes(shape, encoding);
    const ScaledHalf keys = {shape.tokens, k.width, token_stride},
                     values = {shape.tokens, v.width, token_stride};
    bool sound = true;
    if (encoding == WR_K16_V8) {
        copy_tokens(in + planes.k_codes, shape.k_bytes, content + k.offset, token_stride, shape.tokens,
                    shape.k_bytes);
    } else if (encoding == WR_INT8) {
        sound =
            decode_int8_channels<dtype>(keys, in + planes.k_scales, in + planes.k_codes, content + k.offset);
    } else if (k.width != 0) {
        sound = decode_fp8<dtype>(keys, in + planes.k_scales, in + planes.k_codes, content + k.offset);
    }
    if (v.width == 0 || !sound) {
        return sound;
    }
    if (encoding == WR_INT8) {
        return decode_int8_tokens<dtype>(values, in + planes.v_scales, in + planes.v_codes,
                                         content + v.offset);
    }
    return decode_fp8<dtype>(values, in + planes.v_scales, in + planes.v_codes, content + v.offset);
}

} // namespace wr

#endif
