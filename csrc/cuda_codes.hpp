// The bodies of the kernels that encode and decode: docs/kv-codecs.md, with the arithmetic of core/codec_elements.hpp.
//
// Encoded units lie in device memory, aligned to 16 bytes. A launch's items are counted per unit: tokens of a half,
// groups of channels, or tiles, as each kernel says; `Pages::page` is the number of heads and `Pages::run` 1.
#ifndef WARMROUTE_CUDA_CODES_HPP
#define WARMROUTE_CUDA_CODES_HPP

#include "core/codec_elements.hpp"
#include "cuda_moves.hpp"

namespace wr {
namespace cuda {

// What became of a call's units, for wr_finish; in memory of the host that the device can write.
struct Outcome {
    uint32_t incompressible, corrupt;
};

struct Codes {
    UnitShape shape;
    int32_t encoding;
    int64_t unit_bytes, token_stride;
    ScaledPlanes planes;
    Outcome *outcome;
};

struct Unit {
    uint64_t content, encoded;
};

WR_BODY Unit locate_unit(const Pages &pages, const Codes &codes, uint32_t unit) {
    const Index at = split(pages, unit);
    return {cache_address(pages, at),
            packed_page(pages, at) + (unit - at.page * pages.page.value) * static_cast<uint64_t>(codes.unit_bytes)};
}

WR_BODY void tell(uint32_t *flag) { *reinterpret_cast<volatile uint32_t *>(flag) = 1; }

WR_BODY void clear_bytes(uint64_t address, int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) store_at<uint8_t>(address + static_cast<uint64_t>(at), 0);
}

WR_BODY float load_float(uint64_t address) { return bits_float(load_at<uint32_t>(address)); }

// `count` elements, at most 8. kWide: 8 of them, on a boundary of 16 bytes.
template <int kType, bool kWide> WR_BODY void load_some(uint64_t address, uint32_t count, float (&values)[8]) {
    typedef typename ElementOf<kType>::Bits Bits;
    Bits bits[8];
    if constexpr (kWide) {
        const Word128 first = load_at<Word128>(address);
        memcpy(bits, &first, 16);
        if constexpr (sizeof(Bits) == 4) {
            const Word128 second = load_at<Word128>(address + 16);
            memcpy(bits + 4, &second, 16);
        }
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) bits[i] = i < count ? load_at<Bits>(address + i * sizeof(Bits)) : Bits{0};
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) values[i] = widen<kType>(bits[i]);
}

template <int kType, bool kWide> WR_BODY void store_some(uint64_t address, uint32_t count, const float (&values)[8]) {
    typedef typename ElementOf<kType>::Bits Bits;
    Bits bits[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) bits[i] = narrow<kType>(values[i]);
    if constexpr (kWide) {
        Word128 part;
        memcpy(&part, bits, 16);
        store_at(address, part);
        if constexpr (sizeof(Bits) == 4) {
            memcpy(&part, bits + 4, 16);
            store_at(address + 16, part);
        }
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)
            if (i < count) store_at(address + i * sizeof(Bits), bits[i]);
    }
}

template <bool kWide> WR_BODY void store_codes(uint64_t address, uint32_t count, const uint8_t (&bytes)[8]) {
    if constexpr (kWide) {
        Word64 all;
        memcpy(&all, bytes, 8);
        store_at(address, all);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)
            if (i < count) store_at(address + i, bytes[i]);
    }
}

template <bool kWide> WR_BODY void load_codes(uint64_t address, uint32_t count, uint8_t (&bytes)[8]) {
    if constexpr (kWide) {
        const Word64 all = load_at<Word64>(address);
        memcpy(bytes, &all, 8);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) bytes[i] = i < count ? load_at<uint8_t>(address + i) : uint8_t{0};
    }
}

WR_BODY uint8_t to_code(float value, bool fp8) { return fp8 ? to_e4m3(value) : static_cast<uint8_t>(to_int8(value)); }
WR_BODY float from_code(uint8_t code, bool fp8) { return fp8 ? from_e4m3(code) : from_int8(static_cast<int8_t>(code)); }

WR_BODY uint32_t part_of(uint32_t at, uint32_t all) { return all - at < 8 ? all - at : 8; }

// One token of a half, with a scale of its own.
template <int kType, bool kWide>
WR_BODY void encode_token(uint64_t content, uint32_t width, uint64_t scale_at, uint64_t codes_at, bool fp8) {
    constexpr uint32_t element = sizeof(typename ElementOf<kType>::Bits);
    float values[8];
    uint32_t largest = 0;
    for (uint32_t at = 0; at < width; at += 8) {
        load_some<kType, kWide>(content + at * element, part_of(at, width), values);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t magnitude = finite_magnitude(values[i]);
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    const float scale = scale_of(largest, fp8 ? FP8_PEAK : INT8_PEAK), inverse = divide(1.0f, scale);
    store_at(scale_at, float_bits(scale));
    for (uint32_t at = 0; at < width; at += 8) {
        uint8_t bytes[8];
        load_some<kType, kWide>(content + at * element, part_of(at, width), values);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) bytes[i] = to_code(multiply(values[i], inverse), fp8);
        store_codes<kWide>(codes_at + at, part_of(at, width), bytes);
    }
}

template <int kType, bool kWide>
WR_BODY void decode_token(uint64_t content, uint32_t width, uint64_t scale_at, uint64_t codes_at, bool fp8,
                          Outcome *outcome) {
    constexpr uint32_t element = sizeof(typename ElementOf<kType>::Bits);
    const float scale = load_float(scale_at);
    if (!is_scale(float_bits(scale), kType, fp8)) {
        tell(&outcome->corrupt);
        return;
    }
    for (uint32_t at = 0; at < width; at += 8) {
        uint8_t bytes[8];
        float values[8];
        load_codes<kWide>(codes_at + at, part_of(at, width), bytes);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) values[i] = multiply(scale, from_code(bytes[i], fp8));
        store_some<kType, kWide>(content + at * element, part_of(at, width), values);
    }
}

template <int kType, bool kWide> WR_BODY void copy_token(uint64_t to, uint64_t from, uint32_t bytes) {
    if constexpr (kWide) {
        for (uint32_t at = 0; at < bytes; at += 16) store_at(to + at, load_at<Word128>(from + at));
    } else {
        typedef typename ElementOf<kType>::Bits Bits;
        for (uint32_t at = 0; at < bytes; at += sizeof(Bits)) store_at(to + at, load_at<Bits>(from + at));
    }
}

// Items: `halves` halves from `first_half` (0: K) on, token by token.
template <int kType, bool kWide, bool kEncode>
WR_BODY void token_item(const Pages &pages, const Codes &codes, uint32_t item, uint32_t first_half, uint32_t halves) {
    const uint32_t tokens = static_cast<uint32_t>(codes.shape.tokens), unit_number = item / (halves * tokens);
    const uint32_t inside = item - unit_number * halves * tokens, token = inside % tokens;
    const bool keys = first_half + inside / tokens == 0, fp8 = codes.encoding != WR_INT8;
    const Unit unit = locate_unit(pages, codes, unit_number);
    const Half half = keys ? k_half(codes.shape) : v_half(codes.shape);
    const uint32_t width = static_cast<uint32_t>(half.width);
    const uint64_t content = unit.content + static_cast<uint64_t>(token * codes.token_stride + half.offset);
    const ScaledPlanes &planes = codes.planes;
    const int64_t plane = keys ? planes.k_codes : planes.v_codes;
    const bool as_is = keys && codes.encoding == WR_K16_V8;
    const uint32_t row = as_is ? static_cast<uint32_t>(codes.shape.k_bytes) : width;
    const uint64_t row_at = unit.encoded + static_cast<uint64_t>(plane) + uint64_t{token} * row;
    const int64_t scales = keys ? planes.k_scales : planes.v_scales;
    const uint64_t scale_at = unit.encoded + static_cast<uint64_t>(scales) + 4ull * token;
    if (kEncode) {
        if (as_is) copy_token<kType, kWide>(row_at, content, row);
        else encode_token<kType, kWide>(content, width, scale_at, row_at, fp8);
        if (token + 1 == tokens) {
            clear_bytes(unit.encoded, plane + int64_t{tokens} * row, plane + pad16(int64_t{tokens} * row));
            if (!as_is) clear_bytes(unit.encoded, scales + 4ll * tokens, scales + pad16(4ll * tokens));
        }
    } else {
        if (as_is) copy_token<kType, kWide>(content, row_at, row);
        else decode_token<kType, kWide>(content, width, scale_at, row_at, fp8, codes.outcome);
    }
}

// Items: the K of WR_INT8 by groups of channels, 8 of them or, not kWide, up to 8.
template <int kType, bool kWide, bool kEncode>
WR_BODY void channel_item(const Pages &pages, const Codes &codes, uint32_t item) {
    constexpr uint32_t element = sizeof(typename ElementOf<kType>::Bits);
    const Half half = k_half(codes.shape);
    const uint32_t width = static_cast<uint32_t>(half.width), groups = (width + 7) / 8;
    const uint32_t unit_number = item / groups, first = (item - unit_number * groups) * 8;
    const uint32_t count = part_of(first, width), tokens = static_cast<uint32_t>(codes.shape.tokens);
    const Unit unit = locate_unit(pages, codes, unit_number);
    const uint64_t content = unit.content + static_cast<uint64_t>(half.offset) + first * element;
    const uint64_t scales = unit.encoded + static_cast<uint64_t>(codes.planes.k_scales) + 4ull * first;
    const uint64_t plane = unit.encoded + static_cast<uint64_t>(codes.planes.k_codes) + first;
    float values[8], scale[8], inverse[8];
    if (kEncode) {
        uint32_t largest[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t token = 0; token < tokens; ++token) {
            load_some<kType, kWide>(content + static_cast<uint64_t>(token * codes.token_stride), count, values);
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) {
                const uint32_t magnitude = finite_magnitude(values[i]);
                largest[i] = magnitude > largest[i] ? magnitude : largest[i];
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            scale[i] = scale_of(largest[i], INT8_PEAK);
            inverse[i] = divide(1.0f, scale[i]);
            if (i < count) store_at(scales + 4 * i, float_bits(scale[i]));
        }
    } else {
        bool sound = true;
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            scale[i] = i < count ? load_float(scales + 4 * i) : 1.0f;
            sound = sound && is_scale(float_bits(scale[i]), kType, false);
        }
        if (!sound) {
            tell(&codes.outcome->corrupt);
            return;
        }
    }
    for (uint32_t token = 0; token < tokens; ++token) {
        const uint64_t at = content + static_cast<uint64_t>(token * codes.token_stride);
        const uint64_t codes_at = plane + uint64_t{token} * width;
        uint8_t bytes[8];
        if (kEncode) {
            load_some<kType, kWide>(at, count, values);
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) bytes[i] = to_code(multiply(values[i], inverse[i]), false);
            store_codes<kWide>(codes_at, count, bytes);
        } else {
            load_codes<kWide>(codes_at, count, bytes);
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) values[i] = multiply(scale[i], from_code(bytes[i], false));
            store_some<kType, kWide>(at, count, values);
        }
    }
    if (kEncode && first + count == width) {
        const int64_t k_scales = codes.planes.k_scales, k_codes = codes.planes.k_codes;
        clear_bytes(unit.encoded, k_scales + 4ll * width, k_scales + pad16(4ll * width));
        clear_bytes(unit.encoded, k_codes + int64_t{tokens} * width, k_codes + pad16(int64_t{tokens} * width));
    }
}

// A warp's working memory for a tile.
struct TileWork {
    uint32_t counts[256];
    uint8_t code_of[256];
    uint8_t table[16];
};

struct Tile {
    uint64_t content, encoded;
    uint32_t width;
    int64_t token_stride;
    TilePlanes planes;
};

WR_HD uint32_t tiles_of(const Codes &codes) {
    const UnitShape &shape = codes.shape;
    return static_cast<uint32_t>(tile_count(shape.tokens, k_half(shape).width) +
                                 tile_count(shape.tokens, v_half(shape).width));
}

// The most items that a kernel of this encoding makes of a unit.
WR_HD uint32_t items_of_unit(const Codes &codes) {
    const uint32_t tokens = static_cast<uint32_t>(codes.shape.tokens);
    const uint32_t groups = static_cast<uint32_t>(k_half(codes.shape).width + 7) / 8;
    if (codes.encoding == WR_EXP12) return tiles_of(codes);
    return groups > 2 * tokens && codes.encoding == WR_INT8 ? groups : 2 * tokens;
}

// Items: the tiles of K, then those of V.
WR_BODY Tile locate_tile(const Pages &pages, const Codes &codes, uint32_t item, uint32_t tiles) {
    const UnitShape &shape = codes.shape;
    const Unit unit = locate_unit(pages, codes, item / tiles);
    const int32_t number = static_cast<int32_t>(item % tiles), of_k = tile_count(shape.tokens, k_half(shape).width);
    const bool keys = number < of_k;
    const Half half = keys ? k_half(shape) : v_half(shape);
    const int32_t each = tile_tokens(half.width), index = keys ? number : number - of_k, first = index * each;
    const int64_t before = keys ? 0 : tiled_bytes(shape.tokens, k_half(shape).width);
    Tile tile;
    tile.content = unit.content + static_cast<uint64_t>(first * codes.token_stride + half.offset);
    tile.encoded = unit.encoded + static_cast<uint64_t>(before + index * int64_t{tile_planes(each * half.width).bytes});
    tile.width = static_cast<uint32_t>(half.width);
    tile.token_stride = codes.token_stride;
    const int32_t rest = shape.tokens - first;
    tile.planes = tile_planes((rest < each ? rest : each) * half.width);
    return tile;
}

WR_BODY uint64_t element_address(const Tile &tile, uint32_t at) {
    const uint32_t token = at / tile.width;
    return tile.content + static_cast<uint64_t>(token * tile.token_stride) + 2ull * (at - token * tile.width);
}

// Up to 8 elements from `at` on; those behind the tile's end are zero.
template <bool kWide> WR_BODY void load_bf16(const Tile &tile, uint32_t at, uint16_t (&bits)[8]) {
    const uint32_t count = static_cast<uint32_t>(tile.planes.count);
    if constexpr (kWide) {
        Word128 all{0, 0, 0, 0};
        if (at < count) all = load_at<Word128>(element_address(tile, at));
        memcpy(bits, &all, 16);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)
            bits[i] = at + i < count ? load_at<uint16_t>(element_address(tile, at + i)) : uint16_t{0};
    }
}

// Eights of elements in a tile, its padding included, rounded up to whole rounds of a warp: all lanes go alike.
WR_BODY uint32_t rounds_end(const TilePlanes &planes) {
    const uint32_t eights = static_cast<uint32_t>(planes.low - planes.codes) / 4;
    return (eights + kLanes - 1) / kLanes * kLanes;
}

// The 15 most frequent exponents, the lower first among equals, in ascending order. A lane ranks 8 neighbours.
WR_BODY void rank_exponents(TileWork &work, uint32_t lane) {
    uint32_t keys[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t exponent = lane * 8 + i;
        keys[i] = (work.counts[exponent] << 8 | (255 - exponent)) + 1; // above 0, which marks what is taken
    }
    uint32_t chosen = 0;
    for (int32_t rank = 0; rank < TABLE_ENTRIES; ++rank) {
        uint32_t most = 0;
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) most = keys[i] > most ? keys[i] : most;
        most = warp_max(most);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)
            if (keys[i] == most) {
                keys[i] = 0;
                chosen |= 1u << i;
            }
    }
    uint32_t count = 0, all;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) count += chosen >> i & 1;
    uint32_t code = warp_sum_before(count, lane, all);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        const bool taken = (chosen >> i & 1) != 0;
        if (taken) work.table[code] = static_cast<uint8_t>(lane * 8 + i);
        work.code_of[lane * 8 + i] = static_cast<uint8_t>(taken ? code : uint32_t{ESCAPE});
        code += taken;
    }
    if (lane == 0) work.table[TABLE_ENTRIES] = 0;
}

template <bool kWide> WR_BODY void count_exponents(const Tile &tile, TileWork &work, uint32_t lane) {
    const uint32_t count = static_cast<uint32_t>(tile.planes.count);
    for (uint32_t at = lane * 8; at < count; at += kLanes * 8) {
        uint16_t bits[8];
        load_bf16<kWide>(tile, at, bits);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)
            if (at + i < count) count_one(&work.counts[exponent_of(bits[i])]);
    }
}

template <bool kWide>
WR_BODY void encode_tile(const Tile &tile, TileWork &work, uint32_t lane, Outcome *outcome) {
    const TilePlanes &planes = tile.planes;
    const uint32_t count = static_cast<uint32_t>(planes.count), capacity = static_cast<uint32_t>(planes.capacity);
    for (uint32_t i = lane; i < 256; i += kLanes) work.counts[i] = 0;
    warp_sync();
    count_exponents<kWide>(tile, work, lane);
    warp_sync();
    rank_exponents(work, lane);
    warp_sync();
    if (lane < 16) store_at(tile.encoded + lane, work.table[lane]);
    const uint64_t escapes_at = tile.encoded + static_cast<uint64_t>(planes.escapes);
    uint32_t escaped = 0;
    for (uint32_t eight = lane, end = rounds_end(planes); eight < end; eight += kLanes) {
        uint16_t bits[8];
        uint32_t packed = 0, mine = 0, all = 0;
        load_bf16<kWide>(tile, eight * 8, bits);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            const bool valid = eight * 8 + i < count;
            const uint32_t code = valid ? work.code_of[exponent_of(bits[i])] : 0u;
            packed |= code << (4 * i);
            mine += valid && code == uint32_t{ESCAPE};
        }
        uint32_t place = escaped + warp_sum_before(mine, lane, all);
        escaped += all;
        if (mine != 0) {
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i)
                if (eight * 8 + i < count && (packed >> (4 * i) & 15) == uint32_t{ESCAPE}) {
                    if (place < capacity) store_at(escapes_at + place, exponent_of(bits[i]));
                    ++place;
                }
        }
        const uint32_t code_bytes = static_cast<uint32_t>(planes.low - planes.codes);
        const uint32_t low_bytes = static_cast<uint32_t>(planes.bytes - planes.low);
        if (eight * 4 < code_bytes) store_at(tile.encoded + static_cast<uint64_t>(planes.codes) + eight * 4, packed);
        if (eight * 8 < low_bytes) {
            uint8_t bytes[8];
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) bytes[i] = low_of(bits[i]);
            store_codes<true>(tile.encoded + static_cast<uint64_t>(planes.low) + eight * 8, 8, bytes);
        }
    }
    for (uint32_t i = escaped + lane; i < capacity; i += kLanes) store_at<uint8_t>(escapes_at + i, 0);
    if (escaped > capacity && lane == 0) tell(&outcome->incompressible);
    warp_sync();
}

template <bool kWide>
WR_BODY void decode_tile(const Tile &tile, TileWork &work, uint32_t lane, Outcome *outcome) {
    const TilePlanes &planes = tile.planes;
    const uint32_t count = static_cast<uint32_t>(planes.count), capacity = static_cast<uint32_t>(planes.capacity);
    if (lane < 16) work.table[lane] = load_at<uint8_t>(tile.encoded + lane);
    warp_sync();
    const bool rises = lane == 0 || lane >= TABLE_ENTRIES || work.table[lane] > work.table[lane - 1];
    const bool sound = warp_all(rises && (lane != 0 || work.table[TABLE_ENTRIES] == 0));
    const uint64_t escapes_at = tile.encoded + static_cast<uint64_t>(planes.escapes);
    uint32_t escaped = 0;
    for (uint32_t eight = lane, end = rounds_end(planes); eight < end; eight += kLanes) {
        const bool any = eight * 8 < count;
        uint32_t packed = 0, mine = 0, all = 0;
        uint8_t lows[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (any) {
            packed = load_at<uint32_t>(tile.encoded + static_cast<uint64_t>(planes.codes) + eight * 4);
            load_codes<true>(tile.encoded + static_cast<uint64_t>(planes.low) + eight * 8, 8, lows);
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)
            mine += eight * 8 + i < count && (packed >> (4 * i) & 15) == uint32_t{ESCAPE};
        uint32_t place = escaped + warp_sum_before(mine, lane, all);
        escaped += all;
        uint16_t bits[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t code = packed >> (4 * i) & 15;
            uint8_t exponent = work.table[code];
            if (eight * 8 + i < count && code == uint32_t{ESCAPE}) {
                exponent = place < capacity ? load_at<uint8_t>(escapes_at + place) : uint8_t{0};
                ++place;
            }
            bits[i] = join_bf16(exponent, lows[i]);
        }
        if (kWide && any) {
            Word128 whole;
            memcpy(&whole, bits, 16);
            store_at(element_address(tile, eight * 8), whole);
        } else if (any) {
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i)
                if (eight * 8 + i < count) store_at(element_address(tile, eight * 8 + i), bits[i]);
        }
    }
    if ((escaped > capacity || !sound) && lane == 0) tell(&outcome->corrupt);
    warp_sync();
}

template <bool kWide, bool kEncode>
WR_BODY void tile_body(const Pages &pages, const Codes &codes, const Thread &at, TileWork *works) {
    const uint32_t warps = at.threads / kLanes, warp = at.thread / kLanes, lane = at.thread % kLanes;
    const uint32_t tiles = tiles_of(codes), all = pages.total * tiles;
    for (uint32_t item = at.block * warps + warp; item < all; item += at.blocks * warps) {
        const Tile tile = locate_tile(pages, codes, item, tiles);
        if (kEncode) encode_tile<kWide>(tile, works[warp], lane, codes.outcome);
        else decode_tile<kWide>(tile, works[warp], lane, codes.outcome);
    }
}

template <int kType, bool kWide, bool kEncode>
WR_BODY void token_body(const Pages &pages, const Codes &codes, const Thread &at, uint32_t first_half, uint32_t halves) {
    const uint32_t all = pages.total * halves * static_cast<uint32_t>(codes.shape.tokens);
    for (uint32_t item = at.block * at.threads + at.thread; item < all; item += at.blocks * at.threads)
        token_item<kType, kWide, kEncode>(pages, codes, item, first_half, halves);
}

template <int kType, bool kWide, bool kEncode>
WR_BODY void channel_body(const Pages &pages, const Codes &codes, const Thread &at) {
    const uint32_t groups = static_cast<uint32_t>(k_half(codes.shape).width + 7) / 8, all = pages.total * groups;
    for (uint32_t item = at.block * at.threads + at.thread; item < all; item += at.blocks * at.threads)
        channel_item<kType, kWide, kEncode>(pages, codes, item);
}

}  // namespace cuda
}  // namespace wr

#endif
