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
    const bool fits =
        rotation.count >= 0 && rotation.rotary_offset >= 0 && rotation.rotary_offset % size == 0;
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
    const double a = canonical(rotated_first(x, y, cosine, sine)),
                 b = canonical(rotated_second(x, y, cosine, sine));
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

constexpr int32_t TURNS = 256; // pairs of one pass over the tokens, whose prepared factors are on the stack

#if defined(WR_LANES)

// Factors of neighbouring elements: (c, c) and (-s, s) for each pair, so that (x, y) becomes (x, y) * (c, c)
// + (y, x) * (-s, s). Adding a negated product rounds as subtracting it does.
struct Turns {
    float cosines[2 * TURNS], sines[2 * TURNS];
};

static inline void spread(const Rotation &rotation, int32_t from, int32_t count, Turns &turns) {
    for (int32_t i = 0; i < count; ++i) {
        turns.cosines[2 * i] = turns.cosines[2 * i + 1] = rotation.cosines[from + i];
        turns.sines[2 * i] = -rotation.sines[from + i];
        turns.sines[2 * i + 1] = rotation.sines[from + i];
    }
}

// How many of the pairs that are left are rotated by vectors, in one pass.
static inline int32_t turns_at_once(int32_t left) {
    return 2 * left < WR_LANES ? 0 : left < TURNS ? left : TURNS;
}

static inline Floats turned_neighbours(Floats v, const float *cosines, const float *sines) {
    const Floats turned = vadd(vmul(v, load_floats(cosines)), vmul(swap_neighbours(v), load_floats(sines)));
    return any_nan(turned, turned) ? vcanonical(turned) : turned;
}

template <int32_t dtype> static inline void turn_halves(Floats x, Floats y, const float *cosines,
                                                        const float *sines, uint8_t *first, uint8_t *second) {
    const Floats cosine = load_floats(cosines), sine = load_floats(sines);
    Floats a = vsub(vmul(x, cosine), vmul(y, sine)), b = vadd(vmul(y, cosine), vmul(x, sine));
    if (any_nan(a, b)) {
        a = vcanonical(a);
        b = vcanonical(b);
    }
    store_row<dtype>(first, a);
    store_row<dtype>(second, b);
}

// The pairs of a token, a vector or more. The last vector ends with them; what it shares with the one before
// is read before that is written.
template <int32_t dtype>
static inline void rotate_neighbours(const Turns &turns, int32_t count, uint8_t *row) {
    constexpr int32_t size = Element<dtype>::bytes;
    const int32_t end = 2 * count - WR_LANES;
    const Floats last = load_row<dtype>(row + end * size);
    for (int32_t i = 0; i < end; i += WR_LANES) {
        const Floats v = load_row<dtype>(row + i * size);
        store_row<dtype>(row + i * size, turned_neighbours(v, turns.cosines + i, turns.sines + i));
    }
    store_row<dtype>(row + end * size, turned_neighbours(last, turns.cosines + end, turns.sines + end));
}

template <int32_t dtype> static inline void rotate_halves(const Rotation &rotation, uint8_t *first) {
    constexpr int32_t size = Element<dtype>::bytes;
    const int32_t end = rotation.count - WR_LANES;
    const float *cosines = rotation.cosines, *sines = rotation.sines;
    uint8_t *second = first + int64_t(rotation.count) * size;
    const Floats last_x = load_row<dtype>(first + end * size), last_y = load_row<dtype>(second + end * size);
    for (int32_t i = 0; i < end; i += WR_LANES) {
        const Floats x = load_row<dtype>(first + i * size), y = load_row<dtype>(second + i * size);
        turn_halves<dtype>(x, y, cosines + i, sines + i, first + i * size, second + i * size);
    }
    turn_halves<dtype>(last_x, last_y, cosines + end, sines + end, first + end * size, second + end * size);
}

#endif

template <int32_t dtype> static inline void
rotate_interleaved(const UnitShape &shape, const Rotation &rotation, uint8_t *rotary, int64_t token_stride) {
    int32_t first = 0;
#if defined(WR_LANES)
    if constexpr (dtype != WR_F64) {
        int32_t from = 0;
        for (int32_t count; (count = turns_at_once(rotation.count - from)) != 0; from += count) {
            Turns turns;
            spread(rotation, from, count, turns);
            for (int32_t token = 0; token < shape.tokens; ++token) {
                rotate_neighbours<dtype>(turns, count,
                                         rotary + token * token_stride + 2 * from * Element<dtype>::bytes);
            }
        }
        first = from;
    }
#endif
    for (int32_t token = 0; token < shape.tokens; ++token) {
        for (int32_t pair = first; pair < rotation.count; ++pair) {
            rotate_pair(dtype, rotation, pair, rotary + token * token_stride);
        }
    }
}

template <int32_t dtype> static inline void rotate_neox(const UnitShape &shape, const Rotation &rotation,
                                                        uint8_t *rotary, int64_t token_stride) {
    for (int32_t token = 0; token < shape.tokens; ++token) {
        uint8_t *row = rotary + token * token_stride;
#if defined(WR_LANES)
        if constexpr (dtype != WR_F64) {
            if (rotation.count >= WR_LANES) {
                rotate_halves<dtype>(rotation, row);
                continue;
            }
        }
#endif
        for (int32_t pair = 0; pair < rotation.count; ++pair) {
            rotate_pair(dtype, rotation, pair, row);
        }
    }
}

template <int32_t dtype> static inline void rotate_rows(const UnitShape &shape, const Rotation &rotation,
                                                        uint8_t *content, int64_t token_stride) {
    uint8_t *rotary = content + shape.k_offset + rotation.rotary_offset;
    if (rotation.interleaved) {
        rotate_interleaved<dtype>(shape, rotation, rotary, token_stride);
    } else {
        rotate_neox<dtype>(shape, rotation, rotary, token_stride);
    }
}

// Kept apart, so that no arithmetic moves out of the plain float environment that its callers set.
__attribute__((noinline)) static void rotate_content(const UnitShape &shape, uint8_t *content,
                                                     int64_t token_stride, const Rotation &rotation) {
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

} // namespace wr

#endif
