// Which way bytes take, and the order of the work on each: docs/gpu.md.
#include "cuda_context.hpp"

namespace wr {
namespace cuda {

namespace {

int32_t copy_singly(wr_context &context, const Copies &copies, cudaStream_t stream) {
    for (size_t i = 0; i < copies.sizes.size(); ++i)
        WR_CHECKED(context,
                   cudaMemcpyAsync(reinterpret_cast<void *>(copies.targets[i]),
                                   reinterpret_cast<const void *>(copies.sources[i]), copies.sizes[i], cudaMemcpyDefault,
                                   stream),
                   "enqueuing a copy");
    return WR_OK;
}

// Copies of the driver's batch call. The source of a load that nothing in the stream writes may be read early; anything
// else is read in stream order, because a block may be written until the very moment of its save.
int32_t copy_batch(wr_context &context, Copies &copies, bool early, cudaStream_t stream) {
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = early ? CU_MEMCPY_SRC_ACCESS_ORDER_ANY : CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    size_t first = 0, failed = 0;
    static_assert(sizeof(CUdeviceptr) == sizeof(uint64_t) && sizeof(size_t) == sizeof(uint64_t), "64-bit addresses");
    const CUresult result = driver().copy_batch(
        reinterpret_cast<CUdeviceptr *>(copies.targets.data()), reinterpret_cast<CUdeviceptr *>(copies.sources.data()),
        reinterpret_cast<size_t *>(copies.sizes.data()), copies.sizes.size(), &attributes, &first, 1, &failed, stream);
    if (result == CUDA_SUCCESS) return WR_OK;
    if (result == CUDA_ERROR_NOT_SUPPORTED) { // as on some virtual GPUs
        context.batches = false;
        return copy_singly(context, copies, stream);
    }
    return refuse(context.reason, WR_DEVICE, "the driver refused a batch of %zu copies (error %d, copy %zd)",
                  copies.sizes.size(), static_cast<int>(result), static_cast<ssize_t>(failed));
}

// No copy may straddle two registrations.
void split_at_registrations(Copies &copies) {
    for (size_t i = 0; i < copies.sizes.size(); ++i) {
        const uint64_t target = copies.targets[i], source = copies.sources[i], size = copies.sizes[i];
        const uint64_t room = std::min(registered_until(target) - target, registered_until(source) - source);
        if (room >= size) continue;
        copies.sizes[i] = room;
        copies.targets.push_back(target + room);
        copies.sources.push_back(source + room);
        copies.sizes.push_back(size - room);
    }
}

}  // namespace

int32_t enqueue(wr_context &context, Copies &copies, bool early, cudaStream_t stream) {
    if (copies.sizes.empty()) return WR_OK;
    split_at_registrations(copies);
    const bool batch = context.batches && driver().copy_batch != nullptr && copies.sizes.size() > 1;
    if (batch) return copy_batch(context, copies, early, stream);
    return copy_singly(context, copies, stream);
}

namespace {

// A launch's checksums: zeroed, added up by a kernel, handed over.
int32_t clear_sums(wr_context &context, const Pages &pages, cudaStream_t stream) {
    const size_t count = size_t{pages.layer_count} * pages.rows_of_layer.value;
    return checked(context, cudaMemsetAsync(context.sums, 0, count * sizeof(uint64_t), stream), "clearing checksums");
}

int32_t publish(wr_context &context, const Pages &pages, int64_t page_bytes, const Moving &moving) {
    const Launch on = on_stream(context, moving.stream);
    return checked(context,
                   launch_publish(pages, static_cast<uint64_t>(page_bytes), context.sums, moving.sums_at, on),
                   "storing checksums");
}

// The kernel of a plain copy, one launch after another. Sums come along where vectors are whole words.
int32_t copy_pages(wr_context &context, const Moving &moving, const Task &task, const Piece &piece) {
    const Runs runs = runs_of(moving.view, moving.range, task.partial);
    const uint32_t width = common_width(task, runs);
    const Launch on = on_stream(context, moving.stream);
    const bool sums = moving.sums_at != 0, along = sums && width >= 8;
    const uint64_t page = static_cast<uint64_t>(task.page_bytes());
    const uint64_t run = static_cast<uint64_t>(runs.bytes) / width;
    if (run > kMostItems) return refuse(context.reason, WR_UNSUPPORTED, "pages of more than 2 GiB");
    return each_launch(context.pages, task, piece, runs, static_cast<uint32_t>(run), 1, [&](const Pages &pages) -> int32_t {
        if (sums) WR_PASSED(clear_sums(context, pages, moving.stream));
        WR_CHECKED(context, launch_copy(pages, width, !moving.load, along ? context.sums : nullptr, on), "copying pages");
        if (sums && !along) WR_CHECKED(context, launch_sum(pages, page, context.sums, on), "summing pages");
        return sums ? publish(context, pages, task.page_bytes(), moving) : WR_OK;
    });
}

// The kernel that rotates on the way from the packed form, or in place.
int32_t turn_pages(wr_context &context, const Moving &moving, const Task &task, const Piece &piece, bool in_place) {
    const Runs runs = runs_of(moving.view, moving.range, true);
    uint32_t width = common_width(task, runs);
    if (width < static_cast<uint32_t>(element_bytes(moving.view.dtype)))
        return refuse(context.reason, WR_UNSUPPORTED, "a packed form that is not aligned to its elements cannot be rotated");
    const Turn turn = turn_of(moving.view, *moving.rotation, width);
    const Launch on = on_stream(context, moving.stream);
    const bool sums = moving.sums_at != 0 && !in_place, along = sums && width >= 8;
    const uint64_t page = static_cast<uint64_t>(task.page_bytes());
    const uint32_t items = in_place ? turn.items : turn.content - turn.covered + turn.items;
    return each_launch(context.pages, task, piece, runs, items, 1, [&](const Pages &pages) -> int32_t {
        if (sums) WR_PASSED(clear_sums(context, pages, moving.stream));
        if (sums && !along) WR_CHECKED(context, launch_sum(pages, page, context.sums, on), "summing pages");
        WR_CHECKED(context,
                   launch_turn(pages, turn, context.factors, moving.view.dtype, width, in_place,
                               along ? context.sums : nullptr, on),
                   "rotating pages");
        return sums ? publish(context, pages, task.page_bytes(), moving) : WR_OK;
    });
}

bool halves_wide(const UnitShape &shape) {
    const bool keys = shape.k_offset % 16 == 0 && k_half(shape).width % 8 == 0;
    const bool values = shape.v_bytes == 0 || (shape.v_offset % 16 == 0 && v_half(shape).width % 8 == 0);
    return (shape.k_bytes == 0 || keys) && values;
}

// The kernels of an encoding, between the cache and staging.
int32_t code_pages(wr_context &context, const Moving &moving, const Task &task, const Piece &piece) {
    Codes codes{};
    codes.shape = unit_shape(moving.view);
    codes.encoding = moving.encoding;
    codes.unit_bytes = task.unit_bytes;
    codes.token_stride = moving.view.token_stride;
    if (moving.encoding != WR_EXP12) codes.planes = scaled_planes(codes.shape, moving.encoding);
    codes.outcome = &context.shared_device->outcome;
    const bool wide = common_width(task, runs_of(moving.view, moving.range, true)) == 16 && halves_wide(codes.shape);
    const Launch on = on_stream(context, moving.stream);
    const uint64_t page = static_cast<uint64_t>(task.page_bytes());
    const Runs heads = heads_of(moving.view, moving.range);
    return each_launch(context.pages, task, piece, heads, 1, items_of_unit(codes), [&](const Pages &pages) -> int32_t {
        WR_CHECKED(context, launch_codes(pages, codes, wide, !moving.load, on), "encoding or decoding pages");
        if (moving.sums_at == 0) return WR_OK;
        WR_PASSED(clear_sums(context, pages, moving.stream));
        WR_CHECKED(context, launch_sum(pages, page, context.sums, on), "summing pages");
        return publish(context, pages, task.page_bytes(), moving);
    });
}

int32_t move_directly(wr_context &context, const Moving &moving) {
    const Piece all = whole_task(context.task);
    if (moving.rotation != nullptr) return turn_pages(context, moving, context.task, all, false);
    return copy_pages(context, moving, context.task, all);
}

int32_t move_by_engine(wr_context &context, const Moving &moving) {
    return each_copy(context.task, !moving.load, context.copies, kMostCopies,
                     [&](Copies &copies) { return enqueue(context, copies, false, moving.stream); });
}

// One piece between the cache and a slot.
int32_t work_on(wr_context &context, const Moving &moving, const Piece &piece) {
    const Piece local{0, context.staged.rows.size(), piece.first_layer, piece.end_layer};
    if (moving.encoding == WR_RAW) {
        if (moving.rotation != nullptr) return turn_pages(context, moving, context.staged, local, false);
        return copy_pages(context, moving, context.staged, local);
    }
    WR_PASSED(code_pages(context, moving, context.staged, local));
    return moving.rotation != nullptr ? turn_pages(context, moving, context.staged, local, true) : WR_OK;
}

int32_t fill_and_send(wr_context &context, const Moving &moving, const Piece &piece, Slot &slot) {
    WR_CHECKED(context, cudaStreamWaitEvent(moving.stream, slot.drained, 0), "waiting for staging");
    stage(context.task, piece, reinterpret_cast<uint64_t>(slot.memory), true, context.staged, context.copies);
    WR_PASSED(work_on(context, moving, piece));
    WR_CHECKED(context, cudaEventRecord(slot.filled, moving.stream), "recording an event");
    WR_CHECKED(context, cudaStreamWaitEvent(context.side, slot.filled, 0), "waiting for staging");
    WR_PASSED(enqueue(context, context.copies, false, context.side));
    return checked(context, cudaEventRecord(slot.drained, context.side), "recording an event");
}

int32_t fetch_and_empty(wr_context &context, const Moving &moving, const Piece &piece, Slot &slot) {
    WR_CHECKED(context, cudaStreamWaitEvent(context.side, slot.drained, 0), "waiting for staging");
    stage(context.task, piece, reinterpret_cast<uint64_t>(slot.memory), false, context.staged, context.copies);
    WR_PASSED(enqueue(context, context.copies, false, context.side));
    WR_CHECKED(context, cudaEventRecord(slot.filled, context.side), "recording an event");
    WR_CHECKED(context, cudaStreamWaitEvent(moving.stream, slot.filled, 0), "waiting for staging");
    WR_PASSED(work_on(context, moving, piece));
    return checked(context, cudaEventRecord(slot.drained, moving.stream), "recording an event");
}

// Two slots take turns: while the copy engine moves one, a kernel works on the other. What the side stream does lies
// between what the caller's stream did before and does afterwards.
int32_t move_staged(wr_context &context, const Moving &moving) {
    cut(context.task, kSlotBytes, context.pieces);
    if (context.pieces.empty() && !context.task.rows.empty())
        return refuse(context.reason, WR_UNSUPPORTED, "a page of %lld bytes is more than staging holds",
                      static_cast<long long>(context.task.page_bytes()));
    WR_CHECKED(context, cudaEventRecord(context.begun, moving.stream), "recording an event");
    WR_CHECKED(context, cudaStreamWaitEvent(context.side, context.begun, 0), "waiting for the stream");
    int32_t status = WR_OK;
    for (size_t i = 0; i < context.pieces.size() && status == WR_OK; ++i) {
        Slot &slot = context.slots[i % kSlots];
        status = moving.load ? fetch_and_empty(context, moving, context.pieces[i], slot)
                             : fill_and_send(context, moving, context.pieces[i], slot);
    }
    // Also after a failure: the stream must not run ahead of copies that were enqueued.
    WR_CHECKED(context, cudaEventRecord(context.begun, context.side), "recording an event");
    WR_CHECKED(context, cudaStreamWaitEvent(moving.stream, context.begun, 0), "waiting for copies");
    return status;
}

}  // namespace

void set_factors(wr_context &context, const wr_rotation &rotation) {
    context.factors.count = rotation.count;
    for (int32_t i = 0; i < rotation.count; ++i) {
        context.factors.cosines[i] = rotation.cosines[i];
        context.factors.sines[i] = rotation.sines[i];
    }
}

namespace {

// Kernels that rotate read whole elements, but a packed form may begin anywhere; staging memory does not.
bool elements_astray(const Moving &moving, const Task &task) {
    return moving.rotation != nullptr && task.touched % static_cast<uint64_t>(element_bytes(moving.view.dtype)) != 0;
}

}  // namespace

Route route_of(const wr_context &context, const Moving &moving) {
    const Task &task = context.task;
    if (moving.encoding != WR_RAW) return Route::staged;
    const bool plain = moving.rotation == nullptr && moving.sums_at == 0;
    const uint64_t cutoff = moving.load ? context.load_cutoff : context.save_cutoff;
    const bool large = static_cast<uint64_t>(mean_copy(task)) >= cutoff;
    if (plain && (context.path == WR_COPY_ENGINE || (context.path == WR_AUTO && large))) return Route::engine;
    const bool fits = !task.partial && task.page_bytes() <= kSlotBytes && !moving.packed_on_device;
    const bool faster = moving.load ? context.staged_loads : context.staged_saves;
    const bool wanted =
        context.path == WR_STAGED || (context.path != WR_KERNEL && faster) || elements_astray(moving, task);
    return wanted && fits ? Route::staged : Route::direct;
}

int32_t move(wr_context &context, const Moving &moving, Route route) {
    if (moving.rotation != nullptr) set_factors(context, *moving.rotation);
    switch (route) {
        case Route::engine: return move_by_engine(context, moving);
        case Route::staged: return move_staged(context, moving);
        default: return move_directly(context, moving);
    }
}

int32_t rotate_task(wr_context &context, const Task &task, const Piece &piece, const wr_rotation &rotation,
                    cudaStream_t stream) {
    set_factors(context, rotation);
    const Moving moving{*task.view, *task.range, WR_RAW, &rotation, 0, true, true, stream};
    return turn_pages(context, moving, task, piece, true);
}

}  // namespace cuda
}  // namespace wr
