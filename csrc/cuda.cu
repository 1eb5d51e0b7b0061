// libwarmroute_cuda.so: the C ABI over one GPU and page-locked host memory.
#include "cuda_context.hpp"

#include "core/crc32c.hpp"

using namespace wr;
using namespace wr::cuda;

namespace {

thread_local Reason open_reason;
thread_local const wr_context *busy_context; // which another thread had when this one last called

// Holds a context, with its device current, for one call.
class Call {
  public:
    explicit Call(wr_context &context) : context_(context), mine_(!context.busy.test_and_set(std::memory_order_acquire)) {}
    ~Call() {
        if (mine_) context_.busy.clear(std::memory_order_release);
    }
    Call(const Call &) = delete;
    Call &operator=(const Call &) = delete;

    bool mine() const { return mine_; }

  private:
    wr_context &context_;
    bool mine_;
};

template <class Work> int32_t guarded(wr_context *context, Work work) {
    if (context == nullptr) return WR_INVALID;
    if (context->process != getpid())
        return refuse(context->reason, WR_DEVICE, "CUDA does not work in a child of fork(): use spawn");
    const Call call(*context);
    if (!call.mine()) {
        busy_context = context;
        return WR_INVALID;
    }
    busy_context = nullptr;
    const Current current(context->primary);
    try {
        return work(*context);
    } catch (const std::exception &error) {
        return refuse(context->reason, WR_NO_MEMORY, "out of memory: %s", error.what());
    }
}

int32_t check_cache(wr_context &context, const wr_view &view) {
    if (view.begin == context.checked_begin && view.end == context.checked_end) return WR_OK;
    uint64_t seen = 0;
    bool on_device = false;
    WR_PASSED(resolve(context, view.begin, view.end - view.begin, "the KV cache", seen, on_device));
    if (seen != view.begin)
        return refuse(context.reason, WR_UNSUPPORTED, "the GPU sees the KV cache at another address");
    context.checked_begin = view.begin;
    context.checked_end = view.end;
    return WR_OK;
}

int32_t check_pairs(wr_context &context, const wr_view &view, const wr_rotation &rotation) {
    WR_PASSED(check_rotation(view, rotation, context.reason));
    if (rotation.count <= kMaxPairs) return WR_OK;
    return refuse(context.reason, WR_UNSUPPORTED, "%d pairs; a GPU rotates up to %d", rotation.count, kMaxPairs);
}

struct Request {
    const wr_view *view;
    const wr_range *range;
    const int32_t *blocks;
    const wr_span *spans;
    int32_t span_count, encoding;
    const wr_rotation *rotation;
    uint64_t *checksums;
    void *stream;
    bool load;
};

// Everything that can be wrong with a request is found before anything is enqueued.
int32_t check_request(wr_context &context, const Request &request, int64_t &unit, int64_t &pages) {
    Reason &reason = context.reason;
    if (request.view == nullptr || request.range == nullptr)
        return refuse(reason, WR_INVALID, "view or range is missing");
    const wr_view &view = *request.view;
    WR_PASSED(check_view(view, reason));
    WR_PASSED(check_range(view, *request.range, reason));
    if (request.rotation != nullptr) WR_PASSED(check_pairs(context, view, *request.rotation));
    unit = unit_bytes(view, request.encoding);
    if (unit < 0)
        return refuse(reason, static_cast<int32_t>(unit), "encoding %d cannot hold this cache's elements",
                      request.encoding);
    const bool whole = request.encoding != WR_RAW || request.checksums != nullptr;
    WR_PASSED(check_spans(view, *request.range, request.blocks, request.spans, request.span_count, unit, whole, pages,
                          reason));
    if (pages > INT32_MAX) return refuse(reason, WR_UNSUPPORTED, "%lld pages in one call", static_cast<long long>(pages));
    return check_stream(context, request.stream);
}

// Where the device finds packed forms and checksums.
int32_t find_memory(wr_context &context, const Request &request, int64_t pages, uint64_t &sums_at, bool &all_on_device) {
    WR_PASSED(check_cache(context, *request.view));
    context.shifts.assign(static_cast<size_t>(request.span_count), 0);
    all_on_device = true;
    for (int32_t i = 0; i < request.span_count; ++i) {
        const wr_span &span = request.spans[i];
        uint64_t seen = 0;
        bool on_device = false;
        WR_PASSED(resolve(context, span.packed, span.packed_bytes, "a packed form", seen, on_device));
        context.shifts[static_cast<size_t>(i)] = seen - span.packed;
        all_on_device = all_on_device && on_device;
    }
    sums_at = 0;
    if (request.checksums == nullptr) return WR_OK;
    const uint64_t at = reinterpret_cast<uint64_t>(request.checksums);
    bool on_device = false;
    if (at % 8 != 0) return refuse(context.reason, WR_INVALID, "checksums need a multiple of 8 as their address");
    return resolve(context, at, 8 * static_cast<uint64_t>(pages), "the memory for checksums", sums_at, on_device);
}

int32_t transfer(wr_context &context, const Request &request) {
    int64_t unit = 0, pages = 0;
    WR_PASSED(check_request(context, request, unit, pages));
    if (pages == 0) return WR_OK;
    uint64_t sums_at = 0;
    bool on_device = false;
    WR_PASSED(find_memory(context, request, pages, sums_at, on_device));
    fill_task(context.task, *request.view, *request.range, request.blocks, request.spans, request.span_count, unit,
              context.shifts.data());
    const cudaStream_t stream = static_cast<cudaStream_t>(request.stream);
    const Moving moving{*request.view, *request.range, request.encoding, request.rotation,
                        sums_at,       request.load,   on_device,        stream};
    WR_PASSED(take_over(context, stream));
    const int32_t status = move(context, moving, route_of(context, moving));
    const int32_t handed = hand_over(context, stream);
    return status != WR_OK ? status : handed;
}

int32_t rotate(wr_context &context, const wr_view *view, const wr_range *range, const int32_t *blocks,
               int32_t block_count, const wr_rotation *rotation, void *stream) {
    Reason &reason = context.reason;
    if (view == nullptr || range == nullptr || rotation == nullptr || block_count < 0 ||
        (block_count > 0 && blocks == nullptr))
        return refuse(reason, WR_INVALID, "view, range, blocks or rotation is missing");
    WR_PASSED(check_view(*view, reason));
    WR_PASSED(check_range(*view, *range, reason));
    WR_PASSED(check_pairs(context, *view, *rotation));
    WR_PASSED(check_blocks(*view, blocks, block_count, reason));
    WR_PASSED(check_stream(context, stream));
    if (block_count == 0) return WR_OK;
    WR_PASSED(check_cache(context, *view));
    fill_task_in_place(context.task, *view, *range, blocks, block_count);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    WR_PASSED(take_over(context, on));
    const int32_t status = rotate_task(context, context.task, whole_task(context.task), *rotation, on);
    const int32_t handed = hand_over(context, on);
    return status != WR_OK ? status : handed;
}

int32_t copy_many(wr_context &context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                  int64_t count, bool loads, void *stream) {
    Reason &reason = context.reason;
    if (count < 0 || (count > 0 && (targets == nullptr || sources == nullptr || sizes == nullptr)))
        return refuse(reason, WR_INVALID, "targets, sources or sizes are missing");
    for (int64_t i = 0; i < count; ++i) {
        const bool ends = sizes[i] <= INT64_MAX && targets[i] <= UINT64_MAX - sizes[i] && sources[i] <= UINT64_MAX - sizes[i];
        if (!ends || (sizes[i] > 0 && (targets[i] == 0 || sources[i] == 0)))
            return refuse(reason, WR_INVALID, "copy %lld has no memory, or leaves the address space",
                          static_cast<long long>(i));
    }
    WR_PASSED(check_stream(context, stream));
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    WR_PASSED(take_over(context, on));
    int32_t status = WR_OK;
    for (int64_t i = 0; i < count && status == WR_OK;) {
        context.copies.clear();
        for (; i < count && context.copies.sizes.size() < kMostCopies; ++i)
            if (sizes[i] > 0) context.copies.add(targets[i], sources[i], sizes[i]);
        status = enqueue(context, context.copies, loads, on);
    }
    const int32_t handed = hand_over(context, on);
    return status != WR_OK ? status : handed;
}

int32_t finish(wr_context &context, void *stream) {
    WR_PASSED(check_stream(context, stream));
    WR_PASSED(wait_for_stream(context, static_cast<cudaStream_t>(stream), kWaitSeconds));
    // Also what went to other streams: nothing may tell its outcome between reading and clearing.
    WR_PASSED(wait_for(context, context.done, kWaitSeconds));
    volatile Outcome &outcome = context.shared->outcome;
    const bool incompressible = outcome.incompressible != 0, corrupt = outcome.corrupt != 0;
    outcome.incompressible = 0;
    outcome.corrupt = 0;
    if (corrupt) return refuse(context.reason, WR_CORRUPT, "the packed form is not what an encoder writes");
    if (incompressible)
        return refuse(context.reason, WR_INCOMPRESSIBLE, "a unit has too many escapes for this encoding");
    return WR_OK;
}

// One run of bytes is a launch of one page, as far as its sum is concerned.
int32_t sum_into(wr_context &context, uint64_t address, uint64_t size, uint64_t target, cudaStream_t stream) {
    Pages &pages = context.pages;
    pages.layer_count = 1;
    pages.rows_of_layer = divisor(1);
    pages.rows[0] = Row{address, 0, 0, 0, 0, 0, 0};
    const Launch on = on_stream(context, stream);
    WR_PASSED(take_over(context, stream));
    WR_CHECKED(context, cudaMemsetAsync(context.sums, 0, sizeof(uint64_t), stream), "clearing a checksum");
    WR_CHECKED(context, launch_sum_bytes(address, size, context.sums, on), "summing bytes");
    WR_CHECKED(context, launch_publish(pages, size, context.sums, target, on), "storing a checksum");
    return hand_over(context, stream);
}

int32_t checksum_of(wr_context &context, const void *bytes, size_t size, uint64_t *sum, void *stream) {
    const uint64_t address = reinterpret_cast<uint64_t>(bytes), at = reinterpret_cast<uint64_t>(sum);
    if (sum == nullptr || at % 8 != 0 || (bytes == nullptr && size > 0) || size > INT64_MAX || address > UINT64_MAX - size)
        return refuse(context.reason, WR_INVALID, "bytes or sum are missing, or sum is not aligned");
    WR_PASSED(check_stream(context, stream));
    uint64_t seen = 0, target = 0;
    bool on_device = false;
    if (size > 0) WR_PASSED(resolve(context, address, size, "the bytes", seen, on_device));
    WR_PASSED(resolve(context, at, sizeof *sum, "the memory for the checksum", target, on_device));
    return sum_into(context, seen, size, target, static_cast<cudaStream_t>(stream));
}

}  // namespace

int32_t wr_abi(void) { return WR_ABI_VERSION; }

const char *wr_build(void) { return WR_BUILD; }

int32_t wr_devices(void) { return driver().devices; }

int32_t wr_open(const wr_options *options, wr_context **context) {
    if (context == nullptr) return refuse(open_reason, WR_INVALID, "there is nowhere to put the context");
    *context = nullptr;
    const wr_options chosen = options != nullptr ? *options : wr_options{};
    const int usable = usable_cores(), threads = usable < 8 ? usable : 8;
    wr_context *made = new (std::nothrow) wr_context(threads);
    if (made == nullptr) return refuse(open_reason, WR_NO_MEMORY, "out of memory");
    const int32_t status = open(chosen, *made);
    if (status == WR_OK) {
        *context = made;
        return WR_OK;
    }
    open_reason = made->reason;
    wr_close(made);
    return status;
}

void wr_close(wr_context *context) {
    if (context == nullptr) return;
    close(*context);
    delete context;
}

const char *wr_explain(const wr_context *context) {
    if (context != nullptr && context == busy_context) return "another thread uses this context";
    return context != nullptr ? context->reason.text : open_reason.text;
}

int32_t wr_describe(const wr_context *context, char *text, size_t size) {
    if (context == nullptr || text == nullptr || size == 0) return WR_INVALID;
    const wr_context &c = *context;
    const char *batched = driver().copy_batch == nullptr ? "copies one by one (driver before CUDA 12.8)"
                          : c.batches                    ? "batched copies"
                                                         : "copies one by one (batches refused)";
    snprintf(text, size,
             "%s (sm_%d%d, %d multiprocessors), driver for CUDA %d.%d, %d thread blocks, %s, copy engines from %llu KiB for "
             "loads and %llu KiB for saves (%s)",
             c.name, c.major, c.minor, c.processors, driver().version / 1000, driver().version % 1000 / 10, c.blocks, batched,
             static_cast<unsigned long long>(c.load_cutoff >> 10), static_cast<unsigned long long>(c.save_cutoff >> 10),
             c.calibrated ? "measured" : "not measured");
    return WR_OK;
}

int64_t wr_unit_bytes(const wr_view *view, int32_t encoding) {
    return view == nullptr ? static_cast<int64_t>(WR_INVALID) : unit_bytes(*view, encoding);
}

int32_t wr_gather(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                  const wr_span *spans, int32_t span_count, int32_t encoding, uint64_t *checksums, void *stream) {
    const Request request{view, range, blocks, spans, span_count, encoding, nullptr, checksums, stream, false};
    return guarded(context, [&](wr_context &held) { return transfer(held, request); });
}

int32_t wr_scatter(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                   const wr_span *spans, int32_t span_count, int32_t encoding, const wr_rotation *rotation,
                   uint64_t *checksums, void *stream) {
    const Request request{view, range, blocks, spans, span_count, encoding, rotation, checksums, stream, true};
    return guarded(context, [&](wr_context &held) { return transfer(held, request); });
}

int32_t wr_rotate(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                  int32_t block_count, const wr_rotation *rotation, void *stream) {
    return guarded(context, [&](wr_context &held) {
        return rotate(held, view, range, blocks, block_count, rotation, stream);
    });
}

int32_t wr_copy_batch(wr_context *context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                      int64_t count, int32_t loads, void *stream) {
    return guarded(context, [&](wr_context &held) {
        return copy_many(held, targets, sources, sizes, count, loads != 0, stream);
    });
}

int32_t wr_finish(wr_context *context, void *stream) {
    return guarded(context, [&](wr_context &held) { return finish(held, stream); });
}

int32_t wr_calibrate(wr_context *context, uint64_t *load_cutoff, uint64_t *save_cutoff) {
    return guarded(context, [&](wr_context &held) {
        const int32_t status = calibrate(held);
        if (load_cutoff != nullptr) *load_cutoff = held.load_cutoff;
        if (save_cutoff != nullptr) *save_cutoff = held.save_cutoff;
        return status;
    });
}

int32_t wr_checksum(wr_context *context, const void *bytes, size_t size, uint64_t *sum, void *stream) {
    return guarded(context, [&](wr_context &held) { return checksum_of(held, bytes, size, sum, stream); });
}

uint32_t wr_crc32c(uint32_t crc, const void *bytes, size_t size) {
    return size == 0 ? crc : crc32c(crc, static_cast<const uint8_t *>(bytes), size);
}

int32_t wr_slab_alloc(wr_context *context, size_t size, int32_t node, int32_t huge, int32_t lock, void **memory,
                      uint32_t *granted) {
    return guarded(context, [&](wr_context &held) -> int32_t {
        if (memory == nullptr) return refuse(held.reason, WR_INVALID, "there is nowhere to put the address");
        *memory = nullptr;
        return slab_alloc(held, size, node, huge != 0, lock != 0, memory, granted);
    });
}

int32_t wr_slab_free(wr_context *, void *memory, size_t) { return slab_free(memory); }
