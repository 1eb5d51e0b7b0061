// Runs of elements on a CPU: vectors where WR_LANES is defined, and single elements for what is left and
// elsewhere.
//
// The element type is a template parameter, so that each loop is compiled for each type. Single elements go
// through the helpers that device code uses, vectors through their transcription; tests hold them to each
// other, bit by bit.
#ifndef WARMROUTE_CORE_ROWS_HPP
#define WARMROUTE_CORE_ROWS_HPP

#include "codec_elements.hpp"
#include "lanes.hpp"

namespace wr {

template <int32_t dtype> struct Element;
template <> struct Element<WR_F32> {
    static constexpr int32_t bytes = 4;
};
template <> struct Element<WR_F16> {
    static constexpr int32_t bytes = 2;
};
template <> struct Element<WR_BF16> {
    static constexpr int32_t bytes = 2;
};

#if defined(WR_LANES)

template <int32_t dtype> static inline Floats load_row(const uint8_t *at) {
    if constexpr (dtype == WR_F32) {
        return load_floats(at);
    } else if constexpr (dtype == WR_F16) {
        return load_f16(at);
    } else {
        return as_floats(shift_left<16>(widen_halves(at)));
    }
}

static inline Words round_bf16(Words bits) {
    const Words odd = vand(shift_right<16>(bits), words(1));
    return shift_right<16>(vadd(vadd(bits, words(0x7FFF)), odd));
}

// What is not a number must be the canonical NaN already.
template <int32_t dtype> static inline void store_row(uint8_t *at, Floats values) {
    if constexpr (dtype == WR_F32) {
        store_words(at, as_words(values));
    } else if constexpr (dtype == WR_F16) {
        store_f16(at, values);
    } else {
        store_halves(at, round_bf16(as_words(values)));
    }
}

static inline Floats vcanonical(Floats values) {
    const Words bits = as_words(values), magnitude = vand(bits, words(F32_MAGNITUDE));
    return as_floats(select(greater(magnitude, words(F32_INFINITY)), words(F32_NAN), bits));
}

static inline Words vfinite_magnitude(Floats values) {
    const Words magnitude = vand(as_words(values), words(F32_MAGNITUDE));
    return select(greater(words(F32_INFINITY), magnitude), magnitude, words(0));
}

static inline Words vto_e4m3(Floats values) {
    const Words bits = as_words(values), magnitude = vand(bits, words(F32_MAGNITUDE));
    const Words limited = vmin(magnitude, words(0x43E00000u));
    const Words odd = vand(shift_right<20>(limited), words(1));
    const Words normal = shift_right<20>(vadd(vadd(limited, odd), words(0x7FFFFu - (960u << 20))));
    const Words denormal = vsub(as_words(vadd(as_floats(limited), floats(16384.0f))), words(0x46800000u));
    const Words rounded = select(greater(words(0x3C800000u), magnitude), denormal, normal);
    const Words code = vor(rounded, vand(shift_right<24>(bits), words(0x80)));
    return select(greater(magnitude, words(F32_INFINITY)), words(0x7F), code);
}

static inline Words vto_int8(Floats values) {
    const Words bits = as_words(values), magnitude = vand(bits, words(F32_MAGNITUDE));
    const Words limited = vmin(magnitude, words(0x42FE0000u));
    const Words code = to_integers(as_floats(vor(limited, vand(bits, words(0x80000000u)))));
    return select(greater(magnitude, words(F32_INFINITY)), words(uint32_t(-128)), code);
}

static inline Floats vfrom_int8(const uint8_t *at) {
    const Words codes = widen_signed_bytes(at);
    return as_floats(
        select(greater(words(uint32_t(-127)), codes), words(F32_NAN), as_words(to_floats(codes))));
}

// Calls body(i) for vectors of `lanes` elements, of which there are at least that many. The last vector ends
// with the row and may do elements of the one before it again: rows that are read must not be those that are
// written.
template <int32_t lanes, typename Body> static inline void each_vector(int32_t count, Body body) {
    for (int32_t i = 0; i < count - lanes; i += lanes) {
        body(i);
    }
    body(count - lanes);
}

static inline uint32_t vlargest_magnitude_f32(const uint8_t *row, int32_t count) {
    Words most = words(0);
    each_vector<WR_LANES>(count,
                          [&](int32_t i) { most = vmax(most, vfinite_magnitude(load_floats(row + 4 * i))); });
    return largest_word(most);
}

// Of 16-bit elements, whose bits compare as their magnitudes do.
template <int32_t dtype> static inline uint32_t vlargest_magnitude_half(const uint8_t *row, int32_t count) {
    const Words infinity = halves(dtype == WR_BF16 ? 0x7F80 : 0x7C00);
    Words most = words(0);
    each_vector<2 * WR_LANES>(count, [&](int32_t i) {
        const Words magnitude = vand(load_words(row + 2 * i), halves(0x7FFF));
        most = max_halves(most, where_greater(infinity, magnitude, magnitude, words(0)));
    });
    const uint16_t largest = largest_half(most);
    return float_bits(dtype == WR_BF16 ? widen_bf16(largest) : widen_f16(largest));
}

// Codes without their sign, in the low half of each word, from non-negative values.
static inline Words vmagnitude_code(Floats value) {
    const Words bits = as_words(value), odd = vand(shift_right<20>(bits), words(1));
    const Words normal = shift_right<20>(vadd(vadd(bits, odd), words(0x7FFFFu - (960u << 20))));
    const Words denormal = vsub(as_words(vadd(value, floats(16384.0f))), words(0x46800000u));
    return select(greater(words(0x3C800000u), bits), denormal, normal);
}

// Codes of 16-bit elements from those of their magnitudes.
template <int32_t dtype>
static inline void store_e4m3(uint8_t *codes, Words bits, Words magnitude, Words unsigned_code) {
    const Words infinity = halves(dtype == WR_BF16 ? 0x7F80 : 0x7C00);
    const Words limited = min_halves(unsigned_code, halves(0x7E));
    const Words code = vor(limited, vand(shift_halves_right_8(bits), halves(0x80)));
    store_low_bytes(codes, where_greater(magnitude, infinity, halves(0x7F), code));
}

// Twice as many elements as a vector of binary32 has: even and odd ones apart, so that nothing needs to be
// moved.
static inline void encode_fp8_bf16(const uint8_t *row, Floats inverse, uint8_t *codes) {
    const Words bits = load_words(row), magnitude = vand(bits, halves(0x7FFF));
    const Words even = vmagnitude_code(vmul(as_floats(shift_left<16>(magnitude)), inverse));
    const Words odd = vmagnitude_code(vmul(as_floats(vand(magnitude, words(0xFFFF0000u))), inverse));
    store_e4m3<WR_BF16>(codes, bits, magnitude, merge_halves(even, odd));
}

static inline Words vmagnitude_code_f16(const uint8_t *row, Floats inverse) {
    const Words magnitude = vand(as_words(load_f16(row)), words(F32_MAGNITUDE));
    return vmagnitude_code(vmul(as_floats(magnitude), inverse));
}

static inline void encode_fp8_f16(const uint8_t *row, Floats inverse, uint8_t *codes) {
    const Words bits = load_words(row), magnitude = vand(bits, halves(0x7FFF));
    const Words low = vmagnitude_code_f16(row, inverse),
                high = vmagnitude_code_f16(row + 2 * WR_LANES, inverse);
    store_e4m3<WR_F16>(codes, bits, magnitude, pack_halves(low, high));
}

#endif

template <int32_t dtype> static inline uint32_t largest_magnitude(const uint8_t *row, int32_t count) {
#if defined(WR_LANES)
    if constexpr (dtype == WR_F32) {
        if (count >= WR_LANES) {
            return vlargest_magnitude_f32(row, count);
        }
    } else if (count >= 2 * WR_LANES) {
        return vlargest_magnitude_half<dtype>(row, count);
    }
#endif
    uint32_t largest = 0;
    for (int32_t i = 0; i < count; ++i) {
        const uint32_t magnitude = finite_magnitude(load_element(dtype, row + i * Element<dtype>::bytes));
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// largest[i] becomes the larger of itself and the magnitude of element i.
template <int32_t dtype>
static inline void raise_magnitudes(const uint8_t *row, int32_t count, uint32_t *largest) {
    constexpr int32_t size = Element<dtype>::bytes;
#if defined(WR_LANES)
    if (count >= WR_LANES) {
        return each_vector<WR_LANES>(count, [=](int32_t i) {
            const Words magnitudes = vfinite_magnitude(load_row<dtype>(row + i * size));
            store_words(largest + i, vmax(load_words(largest + i), magnitudes));
        });
    }
#endif
    for (int32_t i = 0; i < count; ++i) {
        const uint32_t magnitude = finite_magnitude(load_element(dtype, row + i * size));
        largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    }
}

template <int32_t dtype>
static inline void encode_fp8_row(const uint8_t *row, int32_t count, float inverse, uint8_t *codes) {
    constexpr int32_t size = Element<dtype>::bytes;
#if defined(WR_LANES)
    const Floats inverses = floats(inverse);
    if constexpr (dtype != WR_F32) {
        if (count >= 2 * WR_LANES) {
            constexpr auto encode = dtype == WR_BF16 ? encode_fp8_bf16 : encode_fp8_f16;
            return each_vector<2 * WR_LANES>(count,
                                             [=](int32_t i) { encode(row + 2 * i, inverses, codes + i); });
        }
    }
    if (count >= WR_LANES) {
        return each_vector<WR_LANES>(count, [=](int32_t i) {
            store_bytes(codes + i, vto_e4m3(vmul(load_row<dtype>(row + i * size), inverses)));
        });
    }
#endif
    for (int32_t i = 0; i < count; ++i) {
        codes[i] = to_e4m3(multiply(load_element(dtype, row + i * size), inverse));
    }
}

template <int32_t dtype>
static inline void decode_fp8_row(const uint8_t *codes, int32_t count, float scale, uint8_t *row) {
    constexpr int32_t size = Element<dtype>::bytes;
#if defined(WR_LANES)
    if (count >= WR_LANES) {
        const Floats larger =
            floats(scale * 256.0f); // exact: products with values 256 times smaller round alike
        return each_vector<WR_LANES>(
            count, [=](int32_t i) { store_row<dtype>(row + i * size, vmul(load_e4m3(codes + i), larger)); });
    }
#endif
    for (int32_t i = 0; i < count; ++i) {
        store_element(dtype, row + i * size, multiply(from_e4m3(codes[i]), scale));
    }
}

// With `per_channel`, element i has its own factor inverses[i]; else all have inverses[0].
template <int32_t dtype, bool per_channel>
static inline void encode_int8_row(const uint8_t *row, int32_t count, const float *inverses, uint8_t *codes) {
    constexpr int32_t size = Element<dtype>::bytes;
#if defined(WR_LANES)
    if (count >= WR_LANES) {
        const Floats common = floats(*inverses);
        return each_vector<WR_LANES>(count, [=](int32_t i) {
            const Floats inverse = per_channel ? load_floats(inverses + i) : common;
            store_bytes(codes + i, vto_int8(vmul(load_row<dtype>(row + i * size), inverse)));
        });
    }
#endif
    for (int32_t i = 0; i < count; ++i) {
        codes[i] =
            uint8_t(to_int8(multiply(load_element(dtype, row + i * size), inverses[per_channel ? i : 0])));
    }
}

template <int32_t dtype, bool per_channel>
static inline void decode_int8_row(const uint8_t *codes, int32_t count, const float *scales, uint8_t *row) {
    constexpr int32_t size = Element<dtype>::bytes;
#if defined(WR_LANES)
    if (count >= WR_LANES) {
        const Floats common = floats(*scales);
        return each_vector<WR_LANES>(count, [=](int32_t i) {
            const Floats scale = per_channel ? load_floats(scales + i) : common;
            store_row<dtype>(row + i * size, vmul(vfrom_int8(codes + i), scale));
        });
    }
#endif
    for (int32_t i = 0; i < count; ++i) {
        store_element(dtype, row + i * size,
                      multiply(from_int8(int8_t(codes[i])), scales[per_channel ? i : 0]));
    }
}

} // namespace wr

#endif
