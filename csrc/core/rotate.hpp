// Rotating K to another position: docs/kv-codecs.md, "Rotation". Products and sums are rounded one by one.
#ifndef WARMROUTE_CORE_ROTATE_HPP
#define WARMROUTE_CORE_ROTATE_HPP

#include "rows.hpp"

namespace wr {

// WR_OK, or why K cannot be rotated so.
WR_HD int32_t check_rotation(const UnitShape &shape, const Rotation &rotation) {
    if (!is_computable(shape.dtype) && shape.dtype != WR_F64) {
        return WR_UNSUPPORTED;
    }
    const int32_t size = element_bytes(shape.dtype);
    const int64_t end = int64_t(rotation.rotary_offset) + 2 * int64_t(rotation.count) * size;
    const bool fits = rotation.count >= 0 && rotation.rotary_offset >= 0 && rotation.rotary_offset % size == 0;
    return fits && end <= shape.k_bytes ? WR_OK : WR_INVALID;
}

// The new first and second element of a pair; narrowing makes NaNs canonical.
WR_HD float rotated_first(float x, float y, float cosine, float sine) {
    return subtract(multiply(x, cosine), multiply(y, sine));
}
WR_HD float rotated_second(float x, float y, float cosine, float sine) {
    return add(multiply(y, cosine), multiply(x, sine));
}
WR_HD double rotated_first(double x, double y, double cosine, double sine) {
    return subtract(multiply(x, cosine), multiply(y, sine));
}
WR_HD double rotated_second(double x, double y, double cosine, double sine) {
    return add(multiply(y, cosine), multiply(x, sine));
}

WR_HD void rotate_pair_f64(uint8_t *first, uint8_t *second, double cosine, double sine) {
    double x, y;
    memcpy(&x, first, 8);
    memcpy(&y, second, 8);
    const double a = canonical(rotated_first(x, y, cosine, sine)), b = canonical(rotated_second(x, y, cosine, sine));
    memcpy(first, &a, 8);
    memcpy(second, &b, 8);
}

// Pair `pair` of the rotary part that begins at `rotary`.
WR_HD void rotate_pair(int32_t dtype, const Rotation &rotation, int32_t pair, uint8_t *rotary) {
    const int32_t size = element_bytes(dtype), step = rotation.interleaved ? 1 : rotation.count;
    uint8_t *first = rotary + int64_t(rotation.interleaved ? 2 * pair : pair) * size;
    uint8_t *second = first + int64_t(step) * size;
    if (dtype == WR_F64) {
        rotate_pair_f64(first, second, rotation.wide_cosines[pair], rotation.wide_sines[pair]);
        return;
    }
    const float x = load_element(dtype, first), y = load_element(dtype, second);
    const float cosine = rotation.cosines[pair], sine = rotation.sines[pair];
    store_element(dtype, first, rotated_first(x, y, cosine, sine));
    store_element(dtype, second, rotated_second(x, y, cosine, sine));
}

#if !defined(__CUDACC__)

#if defined(WR_LANES)

// Pairs (m, m + count); returns how many were rotated.
template <int32_t dtype> static inline int32_t rotate_vectors(const Rotation &rotation, uint8_t *rotary) {
    constexpr int32_t size = Element<dtype>::bytes;
    int32_t pair = 0;
    WR_VECTORS(pair, rotation.count) {
        uint8_t *first = rotary + pair * size, *second = first + int64_t(rotation.count) * size;
        const Floats x = load_row<dtype>(first), y = load_row<dtype>(second);
        const Floats cosine = load_floats(rotation.cosines + pair), sine = load_floats(rotation.sines + pair);
        store_row<dtype>(first, vcanonical(vsub(vmul(x, cosine), vmul(y, sine))));
        store_row<dtype>(second, vcanonical(vadd(vmul(y, cosine), vmul(x, sine))));
    }
    return pair;
}

#endif

template <int32_t dtype> static inline void rotate_row(const Rotation &rotation, uint8_t *rotary) {
    int32_t pair = 0;
#if defined(WR_LANES)
    if constexpr (dtype != WR_F64) {
        if (!rotation.interleaved) {
            pair = rotate_vectors<dtype>(rotation, rotary);
        }
    }
#endif
    for (; pair < rotation.count; ++pair) {
        rotate_pair(dtype, rotation, pair, rotary);
    }
}

template <int32_t dtype>
static inline void rotate_rows(const UnitShape &shape, const Rotation &rotation, uint8_t *content, int64_t token_stride) {
    uint8_t *rotary = content + shape.k_offset + rotation.rotary_offset;
    for (int32_t token = 0; token < shape.tokens; ++token) {
        rotate_row<dtype>(rotation, rotary + token * token_stride);
    }
}

// Kept apart, so that no arithmetic moves out of the plain float environment that its callers set.
__attribute__((noinline)) static void rotate_content(const UnitShape &shape, uint8_t *content, int64_t token_stride,
                                                     const Rotation &rotation) {
    switch (shape.dtype) {
    case WR_F64: return rotate_rows<WR_F64>(shape, rotation, content, token_stride);
    case WR_F32: return rotate_rows<WR_F32>(shape, rotation, content, token_stride);
    case WR_F16: return rotate_rows<WR_F16>(shape, rotation, content, token_stride);
    default: return rotate_rows<WR_BF16>(shape, rotation, content, token_stride);
    }
}

// Rotates the K of all tokens in place. The caller has check_rotation() say yes first.
static inline void rotate_unit(const UnitShape &shape, uint8_t *content, int64_t token_stride,
                               const Rotation &rotation) {
    const uint64_t mode = plain_floats();
    rotate_content(shape, content, token_stride, rotation);
    restore_floats(mode);
}

#endif

}  // namespace wr

#endif
