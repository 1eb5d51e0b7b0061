#include "cpu_moves.hpp"

#include "core/address.hpp"
#include "core/checksum.hpp"
#include "core/codec_layout.hpp"
#include "core/copy.hpp"

namespace wr {

namespace {

constexpr int64_t SUMMED = 32 << 10;  // bytes that are summed up while they are still in the first cache

uint8_t *bytes_at(uint64_t address) { return reinterpret_cast<uint8_t *>(address); }

// A gather or scatter whose arguments are in order. Pages are counted over spans, layers and blocks, in this order. Work is
// counted in items: a page, or one of the `slices` of a page that is one run of bytes.
struct Move {
    const Kernels &kernels;
    const wr_view &view;
    const wr_range &range;
    const MoveCall &call;
    const int64_t *starts;  // first page of each span, and the end
    const Rotation *rotation;
    int64_t unit_bytes;
    bool stream;  // the job is larger than what caches should be filled with
    bool joined;  // the heads in range of a page are one run of bytes on both sides
    int64_t slices;
    std::atomic<int32_t> status;
};

struct Page {
    uint8_t *cache, *packed;
    TokenRange tokens;
};

// Steps through pages without dividing for each.
class Cursor {
  public:
    Cursor(const Move &of, int64_t page) : move_(of) {
        while (page >= of.starts[span_ + 1]) ++span_;
        int64_t within = page - of.starts[span_], blocks = of.call.spans[span_].block_count;
        layer_ = (int32_t)(within / blocks);
        at_ = (int32_t)(within % blocks);
    }

    Page page() const {
        int32_t block = move_.call.blocks[move_.starts[span_] / move_.view.layer_count + at_];
        return Page{bytes_at(unit_address(move_.view, layer_, block, move_.range.first_head)),
                    bytes_at(packed_address(move_.call.spans[span_], move_.range, layer_, at_, move_.unit_bytes)),
                    tokens_of(move_.view, move_.range, at_)};
    }

    // Where another page follows.
    void next() {
        if (++at_ < move_.call.spans[span_].block_count) return;
        at_ = 0;
        if (++layer_ < move_.view.layer_count) return;
        layer_ = 0;
        do ++span_;
        while (move_.starts[span_] == move_.starts[span_ + 1]);
    }

  private:
    const Move &move_;
    int32_t span_ = 0, layer_ = 0, at_ = 0;
};

// Joins copies that continue each other on both sides.
struct Run {
    const Kernels &kernels;
    bool stream;
    uint8_t *to = nullptr;
    const uint8_t *from = nullptr;
    uint64_t size = 0;

    void add(uint8_t *next_to, const uint8_t *next_from, uint64_t next_size) {
        if (next_to != to + size || next_from != from + size) {
            flush();
            to = next_to;
            from = next_from;
        }
        size += next_size;
    }

    void flush() {
        if (size > 0) (stream ? kernels.stream : kernels.copy)(to, from, size);
        size = 0;
    }
};

// Pages that are announced before they are copied.
int64_t pages_ahead(const Move &move) {
    return move.joined ? runs_ahead((uint64_t)(move.range.heads * move.unit_bytes)) : 1;
}

void announce(const Move &move, const Page &page) {
    if (move.stream) return;
    int64_t content = move.view.content_bytes, run = move.view.tokens * content;
    if (move.joined) run *= move.range.heads;
    bool one = move.joined || (move.view.token_stride != content && move.view.tokens > 1);
    int64_t runs = one ? 1 : runs_ahead((uint64_t)run);
    for (int64_t head = 0; head < runs && head < move.range.heads; ++head)
        move.kernels.prefetch(page.cache + head * move.view.head_stride, (uint64_t)run, move.call.load);
}

// The units of a page that are not one run: in the order of what is read, which is what the processor can foresee.
void copy_units(const Move &move, const Page &page) {
    const wr_view &view = move.view;
    int64_t content = view.content_bytes, tokens = page.tokens.last - page.tokens.first;
    uint8_t *cache = page.cache + page.tokens.first * view.token_stride;
    uint8_t *packed = page.packed + page.tokens.first * content;
    bool dense = view.token_stride == content || tokens == 1, load = move.call.load;
    int64_t heads = move.range.heads, unit = move.unit_bytes, size = dense ? tokens * content : content;
    int64_t per_head[2] = {view.head_stride, unit}, per_token[2] = {view.token_stride, content};
    const int64_t to = load ? 0 : 1, from = 1 - to;
    Grid grid{heads,        dense ? 1 : tokens, per_head[to], per_token[to], per_head[from],
              per_token[from], (uint64_t)size,    load,         move.stream};
    if (!dense && per_token[from] > per_head[from])
        grid = Grid{tokens,         heads,          per_token[to], per_head[to], per_token[from],
                    per_head[from], (uint64_t)size, load,          move.stream};
    move.kernels.copy_grid(load ? cache : packed, load ? packed : cache, grid);
}

void copy_page(const Move &move, const Page &page, int64_t slice, Run &run) {
    int64_t content = move.view.content_bytes, tokens = page.tokens.last - page.tokens.first;
    if (tokens <= 0) return;
    if (!move.joined || (tokens != move.view.tokens && move.range.heads > 1)) {
        run.flush();
        copy_units(move, page);
        return;
    }
    int64_t begin = page.tokens.first * content, end = begin + move.range.heads * tokens * content;
    if (move.slices > 1) {
        begin = slice * PIECE;
        end = end - begin > PIECE ? begin + PIECE : end;
    }
    if (move.call.load)
        run.add(page.cache + begin, page.packed + begin, (uint64_t)(end - begin));
    else
        run.add(page.packed + begin, page.cache + begin, (uint64_t)(end - begin));
}

void rotate_page(const Move &move, const Page &page) {
    UnitShape shape = unit_shape(move.view);
    shape.tokens = page.tokens.last - page.tokens.first;
    if (shape.tokens <= 0) return;
    uint8_t *first = page.cache + page.tokens.first * move.view.token_stride;
    for (int32_t head = 0; head < move.range.heads; ++head)
        move.kernels.rotate(shape, first + head * move.view.head_stride, move.view.token_stride, *move.rotation);
}

int32_t code_page(const Move &move, const Page &page) {
    UnitShape shape = unit_shape(move.view);
    int64_t stride = move.view.token_stride;
    for (int32_t head = 0; head < move.range.heads; ++head) {
        uint8_t *cache = page.cache + head * move.view.head_stride, *packed = page.packed + head * move.unit_bytes;
        int status = move.call.load
                         ? move.kernels.decode(shape, move.call.encoding, packed, cache, stride, move.rotation)
                         : move.kernels.encode(shape, move.call.encoding, cache, stride, packed);
        if (status != WR_OK) return status;
    }
    return WR_OK;
}

// Copy and sum up one run in portions, so that memory is read once.
uint64_t copy_summed(const Move &move, uint8_t *to, const uint8_t *from, int64_t size, int64_t offset) {
    uint64_t sum = 0;
    for (int64_t at = 0; at < size; at += SUMMED) {
        uint64_t portion = (uint64_t)(size - at < SUMMED ? size - at : SUMMED);
        sum += move.kernels.checksum_words(from + at, portion, (uint64_t)(offset + at) / 8);
        (move.stream ? move.kernels.stream : move.kernels.copy)(to + at, from + at, portion);
    }
    return sum;
}

void sum_page(const Move &move, const Page &page, int64_t index, int64_t slice) {
    int64_t size = move.range.heads * move.unit_bytes;
    uint64_t *sum = move.call.checksums + index, part = slice == 0 ? checksum_length((uint64_t)size) : 0;
    if (move.call.encoding == WR_RAW && move.joined && move.rotation == nullptr) {
        int64_t begin = move.slices > 1 ? slice * PIECE : 0;
        int64_t length = move.slices > 1 && size - begin > PIECE ? PIECE : size - begin;
        uint8_t *cache = page.cache + begin, *packed = page.packed + begin;
        part += copy_summed(move, move.call.load ? cache : packed, move.call.load ? packed : cache, length, begin);
    } else {
        part += move.kernels.checksum_words(page.packed, (uint64_t)size, 0);
    }
    if (move.slices > 1)
        __atomic_fetch_add(sum, part, __ATOMIC_RELAXED);
    else
        *sum = part;
}

int32_t move_page(const Move &move, const Page &page, int64_t index, int64_t slice, Run &run) {
    bool summed_by_copy = move.call.checksums != nullptr && move.joined && move.rotation == nullptr;
    if (move.call.encoding != WR_RAW) {
        if (int32_t status = code_page(move, page)) return status;
    } else if (!summed_by_copy) {
        copy_page(move, page, slice, run);
        if (move.rotation != nullptr || move.call.checksums != nullptr) run.flush();
        if (move.rotation != nullptr) rotate_page(move, page);
    }
    if (move.call.checksums != nullptr) sum_page(move, page, index, slice);
    return WR_OK;
}

void move_items(void *state, int64_t begin, int64_t end) {
    Move &move = *(Move *)state;
    int64_t page = begin / move.slices, slice = begin % move.slices, last = (end - 1) / move.slices;
    Cursor cursor(move, page), scout(move, page);
    int64_t announced = page, ahead = pages_ahead(move);
    Run run{move.kernels, move.stream};
    for (int64_t item = begin;;) {
        for (; announced < last && announced < page + ahead; ++announced) {
            scout.next();
            announce(move, scout.page());
        }
        if (int32_t status = move_page(move, cursor.page(), page, slice, run)) {
            move.status.store(status, std::memory_order_relaxed);
            return;
        }
        if (++item == end) break;
        if (++slice < move.slices) continue;
        slice = 0;
        ++page;
        cursor.next();
    }
    run.flush();
    move.kernels.stream_end();
}

bool pages_joined(const wr_view &view, const wr_range &range) {
    int64_t unit = (int64_t)view.tokens * view.content_bytes;
    return (view.tokens == 1 || view.token_stride == view.content_bytes) &&
           (range.heads == 1 || view.head_stride == unit);
}

bool takes_everything(const MoveCall &call) {
    for (int32_t i = 0; i < call.span_count; ++i)
        if (!takes_all(*call.view, *call.range, call.spans[i])) return false;
    return true;
}

int64_t slices_of(const MoveCall &call, int64_t page_bytes) {
    bool can = call.encoding == WR_RAW && call.rotation == nullptr && pages_joined(*call.view, *call.range);
    return can && page_bytes > PIECE && takes_everything(call) ? (page_bytes + PIECE - 1) / PIECE : 1;
}

// What is written was not used lately, in a slot as in a block, and will not be used soon. What is rotated afterwards must
// stay in the caches until then.
bool streams(const MoveCall &call, int64_t bytes) { return bytes >= STREAMED && call.rotation == nullptr; }

// Items per piece of work, so that pieces have about PIECE bytes.
int64_t items_per_piece(int64_t item_bytes) { return item_bytes >= PIECE ? 1 : PIECE / item_bytes; }

int64_t page_bytes(const wr_view &view, const wr_range &range) {
    return range.heads * (int64_t)view.tokens * view.content_bytes;
}

// Kept apart, so that no conversion moves out of the plain float environment that its caller sets.
__attribute__((noinline)) void round_factors(const wr_rotation &rotation, float *factors) {
    for (int32_t i = 0; i < rotation.count; ++i) {
        factors[i] = (float)rotation.cosines[i];
        factors[rotation.count + i] = (float)rotation.sines[i];
    }
}

// The wr_rotation in both precisions; the floats live in the context until its next call.
Rotation prepared(wr_context &context, const wr_rotation &rotation) {
    size_t count = (size_t)rotation.count;
    context.factors.resize(2 * count);
    const uint64_t mode = plain_floats();
    round_factors(rotation, context.factors.data());
    restore_floats(mode);
    const float *factors = context.factors.data();
    return Rotation{factors,        factors + count,        rotation.cosines,    rotation.sines,
                    rotation.count, rotation.rotary_offset, rotation.interleaved};
}

int32_t check_call(const MoveCall &call, int64_t &unit, int64_t &pages, Reason &reason) {
    if (call.view == nullptr || call.range == nullptr) return refuse(reason, WR_INVALID, "view or range is missing");
    if (int32_t status = check_view(*call.view, reason)) return status;
    if (int32_t status = check_range(*call.view, *call.range, reason)) return status;
    if (call.rotation != nullptr)
        if (int32_t status = check_rotation(*call.view, *call.rotation, reason)) return status;
    unit = unit_bytes(*call.view, call.encoding);
    if (unit < 0) return refuse(reason, (int32_t)unit, "encoding %d cannot hold this cache's elements", call.encoding);
    bool whole = call.encoding != WR_RAW || call.checksums != nullptr;
    return check_spans(*call.view, *call.range, call.blocks, call.spans, call.span_count, unit, whole, pages, reason);
}

const char *explanation(int32_t status) {
    return status == WR_INCOMPRESSIBLE ? "a unit has too many escapes for this encoding"
                                       : "the packed form is not what an encoder writes";
}

}  // namespace

int32_t move_blocks(wr_context &context, const MoveCall &call) {
    int64_t unit = 0, pages = 0;
    if (int32_t status = check_call(call, unit, pages, context.reason)) return status;
    if (pages == 0) return WR_OK;
    const wr_view &view = *call.view;
    context.starts.assign(1, 0);
    for (int32_t i = 0; i < call.span_count; ++i)
        context.starts.push_back(context.starts.back() + (int64_t)call.spans[i].block_count * view.layer_count);
    Rotation factors{};
    if (call.rotation != nullptr) factors = prepared(context, *call.rotation);
    int64_t size = page_bytes(view, *call.range), slices = slices_of(call, size);
    if (slices > 1 && call.checksums != nullptr) memset(call.checksums, 0, (size_t)pages * sizeof *call.checksums);
    Move move{*context.kernels, view,   *call.range, call, context.starts.data(), call.rotation != nullptr ? &factors : nullptr,
              unit,             streams(call, pages * size), pages_joined(view, *call.range), slices, {WR_OK}};
    context.helpers.run(Job{move_items, &move, pages * slices, slices > 1 ? 1 : items_per_piece(size)});
    int32_t status = move.status.load();
    return status == WR_OK ? WR_OK : refuse(context.reason, status, "%s", explanation(status));
}

namespace {

struct Turning {
    const Kernels &kernels;
    const wr_view &view;
    const wr_range &range;
    const int32_t *blocks;
    int32_t block_count;
    const Rotation &rotation;
};

void rotate_pages(void *state, int64_t begin, int64_t end) {
    Turning &turning = *(Turning *)state;
    const wr_view &view = turning.view;
    UnitShape shape = unit_shape(view);
    for (int64_t page = begin; page < end; ++page) {
        int32_t layer = (int32_t)(page / turning.block_count), at = (int32_t)(page % turning.block_count);
        TokenRange tokens = tokens_of(view, turning.range, at);
        shape.tokens = tokens.last - tokens.first;
        for (int32_t head = 0; shape.tokens > 0 && head < turning.range.heads; ++head) {
            uint64_t unit = unit_address(view, layer, turning.blocks[at], turning.range.first_head + head);
            turning.kernels.rotate(shape, bytes_at(unit) + tokens.first * view.token_stride, view.token_stride,
                                   turning.rotation);
        }
    }
}

constexpr int64_t BATCH_AHEAD = 2;

// Copies, seen as one run of bytes: copy i is bytes [starts[i], starts[i + 1]).
struct Batch {
    const Kernels &kernels;
    const uint64_t *targets, *sources;
    const int64_t *starts;
    int64_t count;
};

// The last copy that starts at or before a byte.
int64_t copy_at(const Batch &batch, int64_t byte) {
    int64_t low = 0, high = batch.count;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (batch.starts[middle] <= byte)
            low = middle;
        else
            high = middle;
    }
    return low;
}

void copy_some(void *state, int64_t begin, int64_t end) {
    Batch &batch = *(Batch *)state;
    Run run{batch.kernels, false};
    for (int64_t i = copy_at(batch, begin); begin < end; ++i) {
        if (i + BATCH_AHEAD < batch.count) {
            uint64_t ahead = (uint64_t)(batch.starts[i + BATCH_AHEAD + 1] - batch.starts[i + BATCH_AHEAD]);
            batch.kernels.prefetch(bytes_at(batch.sources[i + BATCH_AHEAD]), ahead, false);
            batch.kernels.prefetch(bytes_at(batch.targets[i + BATCH_AHEAD]), ahead, true);
        }
        int64_t within = begin - batch.starts[i], stop = batch.starts[i + 1] < end ? batch.starts[i + 1] : end;
        run.add(bytes_at(batch.targets[i]) + within, bytes_at(batch.sources[i]) + within, (uint64_t)(stop - begin));
        begin = stop;
    }
    run.flush();
    batch.kernels.stream_end();
}

}  // namespace

int32_t rotate_blocks(wr_context &context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                      int32_t block_count, const wr_rotation *rotation) {
    Reason &reason = context.reason;
    if (view == nullptr || range == nullptr || rotation == nullptr || block_count < 0 ||
        (block_count > 0 && blocks == nullptr))
        return refuse(reason, WR_INVALID, "view, range, blocks or rotation is missing");
    if (int32_t status = check_view(*view, reason)) return status;
    if (int32_t status = check_range(*view, *range, reason)) return status;
    if (int32_t status = check_rotation(*view, *rotation, reason)) return status;
    if (int32_t status = check_blocks(*view, blocks, block_count, reason)) return status;
    Rotation factors = prepared(context, *rotation);
    Turning turning{*context.kernels, *view, *range, blocks, block_count, factors};
    int64_t pages = (int64_t)block_count * view->layer_count;
    context.helpers.run(Job{rotate_pages, &turning, pages, items_per_piece(page_bytes(*view, *range))});
    return WR_OK;
}

int32_t copy_batch(wr_context &context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                   int64_t count) {
    Reason &reason = context.reason;
    if (count < 0 || (count > 0 && (targets == nullptr || sources == nullptr || sizes == nullptr)))
        return refuse(reason, WR_INVALID, "targets, sources or sizes are missing");
    context.starts.assign(1, 0);
    for (int64_t i = 0; i < count; ++i) {
        int64_t end = context.starts.back();
        bool ends = sizes[i] <= INT64_MAX && add_product(end, 1, (int64_t)sizes[i]) &&
                    targets[i] <= UINT64_MAX - sizes[i] && sources[i] <= UINT64_MAX - sizes[i];
        if (!ends || (sizes[i] > 0 && (targets[i] == 0 || sources[i] == 0)))
            return refuse(reason, WR_INVALID, "copy %lld has no memory, or leaves the address space", (long long)i);
        context.starts.push_back(end);
    }
    Batch batch{*context.kernels, targets, sources, context.starts.data(), count};
    context.helpers.run(Job{copy_some, &batch, context.starts.back(), PIECE});
    return WR_OK;
}

}  // namespace wr
