// libwarmroute_cpu.so: the C ABI over host memory.
#include <errno.h>

#include "core/address.hpp"
#include "core/check.hpp"
#include "core/checksum.hpp"
#if __has_include("core/codec.hpp")
#include "core/codec.hpp"
#include "core/rotate.hpp"
#else
namespace wr {
static inline int64_t unit_bytes(const wr_view &v, int e) { return e == WR_RAW ? (int64_t)v.tokens * v.content_bytes : (int64_t)WR_UNSUPPORTED; }
static inline int encode_unit(const UnitShape &, int, const uint8_t *, int64_t, uint8_t *) { return WR_UNSUPPORTED; }
static inline int decode_unit(const UnitShape &, int, const uint8_t *, uint8_t *, int64_t, const Rotation *) { return WR_UNSUPPORTED; }
static inline void rotate_unit(const UnitShape &, uint8_t *, int64_t, const Rotation &) {}
}
#endif
#include "cpu_kernels.hpp"
#include "pool.hpp"
#include "slab.hpp"

#if defined(WR_WITH_NEON)
#include <sys/auxv.h>
#endif

using namespace wr;

namespace {

constexpr int MOST_THREADS = 8;
constexpr int64_t PIECE = 256 << 10;  // bytes that one thread takes at a time; less than two of them are not shared

thread_local Reason open_reason;
thread_local const wr_context *busy_context;  // which another thread had when this one last called

#if defined(WR_WITH_X86)
// Besides the vectors themselves, the tables are compiled for what every processor with them has.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("sse4.2");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Kernels *kernels_of(int32_t isa) {
    switch (isa) {
        case WR_ISA_PORTABLE: return &PORTABLE_KERNELS;
#if defined(WR_WITH_X86)
        case WR_ISA_AVX2: return has_avx2() ? &AVX2_KERNELS : nullptr;
        case WR_ISA_AVX512: return has_avx512() ? &AVX512_KERNELS : nullptr;
#endif
#if defined(WR_WITH_NEON)
        case WR_ISA_NEON: return (getauxval(AT_HWCAP) & HWCAP_CRC32) ? &NEON_KERNELS : nullptr;
#endif
        case WR_ISA_BEST:
            for (int32_t each : {WR_ISA_AVX512, WR_ISA_AVX2, WR_ISA_NEON})
                if (const Kernels *kernels = kernels_of(each)) return kernels;
            return &PORTABLE_KERNELS;
        default: return nullptr;
    }
}

const Kernels &best_kernels() {
    static const Kernels *const best = kernels_of(WR_ISA_BEST);
    return *best;
}

Mappings &mappings() {
    static Mappings *const held = new Mappings;
    return *held;
}

}  // namespace

struct wr_context {
    const Kernels *kernels;
    Helpers helpers;
    pid_t process;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    Reason reason{};
    std::vector<float> factors;     // of the rotation of the call under way
    std::vector<int64_t> starts;    // of its spans or copies

    wr_context(const Kernels *chosen, int threads) : kernels(chosen), helpers(threads), process(getpid()) {}
};

namespace {

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
int32_t guarded(wr_context *context, Call call) {
    if (context == nullptr) return WR_INVALID;
    Turn turn(*context);
    if (!turn.mine()) {
        busy_context = context;
        return WR_INVALID;
    }
    busy_context = nullptr;
    try {
        return call();
    } catch (const std::exception &error) {
        return refuse(context->reason, WR_NO_MEMORY, "out of memory: %s", error.what());
    }
}

uint8_t *bytes_at(uint64_t address) { return reinterpret_cast<uint8_t *>(address); }

// One gather or scatter. Pages are counted over spans, layers and blocks, in this order.
struct Transfer {
    const Kernels &kernels;
    const wr_view &view;
    const wr_range &range;
    const int32_t *blocks;
    const wr_span *spans;
    const int64_t *starts;  // first page of each span, and the end
    int32_t encoding;
    bool load;
    const Rotation *rotation;
    uint64_t *checksums;
    int64_t unit_bytes;
    bool joined;  // a page's heads in range are one run of bytes on both sides
    std::atomic<int32_t> status;
};

struct Page {
    uint8_t *cache, *packed;
    TokenRange tokens;
};

// Steps through pages without dividing for each. next() is for where another page follows.
struct Cursor {
    const Transfer &transfer;
    int32_t span, layer, at;

    Cursor(const Transfer &of, int64_t page) : transfer(of), span(0) {
        while (page >= of.starts[span + 1]) ++span;
        int64_t within = page - of.starts[span], blocks = of.spans[span].block_count;
        layer = (int32_t)(within / blocks);
        at = (int32_t)(within % blocks);
    }

    Page page() const {
        const Transfer &t = transfer;
        int64_t before = t.starts[span] / t.view.layer_count;
        int32_t block = t.blocks[before + at];
        return Page{bytes_at(unit_address(t.view, layer, block, t.range.first_head)),
                    bytes_at(packed_address(t.spans[span], t.range, layer, at, t.unit_bytes)),
                    tokens_of(t.view, t.range, at)};
    }

    void next() {
        if (++at < transfer.spans[span].block_count) return;
        at = 0;
        if (++layer < transfer.view.layer_count) return;
        layer = 0;
        do ++span;
        while (transfer.starts[span] == transfer.starts[span + 1]);
    }
};

// Joins copies that continue each other on both sides.
struct Run {
    void (*copy)(uint8_t *to, const uint8_t *from, uint64_t size);
    uint8_t *to;
    const uint8_t *from;
    uint64_t size;

    void add(uint8_t *next_to, const uint8_t *next_from, uint64_t next_size) {
        if (next_to == to + size && next_from == from + size) {
            size += next_size;
            return;
        }
        flush();
        to = next_to;
        from = next_from;
        size = next_size;
    }

    void flush() {
        if (size > 0) copy(to, from, size);
        size = 0;
    }
};

void copy_page(const Transfer &t, const Page &page, Run &run) {
    int64_t content = t.view.content_bytes, tokens = page.tokens.last - page.tokens.first;
    if (tokens <= 0) return;
    bool whole = tokens == t.view.tokens;
    if (t.joined && (whole || t.range.heads == 1)) {
        int64_t skipped = page.tokens.first * content;
        uint64_t size = (uint64_t)(t.range.heads * tokens * content);
        if (t.load)
            run.add(page.cache + skipped, page.packed + skipped, size);
        else
            run.add(page.packed + skipped, page.cache + skipped, size);
        return;
    }
    run.flush();
    for (int32_t head = 0; head < t.range.heads; ++head) {
        uint8_t *cache = page.cache + head * t.view.head_stride + page.tokens.first * t.view.token_stride;
        uint8_t *packed = page.packed + head * t.unit_bytes + page.tokens.first * content;
        if (t.load)
            t.kernels.copy_rows(cache, t.view.token_stride, packed, content, (uint64_t)content, tokens);
        else
            t.kernels.copy_rows(packed, content, cache, t.view.token_stride, (uint64_t)content, tokens);
    }
}

void rotate_page(const Transfer &t, const Page &page) {
    UnitShape shape = unit_shape(t.view);
    shape.tokens = page.tokens.last - page.tokens.first;
    if (shape.tokens <= 0) return;
    for (int32_t head = 0; head < t.range.heads; ++head)
        t.kernels.rotate(shape, page.cache + head * t.view.head_stride + page.tokens.first * t.view.token_stride,
                         t.view.token_stride, *t.rotation);
}

int32_t code_page(const Transfer &t, const Page &page) {
    UnitShape shape = unit_shape(t.view);
    for (int32_t head = 0; head < t.range.heads; ++head) {
        uint8_t *cache = page.cache + head * t.view.head_stride, *packed = page.packed + head * t.unit_bytes;
        int status = t.load ? t.kernels.decode(shape, t.encoding, packed, cache, t.view.token_stride, t.rotation)
                            : t.kernels.encode(shape, t.encoding, cache, t.view.token_stride, packed);
        if (status != WR_OK) return status;
    }
    return WR_OK;
}

void move_pages(void *state, int64_t begin, int64_t end) {
    Transfer &t = *(Transfer *)state;
    Cursor cursor(t, begin);
    Run run{t.kernels.copy, nullptr, nullptr, 0};
    for (int64_t at = begin;;) {
        Page page = cursor.page();
        if (t.encoding == WR_RAW) {
            copy_page(t, page, run);
        } else if (int32_t status = code_page(t, page)) {
            t.status.store(status, std::memory_order_relaxed);
            return;
        }
        if (t.encoding == WR_RAW && (t.rotation != nullptr || t.checksums != nullptr)) run.flush();
        if (t.encoding == WR_RAW && t.rotation != nullptr) rotate_page(t, page);
        if (t.checksums != nullptr) {
            uint64_t size = (uint64_t)(t.range.heads * t.unit_bytes);
            t.checksums[at] = t.kernels.checksum_words(page.packed, size, 0) + checksum_length(size);
        }
        if (++at == end) break;
        cursor.next();
    }
    run.flush();
}

// The wr_rotation in both precisions; the floats live in the context until its next call.
Rotation prepared(wr_context &context, const wr_rotation &rotation) {
    size_t count = (size_t)rotation.count;
    context.factors.resize(2 * count);
    for (size_t i = 0; i < count; ++i) {
        context.factors[i] = (float)rotation.cosines[i];
        context.factors[count + i] = (float)rotation.sines[i];
    }
    return Rotation{context.factors.data(), context.factors.data() + count, rotation.cosines, rotation.sines,
                    rotation.count,         rotation.rotary_offset,         rotation.interleaved};
}

bool pages_joined(const wr_view &view, const wr_range &range) {
    int64_t unit = (int64_t)view.tokens * view.content_bytes;
    return (view.tokens == 1 || view.token_stride == view.content_bytes) &&
           (range.heads == 1 || view.head_stride == unit);
}

// Pages per piece of work, so that pieces have about PIECE bytes.
int64_t pages_per_piece(int64_t page_bytes) { return page_bytes >= PIECE ? 1 : PIECE / page_bytes; }

int32_t transfer(wr_context &context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                 const wr_span *spans, int32_t span_count, int32_t encoding, const wr_rotation *rotation,
                 uint64_t *checksums, void *stream, bool load) {
    Reason &reason = context.reason;
    if (view == nullptr || range == nullptr) return refuse(reason, WR_INVALID, "view or range is missing");
    if (stream != nullptr) return refuse(reason, WR_INVALID, "the CPU backend has no streams");
    if (int32_t status = check_view(*view, reason)) return status;
    if (int32_t status = check_range(*view, *range, reason)) return status;
    if (rotation != nullptr)
        if (int32_t status = check_rotation(*view, *rotation, reason)) return status;
    int64_t unit = wr_unit_bytes(view, encoding), pages = 0;
    if (unit < 0) return refuse(reason, (int32_t)unit, "encoding %d cannot hold this cache's elements", encoding);
    bool whole = encoding != WR_RAW || checksums != nullptr;
    if (int32_t status = check_spans(*view, *range, blocks, spans, span_count, unit, whole, pages, reason)) return status;
    if (pages == 0) return WR_OK;
    context.starts.assign(1, 0);
    for (int32_t i = 0; i < span_count; ++i)
        context.starts.push_back(context.starts.back() + (int64_t)spans[i].block_count * view->layer_count);
    Rotation factors{};
    if (rotation != nullptr) factors = prepared(context, *rotation);
    Transfer work{*context.kernels, *view, *range, blocks, spans, context.starts.data(), encoding, load,
                  rotation != nullptr ? &factors : nullptr, checksums, unit, pages_joined(*view, *range), {WR_OK}};
    int64_t page_bytes = range->heads * (int64_t)view->tokens * view->content_bytes;
    context.helpers.run(Job{move_pages, &work, pages, pages_per_piece(page_bytes)});
    int32_t status = work.status.load();
    if (status == WR_OK) return WR_OK;
    return refuse(reason, status, status == WR_INCOMPRESSIBLE ? "a unit has too many escapes for this encoding"
                                                              : "the packed form is not what an encoder writes");
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
    return guarded(context, [&] {
        return transfer(*context, view, range, blocks, spans, span_count, encoding, nullptr, checksums, stream, false);
    });
}

int32_t wr_scatter(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                   const wr_span *spans, int32_t span_count, int32_t encoding, const wr_rotation *rotation,
                   uint64_t *checksums, void *stream) {
    return guarded(context, [&] {
        return transfer(*context, view, range, blocks, spans, span_count, encoding, rotation, checksums, stream, true);
    });
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
    Turning &t = *(Turning *)state;
    UnitShape shape = unit_shape(t.view);
    for (int64_t page = begin; page < end; ++page) {
        int32_t layer = (int32_t)(page / t.block_count), at = (int32_t)(page % t.block_count);
        TokenRange tokens = tokens_of(t.view, t.range, at);
        shape.tokens = tokens.last - tokens.first;
        for (int32_t head = 0; shape.tokens > 0 && head < t.range.heads; ++head) {
            uint8_t *unit = bytes_at(unit_address(t.view, layer, t.blocks[at], t.range.first_head + head));
            t.kernels.rotate(shape, unit + tokens.first * t.view.token_stride, t.view.token_stride, t.rotation);
        }
    }
}

int32_t rotate(wr_context &context, const wr_view *view, const wr_range *range, const int32_t *blocks,
               int32_t block_count, const wr_rotation *rotation, void *stream) {
    Reason &reason = context.reason;
    if (view == nullptr || range == nullptr || rotation == nullptr || block_count < 0 ||
        (block_count > 0 && blocks == nullptr))
        return refuse(reason, WR_INVALID, "view, range, blocks or rotation is missing");
    if (stream != nullptr) return refuse(reason, WR_INVALID, "the CPU backend has no streams");
    if (int32_t status = check_view(*view, reason)) return status;
    if (int32_t status = check_range(*view, *range, reason)) return status;
    if (int32_t status = check_rotation(*view, *rotation, reason)) return status;
    if (int32_t status = check_blocks(*view, blocks, block_count, reason)) return status;
    Rotation factors = prepared(context, *rotation);
    Turning work{*context.kernels, *view, *range, blocks, block_count, factors};
    int64_t page_bytes = range->heads * (int64_t)view->tokens * view->content_bytes;
    context.helpers.run(
        Job{rotate_pages, &work, (int64_t)block_count * view->layer_count, pages_per_piece(page_bytes)});
    return WR_OK;
}

// Copies, seen as one run of bytes: copy i is bytes [starts[i], starts[i + 1]).
struct Batch {
    const Kernels &kernels;
    const uint64_t *targets, *sources;
    const int64_t *starts;
    int64_t count;
};

void copy_some(void *state, int64_t begin, int64_t end) {
    Batch &batch = *(Batch *)state;
    int64_t low = 0, high = batch.count;  // the last copy that starts at or before `begin`
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (batch.starts[middle] <= begin)
            low = middle;
        else
            high = middle;
    }
    Run run{batch.kernels.copy, nullptr, nullptr, 0};
    for (int64_t i = low; begin < end; ++i) {
        int64_t within = begin - batch.starts[i], stop = batch.starts[i + 1] < end ? batch.starts[i + 1] : end;
        run.add(bytes_at(batch.targets[i]) + within, bytes_at(batch.sources[i]) + within, (uint64_t)(stop - begin));
        begin = stop;
    }
    run.flush();
}

int32_t copy_batch(wr_context &context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                   int64_t count, void *stream) {
    Reason &reason = context.reason;
    if (count < 0 || (count > 0 && (targets == nullptr || sources == nullptr || sizes == nullptr)))
        return refuse(reason, WR_INVALID, "targets, sources or sizes are missing");
    if (stream != nullptr) return refuse(reason, WR_INVALID, "the CPU backend has no streams");
    context.starts.assign(1, 0);
    for (int64_t i = 0; i < count; ++i) {
        int64_t end = context.starts.back();
        bool ends = sizes[i] <= INT64_MAX && add_product(end, 1, (int64_t)sizes[i]) &&
                    targets[i] <= UINT64_MAX - sizes[i] && sources[i] <= UINT64_MAX - sizes[i];
        if (!ends || (sizes[i] > 0 && (targets[i] == 0 || sources[i] == 0)))
            return refuse(reason, WR_INVALID, "copy %lld has no memory, or leaves the address space", (long long)i);
        context.starts.push_back(end);
    }
    Batch work{*context.kernels, targets, sources, context.starts.data(), count};
    context.helpers.run(Job{copy_some, &work, context.starts.back(), PIECE});
    return WR_OK;
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

int32_t wr_rotate(wr_context *context, const wr_view *view, const wr_range *range, const int32_t *blocks,
                  int32_t block_count, const wr_rotation *rotation, void *stream) {
    return guarded(context,
                   [&] { return rotate(*context, view, range, blocks, block_count, rotation, stream); });
}

int32_t wr_copy_batch(wr_context *context, const uint64_t *targets, const uint64_t *sources, const uint64_t *sizes,
                      int64_t count, int32_t, void *stream) {
    return guarded(context, [&] { return copy_batch(*context, targets, sources, sizes, count, stream); });
}

int32_t wr_finish(wr_context *context, void *stream) {
    return guarded(context, [&]() -> int32_t {
        return stream == nullptr ? WR_OK : refuse(context->reason, WR_INVALID, "the CPU backend has no streams");
    });
}

int32_t wr_calibrate(wr_context *context, uint64_t *load_cutoff, uint64_t *save_cutoff) {
    return guarded(context, [&] {
        if (load_cutoff != nullptr) *load_cutoff = 0;
        if (save_cutoff != nullptr) *save_cutoff = 0;
        return WR_OK;
    });
}

int32_t wr_checksum(wr_context *context, const void *bytes, size_t size, uint64_t *sum, void *stream) {
    return guarded(context, [&]() -> int32_t {
        if (sum == nullptr || (bytes == nullptr && size > 0) || size > INT64_MAX || stream != nullptr)
            return refuse(context->reason, WR_INVALID, "bytes or sum are missing, or a stream is given");
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
    return guarded(context, [&]() -> int32_t {
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
