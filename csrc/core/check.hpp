// Whether a call describes memory that it may touch: everything is checked before anything is written. For host code of
// both backends. Sums and products that overflow count as out of bounds.
#ifndef WARMROUTE_CORE_CHECK_HPP
#define WARMROUTE_CORE_CHECK_HPP

#include <stdarg.h>
#include <stdio.h>

#include "shape.hpp"

namespace wr {

// Why a call failed.
struct Reason {
    char text[256];
};

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static inline int32_t
refuse(Reason &reason, int32_t status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason.text, sizeof reason.text, format, arguments);
    va_end(arguments);
    return status;
}

// sum += count * size; false where one of them is negative or the result does not fit.
static inline bool add_product(int64_t &sum, int64_t count, int64_t size) {
    int64_t product;
    return count >= 0 && size >= 0 && !__builtin_mul_overflow(count, size, &product) &&
           !__builtin_add_overflow(sum, product, &sum);
}

static inline bool part_fits(const wr_view &view, int32_t offset, int32_t bytes) {
    return offset >= 0 && bytes >= 0 && bytes <= view.content_bytes && offset <= view.content_bytes - bytes;
}

static inline bool parts_apart(const wr_view &view) {
    return view.k_bytes == 0 || view.v_bytes == 0 || view.k_offset + view.k_bytes <= view.v_offset ||
           view.v_offset + view.v_bytes <= view.k_offset;
}

static inline bool aligned(const wr_view &view) {
    int32_t size = element_bytes(view.dtype);
    bool strides = view.block_stride % size == 0 && view.head_stride % size == 0 && view.token_stride % size == 0;
    bool parts = view.k_offset % size == 0 && view.k_bytes % size == 0 && view.v_offset % size == 0 &&
                 view.v_bytes % size == 0;
    return strides && parts && view.content_bytes % size == 0;
}

// Whether no two (block, head, token) of a layer share a byte: each dimension, from the smallest stride up, steps over all
// that lies within the ones before it. The extent of a layer is returned in `extent`.
static inline bool nested(const wr_view &view, int64_t &extent) {
    int64_t strides[3] = {view.token_stride, view.head_stride, view.block_stride};
    int32_t counts[3] = {view.tokens, view.heads, view.block_count};
    extent = view.content_bytes;
    for (int done = 0; done < 3; ++done) {
        int next = -1;
        for (int i = 0; i < 3; ++i)
            if (counts[i] > 1 && (next < 0 || strides[i] < strides[next])) next = i;
        if (next < 0) return true;
        if (strides[next] < extent || !add_product(extent, counts[next] - 1, strides[next])) return false;
        counts[next] = 1;
    }
    return true;
}

static inline int32_t check_view(const wr_view &view, Reason &reason) {
    if (view.layers == nullptr || view.layer_count < 1 || view.block_count < 1 || view.heads < 1 || view.tokens < 1 ||
        view.content_bytes < 1)
        return refuse(reason, WR_INVALID, "a view needs at least one layer, block, head, token and byte of content");
    if (view.dtype < WR_BYTES || view.dtype > WR_F64)
        return refuse(reason, WR_INVALID, "element type %d is unknown", view.dtype);
    if (!part_fits(view, view.k_offset, view.k_bytes) || !part_fits(view, view.v_offset, view.v_bytes) ||
        !parts_apart(view))
        return refuse(reason, WR_INVALID, "K and V must lie apart from each other within the %d bytes of content",
                      view.content_bytes);
    if (!aligned(view))
        return refuse(reason, WR_INVALID, "strides and parts must be multiples of the element's %d bytes",
                      element_bytes(view.dtype));
    int64_t extent;
    if (!nested(view, extent))
        return refuse(reason, WR_INVALID, "the strides let blocks, heads or tokens share bytes, or overflow");
    uint64_t element = (uint64_t)element_bytes(view.dtype);
    for (int32_t layer = 0; layer < view.layer_count; ++layer) {
        uint64_t base = view.layers[layer];
        if (base < view.begin || base > view.end || (uint64_t)extent > view.end - base)
            return refuse(reason, WR_OUT_OF_BOUNDS, "layer %d with its %d blocks lies outside the allocation", layer,
                          view.block_count);
        if (base % element != 0) return refuse(reason, WR_INVALID, "layer %d is not aligned to its elements", layer);
    }
    return WR_OK;
}

static inline int32_t check_range(const wr_view &view, const wr_range &range, Reason &reason) {
    if (range.heads < 1 || range.first_head < 0 || range.first_head > view.heads - range.heads)
        return refuse(reason, WR_OUT_OF_BOUNDS, "heads [%d, %d + %d) of %d", range.first_head, range.first_head,
                      range.heads, view.heads);
    if (range.packed_first_head < 0 || range.packed_first_head > range.packed_heads - range.heads)
        return refuse(reason, WR_OUT_OF_BOUNDS, "packed heads [%d, %d + %d) of %d", range.packed_first_head,
                      range.packed_first_head, range.heads, range.packed_heads);
    if (range.first_token < 0 || range.token_count < 0)
        return refuse(reason, WR_OUT_OF_BOUNDS, "tokens [%d, %d + %d)", range.first_token, range.first_token,
                      range.token_count);
    return WR_OK;
}

// Whether the range takes all tokens of a span.
static inline bool takes_all(const wr_view &view, const wr_range &range, const wr_span &span) {
    return range.first_token == 0 && range.token_count >= (int64_t)span.block_count * view.tokens;
}

static inline int32_t check_blocks(const wr_view &view, const int32_t *blocks, int64_t count, Reason &reason) {
    for (int64_t i = 0; i < count; ++i)
        if (blocks[i] < 0 || blocks[i] >= view.block_count)
            return refuse(reason, WR_OUT_OF_BOUNDS, "block %d of a cache of %d blocks", blocks[i], view.block_count);
    return WR_OK;
}

// Spans whose units take `unit_bytes` each. `pages` is how many (layer, block) they have together; `whole` says that an
// encoding or a checksum needs all tokens.
static inline int32_t check_spans(const wr_view &view, const wr_range &range, const int32_t *blocks,
                                  const wr_span *spans, int32_t count, int64_t unit_bytes, bool whole, int64_t &pages,
                                  Reason &reason) {
    if (count < 0 || (count > 0 && spans == nullptr)) return refuse(reason, WR_INVALID, "spans are missing");
    int64_t total = 0;
    for (int32_t i = 0; i < count; ++i) {
        const wr_span &span = spans[i];
        if (span.block_count < 0 || span.packed_first_block < 0 ||
            span.packed_first_block > span.packed_blocks - span.block_count)
            return refuse(reason, WR_OUT_OF_BOUNDS, "span %d: packed blocks [%d, %d + %d) of %d", i,
                          span.packed_first_block, span.packed_first_block, span.block_count, span.packed_blocks);
        int64_t page = 0, layer = 0, size = 0;
        bool fits = add_product(page, range.packed_heads, unit_bytes) && add_product(layer, span.packed_blocks, page) &&
                    add_product(size, view.layer_count, layer);
        if (!fits || (uint64_t)size > span.packed_bytes || span.packed > UINT64_MAX - span.packed_bytes)
            return refuse(reason, WR_OUT_OF_BOUNDS, "span %d: its packed form does not fit the %llu bytes at 0x%llx", i,
                          (unsigned long long)span.packed_bytes, (unsigned long long)span.packed);
        if (span.packed == 0) return refuse(reason, WR_INVALID, "span %d has no memory", i);
        if (whole && !takes_all(view, range, span))
            return refuse(reason, WR_INVALID, "span %d: encodings and checksums take all tokens", i);
        total += span.block_count;
    }
    if (total > 0 && blocks == nullptr) return refuse(reason, WR_INVALID, "block ids are missing");
    pages = 0;
    if (!add_product(pages, total, view.layer_count)) return refuse(reason, WR_OUT_OF_BOUNDS, "too many pages");
    return check_blocks(view, blocks, total, reason);
}

static inline int32_t check_rotation(const wr_view &view, const wr_rotation &rotation, Reason &reason) {
    if (view.dtype == WR_BYTES) return refuse(reason, WR_UNSUPPORTED, "plain bytes cannot be rotated");
    if (rotation.cosines == nullptr || rotation.sines == nullptr || rotation.count < 1)
        return refuse(reason, WR_INVALID, "a rotation needs cosines and sines");
    int64_t size = 0;
    int32_t element = element_bytes(view.dtype);
    if (rotation.rotary_offset < 0 || rotation.rotary_offset % element != 0 ||
        !add_product(size, rotation.count, 2 * element) || size > view.k_bytes - (int64_t)rotation.rotary_offset)
        return refuse(reason, WR_INVALID, "%d pairs from byte %d do not fit %d bytes of K", rotation.count,
                      rotation.rotary_offset, view.k_bytes);
    return WR_OK;
}

}  // namespace wr

#endif
