// Address arithmetic of caches and packed forms. A page is one (layer, block).
#ifndef WARMROUTE_CORE_ADDRESS_HPP
#define WARMROUTE_CORE_ADDRESS_HPP

#include "shape.hpp"

namespace wr {

// Address of a unit's first token in the cache.
WR_HD uint64_t unit_address(const wr_view &view, int32_t layer, int32_t block, int32_t head) {
    return view.layers[layer] + (uint64_t)((int64_t)block * view.block_stride + (int64_t)head * view.head_stride);
}

// Address in the packed form of the first unit in range of the span's block `at`, in a layer.
WR_HD uint64_t packed_address(const wr_span &span, const wr_range &range, int32_t layer, int32_t at, int64_t unit_bytes) {
    int64_t page = (int64_t)layer * span.packed_blocks + span.packed_first_block + at;
    return span.packed + (uint64_t)((page * range.packed_heads + range.packed_first_head) * unit_bytes);
}

// The tokens in range of the span's block `at`: [first, last) within the block, empty where first >= last.
struct TokenRange {
    int32_t first, last;
};

WR_HD TokenRange tokens_of(const wr_view &view, const wr_range &range, int32_t at) {
    int64_t before = (int64_t)at * view.tokens;
    int64_t first = range.first_token - before, last = (int64_t)range.first_token + range.token_count - before;
    first = first < 0 ? 0 : first > view.tokens ? view.tokens : first;
    last = last < 0 ? 0 : last > view.tokens ? view.tokens : last;
    return TokenRange{(int32_t)first, (int32_t)last};
}

}  // namespace wr

#endif
