// libwarmroute_cpu.so: the C ABI over host memory.
#include <exception>

#include "core/checksum.hpp"
#include "core/codec_layout.hpp"
#include "cpu_context.hpp"
#include "cpu_moves.hpp"
#include "slab.hpp"

using namespace wr;

namespace {

constexpr int MOST_THREADS = 8;

thread_local Reason open_reason;
thread_local const wr_context *busy_context;  // which another thread had when this one last called

Mappings &mappings() {
    static Mappings *const held = new Mappings;
    return *held;
}

// Holds a context for one call. In a child of fork() nobody else can hold it, whatever its state was.
class Turn {
  public:
    explicit Turn(wr_context &context) : context_(context) {
        pid_t process = getpid();
        if (context.process != process) {
            context.process = process;
            context.busy.clear();
        }
        mine_ = !context.busy.test_and_set(std::memory_order_acquire);
    }
    ~Turn() {
        if (mine_) context_.busy.clear(std::memory_order_release);
    }
    Turn(const Turn &) = delete;
    Turn &operator=(const Turn &) = delete;

    bool mine() const { return mine_; }

  private:
    wr_context &context_;
    bool mine_;
};

// Runs `call` with the context, mapping what the standard library throws.
template <class Call>
int32_t guarded(wr_context *context, const void *stream, Call call) {
    if (context == nullptr) return WR_INVALID;
    Turn turn(*context);
    if (!turn.mine()) {
        busy_context = context;
        return WR_INVALID;
    }
    busy_context = nullptr;
    if (stream != nullptr) return refuse(context->reason, WR_INVALID, "the CPU backend has no streams");
    try {
        return call();
    } catch (const std::exception &error) {
        return refuse(context->reason, WR_NO_MEMORY, "out of memory: %s", error.what());
    }
}

struct Summing {
    const Kernels &kernels;
    const uint8_t *bytes;
    std::atomic<uint64_t> sum;
};

void sum_some(void *state, int64_t begin, int64_t end) {
    Summing &work = *(Summing *)state;
    work.sum += work.kernels.checksum_words(work.bytes + begin, (uint64_t)(end - begin), (uint64_t)begin / 8);
}

}  // namespace

int32_t wr_abi(void) { return WR_ABI_VERSION; }

const char *wr_build(void) { return WR_BUILD; }

int32_t wr_devices(void) { return 1; }

int32_t wr_open(const wr_options *options, wr_context **context) {
    if (context == nullptr) return refuse(open_reason, WR_INVALID, "there is nowhere to put the context");
    *context = nullptr;
    wr_options chosen = options != nullptr ? *options : wr_options{};
    if (chosen.threads < 0 || chosen.threads > 1024)
        return refuse(open_reason, WR_INVALID, "%d threads", chosen.threads);
    const Kernels *kernels = kernels_of(chosen.isa);
    if (kernels == nullptr)
        return refuse(open_reason, WR_UNSUPPORTED, "this processor, or this build, lacks instruction set %d", chosen.isa);
    int usable = usable_cores(), threads = chosen.threads;
    if (threads == 0) threads = usable < MOST_THREADS ? usable : MOST_THREADS;
    *context = new (std::nothrow) wr_context(kernels, threads);
    return *context != nullptr ? WR_OK : refuse(open_reason, WR_NO_MEMORY, "out of memory");
}

void wr_close(wr_context *context) { delete context; }

const char *wr_explain(const wr_context *context) {
    if (context != nullptr && context == busy_context) return "another thread uses this context";
    return context != nullptr ? context->reason.text : open_reason.text;
}

int32_t wr_describe(const wr_context *context, char *text, size_t size) {
    if (context == nullptr || text == nullptr || size == 0) return WR_INVALID;
    snprintf(text, size, "%s, %d threads", context->kernels->name, context->helpers.threads());
    return WR_OK;
}

int64_t wr_unit_bytes(const wr_view *view, int32_t encoding) {
    if (view == nullptr) return WR_INVALID;
    return unit_bytes(*view, encoding);
}

int32_t wr_gather(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                  const wr_span *spans, int32_t span_count, int32_t encoding, uint64_t *checksums, void *stream) {
    return guarded(context, stream, [&] {
        return move_blocks(*context,
                           MoveCall{view, range, blocks, spans, span_count, encoding, nullptr, checksums, false});
    });
}

int32_t wr_scatter(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                   const wr_span *spans, int32_t span_count, int32_t encoding, const wr_rotation *rotation,
                   uint64_t *checksums, void *stream) {
    return guarded(context, stream, [&] {
        return move_blocks(*context,
                           MoveCall{view, range, blocks, spans, span_count, encoding, rotation, checksums, true});
    });
}

int32_t wr_rotate(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                  int32_t block_count, const wr_rotation *rotation, void *stream) {
    return guarded(context, stream,
                   [&] { return rotate_blocks(*context, view, range, blocks, block_count, rotation); });
}

int32_t wr_copy_batch(wr_context *context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                      int64_t count, int32_t, void *stream) {
    return guarded(context, stream, [&] { return copy_batch(*context, targets, sources, sizes, count); });
}

int32_t wr_finish(wr_context *context, void *stream) {
    return guarded(context, stream, [] { return WR_OK; });
}

int32_t wr_calibrate(wr_context *context, uint64_t *load_cutoff, uint64_t *save_cutoff) {
    return guarded(context, nullptr, [&] {
        if (load_cutoff != nullptr) *load_cutoff = 0;
        if (save_cutoff != nullptr) *save_cutoff = 0;
        return WR_OK;
    });
}

int32_t wr_checksum(wr_context *context, const void *bytes, size_t size, uint64_t *sum, void *stream) {
    return guarded(context, stream, [&]() -> int32_t {
        if (sum == nullptr || (bytes == nullptr && size > 0) || size > INT64_MAX)
            return refuse(context->reason, WR_INVALID, "bytes or sum are missing");
        Summing work{*context->kernels, (const uint8_t *)bytes, {checksum_length(size)}};
        context->helpers.run(Job{sum_some, &work, (int64_t)size, PIECE});
        *sum = work.sum.load();
        return WR_OK;
    });
}

uint32_t wr_crc32c(uint32_t crc, const void *bytes, size_t size) {
    return size == 0 ? crc : best_kernels().crc32c(crc, (const uint8_t *)bytes, size);
}

int32_t wr_slab_alloc(wr_context *context, size_t size, int32_t node, int32_t huge, int32_t, void **memory,
                      uint32_t *granted) {
    return guarded(context, nullptr, [&]() -> int32_t {
        if (memory == nullptr) return refuse(context->reason, WR_INVALID, "there is nowhere to put the address");
        *memory = nullptr;
        Mapping mapping;
        if (int32_t status = map_slab(size, node, huge != 0, context->helpers, mapping, context->reason)) return status;
        mappings().add(mapping);
        *memory = mapping.memory;
        if (granted != nullptr) *granted = mapping.granted;
        return WR_OK;
    });
}

int32_t wr_slab_free(wr_context *, void *memory, size_t) {
    Mapping mapping;
    if (memory == nullptr) return WR_OK;
    int32_t status = mappings().take(memory, mapping);
    if (mapping.memory != nullptr) unmap(mapping);
    return status;
}
