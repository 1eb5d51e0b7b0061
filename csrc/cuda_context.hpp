// A context of the CUDA backend, the driver behind it, and what all of its files need to talk to both.
//
// Work is enqueued on the caller's stream. What a context owns and several calls share (staging, sums) is handed from
// call to call by the event `done`, also between streams: no call waits for the device on the host.
#ifndef WARMROUTE_CUDA_CONTEXT_HPP
#define WARMROUTE_CUDA_CONTEXT_HPP

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <atomic>

#include "core/check.hpp"
#include "cuda_codes.hpp"
#include "cuda_kernels.hpp"
#include "cuda_plan.hpp"
#include "pool.hpp"

namespace wr {
namespace cuda {

constexpr int32_t kDefaultBlocks = 16;
constexpr int64_t kSlotBytes = 8 << 20;
constexpr int kSlots = 2;
constexpr uint64_t kDefaultCutoff = 32 << 10; // until wr_calibrate has measured it
constexpr size_t kMostCopies = 1 << 16;       // of one call of the driver
constexpr int kWaitSeconds = 60, kCloseSeconds = 10;
constexpr size_t kPinnedPiece = size_t{16} << 30; // page-locked at a time

// Functions of the driver, found at run time: the library has to load where there is none.
struct Driver {
    PFN_cuCtxGetCurrent_v4000 current;
    PFN_cuCtxSetCurrent_v4000 make_current;
    PFN_cuMemcpyBatchAsync_v12080 copy_batch; // null before CUDA 12.8
    int version;
    int devices;
    char problem[256]; // why there are no devices
};

const Driver &driver();

// Staging memory for one piece, and the events that hand it over.
struct Slot {
    uint8_t *memory;
    cudaEvent_t filled, drained;
};

// Page-locked memory that kernels write to and wr_finish reads.
struct Shared {
    Outcome outcome;
};

enum class Route { engine, direct, staged };

}  // namespace cuda
}  // namespace wr

struct wr_context {
    int32_t device = 0, blocks = 0, path = WR_AUTO;
    CUcontext primary = nullptr;
    pid_t process = 0;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    wr::Reason reason{};
    wr::Helpers helpers;
    char name[96] = {};
    int32_t major = 0, minor = 0, processors = 0, node = -1;
    uint64_t load_cutoff = wr::cuda::kDefaultCutoff, save_cutoff = wr::cuda::kDefaultCutoff;
    bool calibrated = false, staged_saves = true, staged_loads = false;
    bool batches = true; // until the driver says that it cannot

    cudaStream_t side = nullptr; // copies between staging and host
    cudaEvent_t begun = nullptr, done = nullptr;
    wr::cuda::Slot slots[wr::cuda::kSlots] = {};
    uint64_t *sums = nullptr; // [kMaxRows * kMaxLayers]
    wr::cuda::Shared *shared = nullptr, *shared_device = nullptr;
    uint64_t checked_begin = 0, checked_end = 0; // the cache that was last found to be memory of this device

    // Of the call under way; they keep their memory from call to call.
    wr::cuda::Task task{}, staged{};
    wr::cuda::Copies copies;
    std::vector<wr::cuda::Piece> pieces;
    std::vector<uint64_t> shifts;
    wr::cuda::Pages pages{};
    wr::cuda::Factors factors{};

    explicit wr_context(int threads) : helpers(threads) {}
};

namespace wr {
namespace cuda {

// Makes the context's device current for a thread that may use another, and lets it do so while some other thread
// captures a graph.
class Current {
  public:
    explicit Current(CUcontext wanted) {
        driver().current(&before_);
        if (before_ != wanted) {
            driver().make_current(wanted);
            changed_ = true;
        }
        cudaThreadExchangeStreamCaptureMode(&mode_);
    }
    ~Current() {
        cudaThreadExchangeStreamCaptureMode(&mode_);
        if (changed_) driver().make_current(before_);
    }
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;

  private:
    CUcontext before_ = nullptr;
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
    bool changed_ = false;
};

// WR_OK, or what a failed call of the runtime means.
inline int32_t checked(wr_context &context, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return WR_OK;
    cudaGetLastError();
    const int32_t status = error == cudaErrorMemoryAllocation ? WR_NO_MEMORY : WR_DEVICE;
    return refuse(context.reason, status, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

// Return from a function whose call of the runtime failed.
#define WR_CHECKED(context, call, what)                                                         \
    do {                                                                                        \
        if (const int32_t failed = ::wr::cuda::checked((context), (call), (what))) return failed; \
    } while (0)

#define WR_PASSED(call)                                 \
    do {                                                \
        if (const int32_t failed = (call)) return failed; \
    } while (0)

inline Launch on_stream(const wr_context &context, cudaStream_t stream) { return Launch{context.blocks, stream}; }

// A stream that work can be enqueued on: not the legacy default one, and not one that records a graph.
int32_t check_stream(wr_context &context, void *stream);

// Where the device finds memory that is page-locked or its own, and whether it is its own.
int32_t resolve(wr_context &context, uint64_t address, uint64_t size, const char *what, uint64_t &device_address,
                bool &on_device);

// Poll until an event, or all of a stream, has come by; WR_DEVICE after a deadline.
int32_t wait_for(wr_context &context, cudaEvent_t event, int seconds);
int32_t wait_for_stream(wr_context &context, cudaStream_t stream, int seconds);

// Enqueue copies, by one call of the driver where it has that.
int32_t enqueue(wr_context &context, Copies &copies, bool early, cudaStream_t stream);

// Every call begins with the one and ends with the other: it waits, in its stream, for what the last one left under way
// in this context's own memory.
inline int32_t take_over(wr_context &context, cudaStream_t stream) {
    return checked(context, cudaStreamWaitEvent(stream, context.done, 0), "waiting for the last call");
}
inline int32_t hand_over(wr_context &context, cudaStream_t stream) {
    return checked(context, cudaEventRecord(context.done, stream), "recording the end of a call");
}

// Move a raw, rotated or encoded call's content; its arguments are checked, its rows in context.task.
struct Moving {
    const wr_view &view;
    const wr_range &range;
    int32_t encoding;
    const wr_rotation *rotation;
    uint64_t sums_at; // where checksums go, as the device sees it; 0 for none
    bool load, packed_on_device;
    cudaStream_t stream;
};

Route route_of(const wr_context &context, const Moving &moving);
int32_t move(wr_context &context, const Moving &moving, Route route);
int32_t rotate_task(wr_context &context, const Task &task, const Piece &piece, const wr_rotation &rotation,
                    cudaStream_t stream);
void set_factors(wr_context &context, const wr_rotation &rotation);

int32_t calibrate(wr_context &context);

int32_t open(const wr_options &options, wr_context &context);
void close(wr_context &context);

// Split copies where page-locked memory was registered in pieces.
uint64_t registered_until(uint64_t address);
int32_t slab_alloc(wr_context &context, size_t size, int32_t node, bool huge, bool lock, void **memory, uint32_t *granted);
int32_t slab_free(void *memory);
bool in_slab(uint64_t address, uint64_t size, uint64_t &device_address);

cudaError_t preload_moves();
cudaError_t preload_codes();

}  // namespace cuda
}  // namespace wr

#endif
