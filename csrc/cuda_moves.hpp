// The bodies of the kernels that move content as it is, and of those that rotate keys on the way.
#ifndef WARMROUTE_CUDA_MOVES_HPP
#define WARMROUTE_CUDA_MOVES_HPP

#include "core/checksum.hpp"
#include "core/half.hpp"
#include "cuda_lanes.hpp"

namespace wr {
namespace cuda {

// What a vector adds to its page's checksum; `offset` is its number in the page.
WR_BODY uint64_t vector_sum(const Word128 &value, uint64_t offset) {
    const uint64_t low = value.x | static_cast<uint64_t>(value.y) << 32;
    const uint64_t high = value.z | static_cast<uint64_t>(value.w) << 32;
    const uint64_t key = checksum_key(2 * offset);
    return checksum_mix(low, key) + checksum_mix(high, key + WR_MIX_STEP);
}
WR_BODY uint64_t vector_sum(const Word64 &value, uint64_t offset) {
    return checksum_mix(value.x | static_cast<uint64_t>(value.y) << 32, checksum_key(offset));
}
template <typename V> WR_BODY uint64_t vector_sum(const V &, uint64_t) { return 0; }

// Copy items first, first + stride, … of a launch: all loads are under way before the first store. The loop of a kernel
// runs alike for all threads of a block, because sums are made by whole warps.
template <typename V, bool kGather, bool kSums>
WR_BODY void copy_items(const Pages &pages, uint32_t first, uint32_t stride, uint32_t lane, uint64_t *sums) {
    Place places[kInFlight];
    V values[kInFlight];
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
        places[i] = locate(pages, first + i * stride, sizeof(V));
        values[i] = V{};
        if (places[i].wanted) values[i] = load_at<V>(kGather ? places[i].cache : places[i].packed);
    }
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
        const Place &place = places[i];
        if (place.wanted) store_at(kGather ? place.packed : place.cache, values[i]);
        if (kSums) add_sum(sums, place.page, place.wanted ? vector_sum(values[i], place.offset) : 0, lane);
    }
}

template <typename V, bool kGather, bool kSums>
WR_BODY void copy_body(const Pages &pages, const Thread &at, uint64_t *sums) {
    const uint32_t tile = at.threads * kInFlight;
    for (uint32_t base = at.block * tile; base < pages.total; base += at.blocks * tile)
        copy_items<V, kGather, kSums>(pages, base + at.thread, at.threads, at.thread % kLanes, sums);
}

template <int kType> struct ElementOf;
template <> struct ElementOf<WR_F32> {
    typedef uint32_t Bits;
    typedef float Wide;
};
template <> struct ElementOf<WR_F16> {
    typedef uint16_t Bits;
    typedef float Wide;
};
template <> struct ElementOf<WR_BF16> {
    typedef uint16_t Bits;
    typedef float Wide;
};
template <> struct ElementOf<WR_F64> {
    typedef Word64 Bits;
    typedef double Wide;
};

template <int kType> WR_BODY typename ElementOf<kType>::Wide widen(typename ElementOf<kType>::Bits bits) {
    typename ElementOf<kType>::Wide value;
    if constexpr (kType == WR_F16) value = widen_f16(bits);
    else if constexpr (kType == WR_BF16) value = widen_bf16(bits);
    else memcpy(&value, &bits, sizeof value);
    return value;
}

template <int kType> WR_BODY typename ElementOf<kType>::Bits narrow(typename ElementOf<kType>::Wide value) {
    if constexpr (kType == WR_F16) return narrow_f16(value);
    else if constexpr (kType == WR_BF16) return narrow_bf16(value);
    else {
        typename ElementOf<kType>::Bits bits;
        value = canonical(value);
        memcpy(&bits, &value, sizeof bits);
        return bits;
    }
}

template <int kType>
WR_BODY void turn_pair(typename ElementOf<kType>::Bits &x_bits, typename ElementOf<kType>::Bits &y_bits,
                       typename ElementOf<kType>::Wide cosine, typename ElementOf<kType>::Wide sine) {
    const auto x = widen<kType>(x_bits), y = widen<kType>(y_bits);
    x_bits = narrow<kType>(subtract(multiply(x, cosine), multiply(y, sine)));
    y_bits = narrow<kType>(add(multiply(y, cosine), multiply(x, sine)));
}

// Rotate an item: two vectors element by element, or one whose neighbours are pairs.
template <int kType, typename V>
WR_BODY void turn_item(V &low, V &high, bool two, uint32_t item, const typename ElementOf<kType>::Wide *cosines,
                       const typename ElementOf<kType>::Wide *sines) {
    typedef typename ElementOf<kType>::Bits Bits;
    constexpr uint32_t count = sizeof(V) / sizeof(Bits);
    Bits x[count], y[count];
    memcpy(x, &low, sizeof x);
    memcpy(y, &high, sizeof y);
    if (two) {
#pragma unroll
        for (uint32_t i = 0; i < count; ++i)
            turn_pair<kType>(x[i], y[i], cosines[item * count + i], sines[item * count + i]);
    } else {
#pragma unroll
        for (uint32_t i = 0; i + 1 < count; i += 2)
            turn_pair<kType>(x[i], x[i + 1], cosines[(item * count + i) / 2], sines[(item * count + i) / 2]);
    }
    memcpy(&low, x, sizeof x);
    memcpy(&high, y, sizeof y);
}

// Packed form to cache with a rotation, or, in place, only what is rotated.
template <int kType, typename V, bool kInPlace, bool kSums>
WR_BODY void turn_items(const Pages &pages, const Turn &turn, uint32_t first, uint32_t stride, uint32_t lane,
                        const typename ElementOf<kType>::Wide *cosines, const typename ElementOf<kType>::Wide *sines,
                        uint64_t *sums) {
    TurnPlace places[kInFlight];
    V low[kInFlight], high[kInFlight];
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
        places[i] = locate_turned(pages, turn, first + i * stride, sizeof(V));
        const uint64_t from = kInPlace ? places[i].low.cache : places[i].low.packed;
        low[i] = high[i] = V{};
        if (places[i].low.wanted) low[i] = load_at<V>(from);
        if (places[i].low.wanted && places[i].distance != 0) high[i] = load_at<V>(from + places[i].distance);
    }
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
        const TurnPlace &place = places[i];
        const bool two = place.distance != 0;
        if (kSums) {
            uint64_t sum = place.low.wanted ? vector_sum(low[i], place.low.offset) : 0;
            if (place.low.wanted && two) sum += vector_sum(high[i], place.low.offset + turn.partner);
            add_sum(sums, place.low.page, sum, lane);
        }
        if (!place.low.wanted) continue;
        if (place.rotated) turn_item<kType>(low[i], high[i], two, place.factor, cosines, sines);
        store_at(place.low.cache, low[i]);
        if (two) store_at(place.low.cache + place.distance, high[i]);
    }
}

template <int kType, typename V, bool kInPlace, bool kSums>
WR_BODY void turn_body(const Pages &pages, const Turn &turn, const Thread &at,
                       const typename ElementOf<kType>::Wide *cosines, const typename ElementOf<kType>::Wide *sines,
                       uint64_t *sums) {
    const uint32_t tile = at.threads * kInFlight;
    for (uint32_t base = at.block * tile; base < pages.total; base += at.blocks * tile)
        turn_items<kType, V, kInPlace, kSums>(pages, turn, base + at.thread, at.threads, at.thread % kLanes, cosines,
                                              sines, sums);
}

// The checksums of pages of any width and alignment. A warp sums one part of a page; `parts` of kSumPart bytes each make
// a page of `bytes`.
constexpr uint32_t kSumPart = 32768;

template <bool kAligned>
WR_BODY uint64_t words_sum(uint64_t address, uint64_t begin, uint64_t end, uint32_t lane) {
    uint64_t sum = 0;
    for (uint64_t at = begin + lane * uint64_t{8}; at < end; at += kLanes * uint64_t{8}) {
        uint64_t word = 0;
        if (kAligned && at + 8 <= end) {
            const Word64 taken = load_at<Word64>(address + at);
            word = taken.x | static_cast<uint64_t>(taken.y) << 32;
        } else {
            for (uint32_t i = 0; i < 8 && at + i < end; ++i)
                word |= static_cast<uint64_t>(load_at<uint8_t>(address + at + i)) << (8 * i);
        }
        sum += checksum_mix(word, checksum_key(at / 8));
    }
    return sum;
}

WR_BODY void sum_part(uint64_t address, uint64_t bytes, uint64_t part, uint32_t page, uint64_t *sums, uint32_t lane) {
    const uint64_t begin = part * kSumPart, end = begin + kSumPart < bytes ? begin + kSumPart : bytes;
    const uint64_t sum = address % 8 == 0 ? words_sum<true>(address, begin, end, lane)
                                          : words_sum<false>(address, begin, end, lane);
    add_sum(sums, page, sum, lane);
}

// Sums of a launch's packed pages; `parts` is how many a page has.
WR_BODY void sum_body(const Pages &pages, const Thread &at, uint64_t bytes, uint32_t parts, uint64_t *sums) {
    const uint32_t warps = at.threads / kLanes, warp = at.block * warps + at.thread / kLanes;
    const uint32_t count = pages.layer_count * pages.rows_of_layer.value;
    const uint64_t all = uint64_t{count} * parts;
    for (uint64_t item = warp; item < all; item += uint64_t{at.blocks} * warps) {
        const uint32_t page = static_cast<uint32_t>(item / parts), layer = page / pages.rows_of_layer.value;
        const Row &row = pages.rows[page - layer * pages.rows_of_layer.value];
        sum_part(row.packed + layer * row.packed_layer_step, bytes, item % parts, page, sums, at.thread % kLanes);
    }
}

// Hand a launch's sums to the caller, with the pages' length mixed in.
WR_BODY void publish_body(const Pages &pages, const Thread &at, uint64_t bytes, const uint64_t *sums, uint64_t given) {
    const uint32_t count = pages.layer_count * pages.rows_of_layer.value;
    for (uint32_t page = at.block * at.threads + at.thread; page < count; page += at.blocks * at.threads) {
        const uint32_t layer = page / pages.rows_of_layer.value;
        const Row &row = pages.rows[page - layer * pages.rows_of_layer.value];
        const uint64_t index = row.sums + uint64_t{layer} * row.sums_layer_step, sum = sums[page] + checksum_length(bytes);
        store_at(given + 8 * index, Word64{static_cast<uint32_t>(sum), static_cast<uint32_t>(sum >> 32)});
    }
}

}  // namespace cuda
}  // namespace wr

#endif
