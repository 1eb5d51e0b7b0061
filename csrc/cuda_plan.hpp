// From a call's blocks and spans to launches and copies: host code of the CUDA backend without a line of CUDA, so that it
// can be tested on any machine.
#ifndef WARMROUTE_CUDA_PLAN_HPP
#define WARMROUTE_CUDA_PLAN_HPP

#include <algorithm>
#include <vector>

#include "core/address.hpp"
#include "cuda_pages.hpp"

namespace wr {
namespace cuda {

// A call's work, for all layers of the view.
struct Task {
    const wr_view *view;
    const wr_range *range;
    std::vector<Row> rows;
    std::vector<int32_t> span_of; // [rows]
    int64_t unit_bytes;           // of one packed unit
    uint64_t touched;             // all packed addresses and steps, combined by or: their common alignment
    bool partial;

    int64_t page_bytes() const { return unit_bytes * range->heads; }
};

// How a page lies in the cache: `outer` times `inner` runs of `bytes`.
struct Runs {
    int64_t outer_stride, inner_stride;
    uint32_t outer, inner;
    int64_t bytes;
};

// A part of a task that fits a staging slot.
struct Piece {
    size_t first_row, end_row;
    int32_t first_layer, end_layer;
};

// Copies of consecutive bytes; neighbours on both sides are one.
struct Copies {
    std::vector<uint64_t> targets, sources, sizes;

    void clear() {
        targets.clear();
        sources.clear();
        sizes.clear();
    }

    void add(uint64_t target, uint64_t source, uint64_t size) {
        if (!sizes.empty() && targets.back() + sizes.back() == target && sources.back() + sizes.back() == source) {
            sizes.back() += size;
            return;
        }
        targets.push_back(target);
        sources.push_back(source);
        sizes.push_back(size);
    }
};

static inline uint32_t width_of(uint64_t touched, uint32_t widest = 16) {
    uint64_t bits = touched | widest;
    return static_cast<uint32_t>(bits & (~bits + 1));
}

// The rows of a call. `shift` of a span is what its kernel address lies above the address given for it.
static inline void fill_task(Task &task, const wr_view &view, const wr_range &range, const int32_t *blocks,
                            const wr_span *spans, int32_t span_count, int64_t unit_bytes, const uint64_t *shifts) {
    task.view = &view;
    task.range = &range;
    task.rows.clear();
    task.span_of.clear();
    task.unit_bytes = unit_bytes;
    task.touched = 0;
    task.partial = false;
    uint32_t sums = 0;
    for (int32_t s = 0; s < span_count; ++s) {
        const wr_span &span = spans[s];
        for (int32_t at = 0; at < span.block_count; ++at, ++blocks) {
            const TokenRange tokens = tokens_of(view, range, at);
            if (tokens.first >= tokens.last) continue;
            Row row;
            row.packed = packed_address(span, range, 0, at, unit_bytes) + shifts[s];
            row.packed_layer_step = static_cast<uint64_t>(span.packed_blocks * unit_bytes * range.packed_heads);
            row.block = *blocks;
            row.first_token = tokens.first;
            row.token_count = tokens.last - tokens.first;
            row.sums = sums + static_cast<uint32_t>(at);
            row.sums_layer_step = static_cast<uint32_t>(span.block_count);
            task.partial |= row.token_count < view.tokens;
            task.touched |= row.packed | row.packed_layer_step;
            task.rows.push_back(row);
            task.span_of.push_back(s);
        }
        sums += static_cast<uint32_t>(span.block_count) * static_cast<uint32_t>(view.layer_count);
    }
}

// The rows of a rotation in place, which has no packed form.
static inline void fill_task_in_place(Task &task, const wr_view &view, const wr_range &range, const int32_t *blocks,
                                     int32_t count) {
    const wr_span span{0, 0, count, 0, count, 0};
    const uint64_t shift = 0;
    fill_task(task, view, range, blocks, &span, 1, 0, &shift);
    task.touched = 0;
}

// `split` keeps the tokens apart: for rows that lack some, and for content that is not moved as it is.
static inline Runs runs_of(const wr_view &view, const wr_range &range, bool split) {
    Runs runs{view.head_stride, view.token_stride, static_cast<uint32_t>(range.heads),
              static_cast<uint32_t>(view.tokens), view.content_bytes};
    if (split) return runs;
    if (runs.inner == 1 || runs.inner_stride == runs.bytes) {
        runs.bytes *= runs.inner;
        runs.inner_stride = runs.outer_stride;
        runs.inner = runs.outer;
        runs.outer = 1;
    } else if (runs.outer == 1 || runs.outer_stride == runs.inner * runs.inner_stride) {
        runs.inner *= runs.outer;
        runs.outer = 1;
    }
    if (runs.outer == 1 && (runs.inner == 1 || runs.inner_stride == runs.bytes)) {
        runs.bytes *= runs.inner;
        runs.inner = 1;
    }
    return runs;
}

static inline uint64_t first_head_address(const Task &task, int32_t layer) {
    return task.view->layers[layer] + static_cast<uint64_t>(task.range->first_head * task.view->head_stride);
}

// A page as its heads, for kernels whose items are parts of units.
static inline Runs heads_of(const wr_view &view, const wr_range &range) {
    return Runs{view.head_stride, 0, static_cast<uint32_t>(range.heads), 1, 0};
}

// The widest vector for which every run begins and ends on its boundary, in the cache and in the packed form.
static inline uint32_t common_width(const Task &task, const Runs &runs, uint32_t widest = 16) {
    uint64_t touched = task.touched | static_cast<uint64_t>(runs.bytes);
    if (task.view->block_count > 1) touched |= static_cast<uint64_t>(task.view->block_stride);
    if (runs.outer > 1) touched |= static_cast<uint64_t>(runs.outer_stride);
    if (runs.inner > 1) touched |= static_cast<uint64_t>(runs.inner_stride);
    for (int32_t layer = 0; layer < task.view->layer_count; ++layer) touched |= first_head_address(task, layer);
    return width_of(touched, widest);
}

// Call `launch(pages)` for one part of the piece after another. `run_items` is how many items a run has, `weight` how many
// of its own a kernel makes of each. Returns the first status that is not WR_OK.
template <typename Launch>
static inline int32_t each_launch(Pages &pages, const Task &task, const Piece &piece, const Runs &runs, uint32_t run_items,
                                  uint32_t weight, Launch launch) {
    pages.block_stride = task.view->block_stride;
    pages.outer_stride = runs.outer_stride;
    pages.inner_stride = runs.inner_stride;
    pages.inner = divisor(runs.inner);
    pages.run = divisor(run_items);
    const uint64_t page = uint64_t{runs.outer} * runs.inner * run_items;
    if (page > kMostItems) return WR_UNSUPPORTED;
    pages.page = divisor(static_cast<uint32_t>(page));
    pages.partial = task.partial;
    const uint64_t most = kMostItems / (page * weight);
    const uint64_t rows = std::min<uint64_t>(std::min<uint64_t>(kMaxRows, most), piece.end_row - piece.first_row);
    if (rows == 0) return most == 0 ? WR_UNSUPPORTED : WR_OK;
    const int32_t layers = static_cast<int32_t>(std::min<uint64_t>(kMaxLayers, most / rows));
    for (int32_t layer = piece.first_layer; layer < piece.end_layer; layer += layers) {
        const int32_t layer_end = std::min(layer + layers, piece.end_layer);
        pages.layer_count = static_cast<uint32_t>(layer_end - layer);
        for (int32_t i = layer; i < layer_end; ++i) pages.layers[i - layer] = first_head_address(task, i);
        for (size_t row = piece.first_row; row < piece.end_row; row += rows) {
            const size_t row_end = std::min<size_t>(row + rows, piece.end_row);
            const uint32_t row_count = static_cast<uint32_t>(row_end - row);
            pages.rows_of_layer = divisor(row_count);
            for (size_t i = row; i < row_end; ++i) {
                Row &taken = pages.rows[i - row];
                taken = task.rows[i];
                taken.packed += static_cast<uint64_t>(layer - piece.first_layer) * taken.packed_layer_step;
                taken.sums += static_cast<uint32_t>(layer) * taken.sums_layer_step;
            }
            pages.total = pages.page.value * row_count * pages.layer_count;
            const int32_t status = launch(pages);
            if (status != WR_OK) return status;
        }
    }
    return WR_OK;
}

// How a rotation cuts each content into items of one width: 16 bytes where everything is a multiple of that, else single
// elements. `width` is what the addresses allow.
static inline Turn turn_of(const wr_view &view, const wr_rotation &rotation, uint32_t &width) {
    const uint32_t element = static_cast<uint32_t>(element_bytes(view.dtype));
    const uint32_t count = static_cast<uint32_t>(rotation.count);
    const uint32_t at = static_cast<uint32_t>(view.k_offset) + static_cast<uint32_t>(rotation.rotary_offset);
    const uint32_t unit = (rotation.interleaved ? 2 : 1) * count * element;
    width = width == 16 && at % 16 == 0 && unit % 16 == 0 ? 16 : element;
    const uint32_t elements = width / element;
    Turn turn;
    turn.content = static_cast<uint32_t>(view.content_bytes) / width;
    turn.first = at / width;
    turn.covered = 2 * count / elements;
    const bool within = rotation.interleaved && elements > 1;
    turn.items = within ? turn.covered : turn.covered / 2;
    turn.step = rotation.interleaved && !within ? 2 : 1;
    turn.partner = within ? 0 : rotation.interleaved ? 1 : turn.items;
    return turn;
}

static inline Piece whole_task(const Task &task) { return Piece{0, task.rows.size(), 0, task.view->layer_count}; }

// Cut a task into pieces of at most `room` bytes in packed order: several whole spans, else some layers of a span, else
// some rows of a layer. Empty where not even one page fits.
static inline void cut(const Task &task, int64_t room, std::vector<Piece> &pieces) {
    pieces.clear();
    const int64_t page = task.page_bytes(), layers = task.view->layer_count;
    if (page > room) return;
    const size_t count = task.rows.size();
    for (size_t row = 0; row < count;) {
        size_t span_end = row;
        while (span_end < count && task.span_of[span_end] == task.span_of[row]) ++span_end;
        const int64_t wide = static_cast<int64_t>(span_end - row) * page;
        if (wide * layers <= room) {
            Piece *last = pieces.empty() ? nullptr : &pieces.back();
            const bool joins = last != nullptr && last->first_layer == 0 && last->end_layer == layers &&
                               last->end_row == row &&
                               static_cast<int64_t>(span_end - last->first_row) * page * layers <= room;
            if (joins) last->end_row = span_end;
            else pieces.push_back(Piece{row, span_end, 0, static_cast<int32_t>(layers)});
        } else if (wide <= room) {
            const int32_t step = static_cast<int32_t>(room / wide);
            for (int32_t layer = 0; layer < layers; layer += step)
                pieces.push_back(Piece{row, span_end, layer, std::min(layer + step, static_cast<int32_t>(layers))});
        } else {
            const size_t step = static_cast<size_t>(room / page);
            for (int32_t layer = 0; layer < layers; ++layer)
                for (size_t first = row; first < span_end; first += step)
                    pieces.push_back(Piece{first, std::min(first + step, span_end), layer, layer + 1});
        }
        row = span_end;
    }
}

// Give a piece's rows places in staging memory, spans one after the other, each [layer][block], and list the copies
// between there and the packed form. `staged` gets the piece as a task of its own.
static inline void stage(const Task &task, const Piece &piece, uint64_t staging, bool to_packed, Task &staged,
                         Copies &copies) {
    staged.view = task.view;
    staged.range = task.range;
    staged.unit_bytes = task.unit_bytes;
    staged.partial = false;
    staged.rows.assign(task.rows.begin() + static_cast<ptrdiff_t>(piece.first_row),
                       task.rows.begin() + static_cast<ptrdiff_t>(piece.end_row));
    copies.clear();
    const uint64_t page = static_cast<uint64_t>(task.page_bytes());
    staged.touched = staging | page;
    for (size_t row = piece.first_row; row < piece.end_row;) {
        size_t end = row;
        while (end < piece.end_row && task.span_of[end] == task.span_of[row]) ++end;
        const uint64_t wide = (end - row) * page;
        for (size_t i = row; i < end; ++i) {
            Row &placed = staged.rows[i - piece.first_row];
            placed.packed = staging + (i - row) * page;
            placed.packed_layer_step = wide;
        }
        for (int32_t layer = piece.first_layer; layer < piece.end_layer; ++layer, staging += wide)
            for (size_t i = row; i < end; ++i) {
                const uint64_t packed = task.rows[i].packed + static_cast<uint64_t>(layer) * task.rows[i].packed_layer_step;
                const uint64_t here = staging + (i - row) * page;
                if (to_packed) copies.add(packed, here, page);
                else copies.add(here, packed, page);
            }
        row = end;
    }
}

// All of a raw task as copies. `emit(copies, last)` takes what has come together whenever it is much, and in the end.
template <typename Emit>
static inline int32_t each_copy(const Task &task, bool to_packed, Copies &copies, size_t most, Emit emit) {
    const Runs runs = runs_of(*task.view, *task.range, task.partial);
    copies.clear();
    for (int32_t layer = 0; layer < task.view->layer_count; ++layer)
        for (const Row &row : task.rows) {
            const uint64_t cache =
                first_head_address(task, layer) + static_cast<uint64_t>(row.block * task.view->block_stride);
            uint64_t packed = row.packed + static_cast<uint64_t>(layer) * row.packed_layer_step;
            for (uint32_t outer = 0; outer < runs.outer; ++outer)
                for (uint32_t inner = 0; inner < runs.inner; ++inner, packed += static_cast<uint64_t>(runs.bytes)) {
                    const int32_t token = static_cast<int32_t>(inner);
                    if (task.partial && (token < row.first_token || token - row.first_token >= row.token_count)) continue;
                    const uint64_t at =
                        cache + static_cast<uint64_t>(outer * runs.outer_stride + inner * runs.inner_stride);
                    if (to_packed) copies.add(packed, at, static_cast<uint64_t>(runs.bytes));
                    else copies.add(at, packed, static_cast<uint64_t>(runs.bytes));
                }
            if (copies.sizes.size() >= most) {
                const int32_t status = emit(copies);
                if (status != WR_OK) return status;
                copies.clear();
            }
        }
    return copies.sizes.empty() ? WR_OK : emit(copies);
}

// The mean size of the copies that each_copy makes of a task, without making them.
static inline int64_t mean_copy(const Task &task) {
    const Runs runs = runs_of(*task.view, *task.range, task.partial);
    if (task.rows.empty()) return 0;
    const bool whole = runs.outer * runs.inner == 1;
    if (!whole) return runs.bytes;
    size_t copies = 1;
    for (size_t i = 1; i < task.rows.size(); ++i) {
        const bool near = task.rows[i].block == task.rows[i - 1].block + 1 && task.view->block_stride == runs.bytes &&
                          task.rows[i].packed == task.rows[i - 1].packed + static_cast<uint64_t>(runs.bytes);
        copies += !near;
    }
    return static_cast<int64_t>(task.rows.size()) * runs.bytes / static_cast<int64_t>(copies);
}

}  // namespace cuda
}  // namespace wr

#endif
