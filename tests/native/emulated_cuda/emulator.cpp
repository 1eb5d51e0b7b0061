#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cudaTypedefs.h"

void emulated_fault(const char *what, const void *address) {
    fprintf(stderr, "emulated GPU: %s (%p)\n", what, address);
    abort();
}

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

std::recursive_mutex everything;
std::minstd_rand chance(12345);

// Threads of a block, as fibers. One fiber runs thread after thread for as long as they end without waiting.
constexpr size_t kStack = 256 << 10;

struct Warp {
    uint64_t values[2][32];
    WarpOp ops[2];
    unsigned arrived = 0, turn = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    unsigned thread = 0;
    bool done = true;
};

struct Block {
    const std::function<void()> *body;
    unsigned threads, next = 0, ended = 0, at_barrier = 0, barriers = 0;
    std::vector<Warp> warps;
    std::vector<Fiber *> waiting;
};

std::vector<std::unique_ptr<Fiber>> all_fibers;
std::vector<Fiber *> idle_fibers;
ucontext_t scheduler;
Block *block;
Fiber *running;

void yield() {
    Fiber *self = running;
    block->waiting.push_back(self);
    swapcontext(&self->context, &scheduler);
    running = self;
    threadIdx.x = self->thread;
}

void fiber_main() {
    for (;;) {
        while (block->next < block->threads) {
            Fiber *self = running;
            self->thread = block->next++;
            threadIdx.x = self->thread;
            (*block->body)();
            ++block->ended;
        }
        Fiber *self = running;
        self->done = true;
        swapcontext(&self->context, &scheduler);
    }
}

Fiber *take_fiber() {
    if (idle_fibers.empty()) {
        all_fibers.push_back(std::make_unique<Fiber>());
        Fiber *made = all_fibers.back().get();
        getcontext(&made->context);
        made->context.uc_stack.ss_sp = made->stack.get();
        made->context.uc_stack.ss_size = kStack;
        made->context.uc_link = nullptr;
        makecontext(&made->context, fiber_main, 0);
        idle_fibers.push_back(made);
    }
    Fiber *taken = idle_fibers.back();
    idle_fibers.pop_back();
    taken->done = false;
    return taken;
}

void run_block(const std::function<void()> &body, unsigned threads) {
    Block here{&body, threads, 0, 0, 0, 0, std::vector<Warp>((threads + 31) / 32), {}};
    block = &here;
    unsigned stuck = 0;
    while (here.ended < threads) {
        Fiber *chosen;
        const bool fresh = here.next < threads && (here.waiting.empty() || chance() % 2 == 0);
        if (fresh) {
            chosen = take_fiber();
        } else {
            const size_t at = chance() % here.waiting.size();
            std::swap(here.waiting[at], here.waiting.back());
            chosen = here.waiting.back();
            here.waiting.pop_back();
        }
        const unsigned before = here.ended;
        running = chosen;
        swapcontext(&scheduler, &chosen->context);
        if (chosen->done) idle_fibers.push_back(chosen);
        stuck = here.ended == before && here.next >= threads ? stuck + 1 : 0;
        if (stuck > 50000000u) emulated_fault("threads wait for each other for ever", nullptr);
    }
}

struct Op {
    std::function<void()> run;
    EmulatedEvent *wait = nullptr;
    uint64_t generation = 0;
};

}  // namespace

struct EmulatedStream {
    std::deque<Op> queue;
};

struct EmulatedEvent {
    uint64_t recorded = 0, reached = 0;
};

namespace {

std::vector<EmulatedStream *> streams;
std::map<cudaStream_t, std::unique_ptr<EmulatedStream>> made_up; // handles that a caller invented

EmulatedStream &real(cudaStream_t stream) {
    for (EmulatedStream *each : streams)
        if (each == stream) return *each;
    std::unique_ptr<EmulatedStream> &mine = made_up[stream];
    if (!mine) {
        mine = std::make_unique<EmulatedStream>();
        streams.push_back(mine.get());
    }
    return *mine;
}

bool ready(const EmulatedStream &stream) {
    return !stream.queue.empty() &&
           (stream.queue.front().wait == nullptr || stream.queue.front().wait->reached >= stream.queue.front().generation);
}

// One piece of work of any stream; false where there is none.
bool step() {
    std::vector<EmulatedStream *> able;
    for (EmulatedStream *each : streams)
        if (ready(*each)) able.push_back(each);
    if (able.empty()) return false;
    EmulatedStream *chosen = able[chance() % able.size()];
    Op op = std::move(chosen->queue.front());
    chosen->queue.pop_front();
    if (op.run) op.run();
    return true;
}

void run_until(const std::function<bool()> &enough) {
    while (!enough())
        if (!step()) emulated_fault("streams wait for each other for ever", nullptr);
}

CUcontext current_context;
std::map<uintptr_t, size_t> registered;

CUresult get_current(CUcontext *context) {
    *context = current_context;
    return CUDA_SUCCESS;
}
CUresult set_current(CUcontext context) {
    current_context = context;
    return CUDA_SUCCESS;
}

CUresult copy_batch(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count, CUmemcpyAttributes *attributes,
                    size_t *first, size_t attribute_count, size_t *, cudaStream_t stream) {
    if (getenv("EMULATED_REFUSED_BATCHES") != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    if (stream == nullptr || count == 0 || attribute_count != 1 || *first != 0) return CUDA_ERROR_INVALID_VALUE;
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) {
        if (sizes[i] == 0) return CUDA_ERROR_INVALID_VALUE;
        order[i] = i;
    }
    std::vector<CUdeviceptr> to(targets, targets + count), from(sources, sources + count);
    std::vector<size_t> size(sizes, sizes + count);
    // A source that may be read in any order may be read now.
    std::vector<std::vector<char>> early(attributes->srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_ANY ? count : 0);
    for (size_t i = 0; i < early.size(); ++i) early[i].assign((char *)from[i], (char *)from[i] + size[i]);
    std::shuffle(order.begin(), order.end(), chance);
    real(stream).queue.push_back({[=] {
        for (size_t i : order) memcpy((void *)to[i], early.empty() ? (void *)from[i] : (void *)early[i].data(), size[i]);
    }});
    return CUDA_SUCCESS;
}

}  // namespace

#define LOCKED const std::lock_guard<std::recursive_mutex> hold(everything)

uint64_t emulated_warp(WarpOp op, uint64_t value, uint32_t argument) {
    Warp &warp = block->warps[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32, turn = warp.turn, side = turn % 2;
    if (warp.arrived != 0 && warp.ops[side] != op) emulated_fault("lanes of a warp have parted", nullptr);
    warp.ops[side] = op;
    warp.values[side][lane] = value;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.turn;
    }
    while (warp.turn == turn) yield();
    const uint64_t *values = warp.values[side];
    uint64_t result = values[0];
    switch (op) {
        case WarpOp::sync: return 0;
        case WarpOp::all:
            for (int i = 1; i < 32; ++i) result = result && values[i];
            return result;
        case WarpOp::max:
            for (int i = 1; i < 32; ++i) result = values[i] > result ? values[i] : result;
            return result;
        case WarpOp::take: return values[argument % 32];
        case WarpOp::up: return lane >= argument ? values[lane - argument] : values[lane];
        default: return values[lane ^ argument];
    }
}

void __syncthreads() {
    const unsigned passed = block->barriers;
    if (++block->at_barrier == block->threads) {
        block->at_barrier = 0;
        ++block->barriers;
    }
    while (block->barriers == passed) yield();
}

void emulated_launch(cudaStream_t stream, unsigned blocks, unsigned threads, std::function<void()> body) {
    LOCKED;
    real(stream).queue.push_back({[=] {
        blockDim.x = threads;
        gridDim.x = blocks;
        std::vector<unsigned> order(blocks);
        for (unsigned i = 0; i < blocks; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), chance);
        for (unsigned i : order) {
            blockIdx.x = i;
            run_block(body, threads);
        }
    }});
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return current_context = (CUcontext)&everything, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "emulated error"; }
const char *cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int) { return snprintf(text, size_t(size), "0000:00:00.9"), cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    snprintf(properties->name, sizeof properties->name, "emulated GPU");
    properties->major = 9;
    properties->minor = 0;
    properties->multiProcessorCount = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
    const bool single = getenv("EMULATED_SINGLE_COPIES") != nullptr;
    *result = cudaDriverEntryPointSuccess;
    if (strcmp(name, "cuCtxGetCurrent") == 0) *found = (void *)get_current;
    else if (strcmp(name, "cuCtxSetCurrent") == 0) *found = (void *)set_current;
    else if (strcmp(name, "cuMemcpyBatchAsync") == 0 && !single) *found = (void *)copy_batch;
    else *result = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t emulated_allocate(void **memory, size_t size) {
    *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(*memory, 0xA5, size);
    return cudaSuccess;
}
cudaError_t cudaFree(void *memory) { return free(memory), cudaSuccess; }
cudaError_t cudaFreeHost(void *memory) { return free(memory), cudaSuccess; }

cudaError_t cudaHostRegister(void *memory, size_t size, unsigned) {
    LOCKED;
    return registered.emplace((uintptr_t)memory, size).second ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaHostUnregister(void *memory) {
    LOCKED;
    return registered.erase((uintptr_t)memory) == 1 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaHostGetDevicePointer(void **seen, void *memory, unsigned) { return *seen = memory, cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *memory) {
    *attributes = {cudaMemoryTypeHost, 0, (void *)memory, (void *)memory};
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    LOCKED;
    *stream = new EmulatedStream;
    streams.push_back(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    LOCKED;
    run_until([&] { return stream->queue.empty(); });
    for (size_t i = 0; i < streams.size(); ++i)
        if (streams[i] == stream) streams.erase(streams.begin() + ptrdiff_t(i--));
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    LOCKED;
    EmulatedStream &asked = real(stream);
    run_until([&] { return asked.queue.empty(); });
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    LOCKED;
    real(stream).queue.push_back({nullptr, event, event->recorded});
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = new EmulatedEvent, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    LOCKED;
    run_until([&] { return event->reached >= event->recorded; });
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    LOCKED;
    const uint64_t generation = ++event->recorded;
    real(stream).queue.push_back({[=] { event->reached = std::max(event->reached, generation); }});
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
    LOCKED;
    return *milliseconds = 1.0f + float(chance() % 100), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    LOCKED;
    real(stream).queue.push_back({[=] { memcpy(target, source, size); }});
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
    LOCKED;
    real(stream).queue.push_back({[=] { memset(memory, value, size); }});
    return cudaSuccess;
}
