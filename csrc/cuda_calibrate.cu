// Measures, on this machine, from which size on the copy engines are as fast as the kernels, and which kernel path is the
// faster one. Sizes between are taken with the engines: they leave the multiprocessors to the model.
#include "cuda_context.hpp"

namespace wr {
namespace cuda {

namespace {

constexpr int64_t kProbeBytes = 16 << 20;
constexpr int64_t kLeast = 4 << 10, kMost = 1 << 20;
constexpr int kSizes = 9, kRounds = 3;
constexpr float kEngineMargin = 1.10f; // how much slower the engines may be: starting a batch alone is 3 % of a probe
constexpr int64_t kSmall = 32 << 10;   // up to here, sizes decide between the two kernel paths

struct Probe {
    uint8_t *device = nullptr, *host = nullptr;
    cudaStream_t stream = nullptr;
    cudaEvent_t begin = nullptr, end = nullptr;

    ~Probe() {
        if (device != nullptr) cudaFree(device);
        if (host != nullptr) cudaFreeHost(host);
        if (begin != nullptr) cudaEventDestroy(begin);
        if (end != nullptr) cudaEventDestroy(end);
        if (stream != nullptr) cudaStreamDestroy(stream);
    }
};

// Milliseconds per size.
struct Times {
    float engine[kSizes], direct[kSizes], staged[kSizes];
};

int32_t prepare(wr_context &context, Probe &probe) {
    WR_CHECKED(context, cudaMalloc(&probe.device, kProbeBytes), "taking memory to measure with");
    WR_CHECKED(context, cudaHostAlloc(&probe.host, kProbeBytes, cudaHostAllocPortable), "taking memory to measure with");
    WR_CHECKED(context, cudaStreamCreateWithFlags(&probe.stream, cudaStreamNonBlocking), "making a stream");
    WR_CHECKED(context, cudaEventCreate(&probe.begin), "making an event");
    WR_CHECKED(context, cudaEventCreate(&probe.end), "making an event");
    for (int64_t i = 0; i < kProbeBytes; i += 8) {
        const uint64_t word = checksum_key(static_cast<uint64_t>(i));
        memcpy(probe.host + i, &word, sizeof word);
    }
    return checked(context, cudaMemcpyAsync(probe.device, probe.host, kProbeBytes, cudaMemcpyDefault, probe.stream),
                   "filling memory to measure with");
}

int32_t time_once(wr_context &context, const Probe &probe, const Moving &moving, Route route, float &milliseconds) {
    WR_CHECKED(context, cudaEventRecord(probe.begin, probe.stream), "recording an event");
    WR_PASSED(move(context, moving, route));
    WR_CHECKED(context, cudaEventRecord(probe.end, probe.stream), "recording an event");
    WR_PASSED(wait_for(context, probe.end, kWaitSeconds));
    return checked(context, cudaEventElapsedTime(&milliseconds, probe.begin, probe.end), "reading the time");
}

// The best of a few: what disturbs a transfer only ever makes it slower.
int32_t time_route(wr_context &context, const Probe &probe, const Moving &moving, Route route, float &best) {
    for (int round = 0; round < kRounds; ++round) {
        float taken = 0;
        WR_PASSED(time_once(context, probe, moving, route, taken));
        best = round == 0 || taken < best ? taken : best;
    }
    return WR_OK;
}

int32_t time_size(wr_context &context, const Probe &probe, int64_t page, bool load, int index, Times &times) {
    const int32_t count = static_cast<int32_t>(kProbeBytes / page);
    const uint64_t base = reinterpret_cast<uint64_t>(probe.device), host = reinterpret_cast<uint64_t>(probe.host);
    wr_view view{};
    view.layers = &base;
    view.begin = base;
    view.end = base + kProbeBytes;
    view.block_stride = view.head_stride = view.token_stride = page;
    view.layer_count = view.heads = view.tokens = 1;
    view.block_count = count;
    view.content_bytes = static_cast<int32_t>(page);
    const wr_range range{0, 1, 0, 1, 0, INT32_MAX};
    const wr_span span{host, static_cast<uint64_t>(kProbeBytes), count, 0, count, 0};
    std::vector<int32_t> blocks(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) blocks[static_cast<size_t>(i)] = count - 1 - i; // so that none are neighbours
    const uint64_t shift = 0;
    fill_task(context.task, view, range, blocks.data(), &span, 1, page, &shift);
    const Moving moving{view, range, WR_RAW, nullptr, 0, load, false, probe.stream};
    WR_PASSED(time_route(context, probe, moving, Route::engine, times.engine[index]));
    WR_PASSED(time_route(context, probe, moving, Route::direct, times.direct[index]));
    return time_route(context, probe, moving, Route::staged, times.staged[index]);
}

void decide(const Times &times, uint64_t &cutoff, bool &staged) {
    float direct_sum = 0, staged_sum = 0;
    int64_t page = kLeast;
    for (int i = 0; i < kSizes; ++i, page *= 2) {
        if (page > kSmall) break;
        direct_sum += times.direct[i];
        staged_sum += times.staged[i];
    }
    staged = staged_sum < direct_sum;
    cutoff = kMost * 2;
    page = kMost;
    for (int i = kSizes - 1; i >= 0; --i, page /= 2) {
        const float kernel = staged ? times.staged[i] : times.direct[i];
        if (times.engine[i] > kernel * kEngineMargin) return;
        cutoff = static_cast<uint64_t>(page);
    }
}

int32_t calibrate_direction(wr_context &context, const Probe &probe, bool load) {
    Times times{};
    int64_t page = kLeast;
    for (int i = 0; i < kSizes; ++i, page *= 2) WR_PASSED(time_size(context, probe, page, load, i, times));
    decide(times, load ? context.load_cutoff : context.save_cutoff, load ? context.staged_loads : context.staged_saves);
    return WR_OK;
}

}  // namespace

int32_t calibrate(wr_context &context) {
    Probe probe;
    WR_PASSED(prepare(context, probe));
    WR_PASSED(take_over(context, probe.stream));
    int32_t status = calibrate_direction(context, probe, true);
    if (status == WR_OK) status = calibrate_direction(context, probe, false);
    context.calibrated = status == WR_OK;
    // Before the memory goes, whatever happened.
    const int32_t idle = wait_for_stream(context, probe.stream, kWaitSeconds);
    return status != WR_OK ? status : idle;
}

}  // namespace cuda
}  // namespace wr
