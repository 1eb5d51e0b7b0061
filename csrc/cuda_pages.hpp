// Which bytes each thread moves: the index arithmetic of the kernels, as functions that host code can run too.
//
// A launch covers the pages of up to kMaxLayers layers and kMaxRows blocks. A page is `outer` times `inner` runs of
// consecutive bytes in the cache, and without gaps in the packed form; both are cut into vectors of one width, the widest
// that every address and stride allows. Vector g of a launch is vector g % page of page g / page; pages are counted
// through all rows of a layer first, because the blocks of a chunk are neighbours in its packed form.
//
// All of this is a kernel parameter (constant memory), so that no descriptor can change under a kernel that still runs.
#ifndef WARMROUTE_CUDA_PAGES_HPP
#define WARMROUTE_CUDA_PAGES_HPP

#include "core/shape.hpp"

namespace wr {
namespace cuda {

constexpr int32_t kMaxLayers = 128;
constexpr int32_t kMaxRows = 160;
constexpr uint32_t kThreads = 512; // of a thread block
constexpr uint32_t kInFlight = 4;  // loads of a thread before it stores
constexpr uint32_t kMostItems = 0x7FFFFFFF; // of a launch

struct alignas(16) Word128 {
    uint32_t x, y, z, w;
};

struct alignas(8) Word64 {
    uint32_t x, y;
};

// Division of numbers below 2^31 by a constant of the launch: a multiplication and a shift (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994, figure 4.1).
struct Divisor {
    uint32_t value, factor, shift;
};

WR_HD Divisor divisor(uint32_t value) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < value) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - value;
    return Divisor{value, static_cast<uint32_t>((rest << 32) / value + 1), shift};
}

WR_HD uint32_t quotient(uint32_t number, const Divisor &by) {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(number, by.factor);
#else
    const uint32_t high = static_cast<uint32_t>(uint64_t{number} * by.factor >> 32);
#endif
    return (high + number) >> by.shift;
}

// One block of a span.
struct Row {
    uint64_t packed;            // address of its page (the heads in range) in the launch's first layer
    uint64_t packed_layer_step; // to its page in the next layer
    int32_t block;
    int32_t first_token, token_count; // of its own tokens
    uint32_t sums, sums_layer_step;   // place of its checksum in the launch's first layer, and the way to the next
};

struct Pages {
    uint64_t layers[kMaxLayers]; // address of the first head in range of block 0
    Row rows[kMaxRows];
    int64_t block_stride, outer_stride, inner_stride;
    uint32_t layer_count;
    Divisor rows_of_layer;
    Divisor inner;    // runs between two steps of outer_stride
    Divisor run;      // items per run
    Divisor page;     // items per page
    uint32_t total;   // items of the launch, at most kMostItems
    uint32_t partial; // whether some rows lack tokens; `inner` then counts tokens
};

// Where the rotated part of a token's content is, in vectors. An item is either one vector, or two that rotate together.
struct Turn {
    uint32_t content;    // vectors per token and head
    uint32_t first;      // the first that is rotated
    uint32_t items;      // of each content, those that are rotated: these come first
    uint32_t step;       // from one rotated item to the next
    uint32_t partner;    // distance of an item's second vector; 0 where it has one only
    uint32_t covered;    // vectors that rotated items cover
};

struct Place {
    uint64_t cache, packed;
    uint32_t page;   // of the launch
    uint32_t offset; // of the item in its page of the packed form, in vectors
    bool wanted;
};

struct TurnPlace {
    Place low;
    uint64_t distance; // in bytes to the second vector; 0 without one
    uint32_t factor;   // number of the first vector's first element among the rotated; only where `rotated`
    bool rotated;
};

struct Index {
    uint32_t page, layer, row, outer, inner, rest;
};

WR_HD Index split(const Pages &pages, uint32_t item) {
    Index at;
    at.page = quotient(item, pages.page);
    const uint32_t inside = item - at.page * pages.page.value;
    at.layer = quotient(at.page, pages.rows_of_layer);
    at.row = at.page - at.layer * pages.rows_of_layer.value;
    const uint32_t run = quotient(inside, pages.run);
    at.rest = inside - run * pages.run.value;
    at.outer = quotient(run, pages.inner);
    at.inner = run - at.outer * pages.inner.value;
    return at;
}

WR_HD uint64_t cache_address(const Pages &pages, const Index &at) {
    return pages.layers[at.layer] + static_cast<uint64_t>(pages.rows[at.row].block * pages.block_stride +
                                                          at.outer * pages.outer_stride +
                                                          at.inner * pages.inner_stride);
}

WR_HD uint64_t packed_page(const Pages &pages, const Index &at) {
    return pages.rows[at.row].packed + at.layer * pages.rows[at.row].packed_layer_step;
}

WR_HD bool token_wanted(const Pages &pages, const Index &at) {
    if (!pages.partial) return true;
    const Row &row = pages.rows[at.row];
    const int32_t token = static_cast<int32_t>(at.inner);
    return token >= row.first_token && token - row.first_token < row.token_count;
}

// Where item `item` of a plain copy is read and written; `width` is the size of a vector in bytes.
WR_HD Place locate(const Pages &pages, uint32_t item, uint32_t width) {
    if (item >= pages.total) return Place{0, 0, 0, 0, false};
    const Index at = split(pages, item);
    Place place;
    place.page = at.page;
    place.offset = item - at.page * pages.page.value;
    place.cache = cache_address(pages, at) + static_cast<uint64_t>(at.rest) * width;
    place.packed = packed_page(pages, at) + static_cast<uint64_t>(place.offset) * width;
    place.wanted = token_wanted(pages, at);
    return place;
}

// The same for a copy that rotates. `pages.run` counts the items of one token's content.
WR_HD TurnPlace locate_turned(const Pages &pages, const Turn &turn, uint32_t item, uint32_t width) {
    TurnPlace place{{0, 0, 0, 0, false}, 0, 0, false};
    if (item >= pages.total) return place;
    const Index at = split(pages, item);
    place.rotated = at.rest < turn.items;
    uint32_t vector = turn.first + at.rest * turn.step;
    if (!place.rotated) {
        vector = at.rest - turn.items;
        if (vector >= turn.first) vector += turn.covered;
    }
    const uint32_t content = at.outer * pages.inner.value + at.inner;
    place.low.page = at.page;
    place.low.offset = content * turn.content + vector;
    place.low.cache = cache_address(pages, at) + static_cast<uint64_t>(vector) * width;
    place.low.packed = packed_page(pages, at) + static_cast<uint64_t>(place.low.offset) * width;
    place.low.wanted = token_wanted(pages, at);
    place.distance = place.rotated ? static_cast<uint64_t>(turn.partner) * width : 0;
    place.factor = at.rest;
    return place;
}

}  // namespace cuda
}  // namespace wr

#endif
