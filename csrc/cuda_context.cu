// The driver, opening and closing contexts, and waiting.
#include "cuda_context.hpp"

#include <ctype.h>
#include <sched.h>
#include <time.h>

namespace wr {
namespace cuda {

namespace {

template <typename F> bool find(F &function, const char *name, unsigned version) {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess && found != nullptr;
    if (error != cudaSuccess) cudaGetLastError();
    function = there ? reinterpret_cast<F>(found) : nullptr;
    return there;
}

Driver find_driver() {
    Driver driver{};
    const cudaError_t error = cudaGetDeviceCount(&driver.devices);
    if (error != cudaSuccess || driver.devices == 0) {
        cudaGetLastError();
        driver.devices = 0;
        cudaDriverGetVersion(&driver.version);
        const char *why = error == cudaSuccess ? "no GPU" : cudaGetErrorString(error);
        snprintf(driver.problem, sizeof driver.problem,
                 "there is no usable GPU: %s (driver: CUDA %d.%d, 0.0 if none; needed: %d.%d); see nvidia-smi", why,
                 driver.version / 1000, driver.version % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
        return driver;
    }
    cudaDriverGetVersion(&driver.version);
    if (!find(driver.current, "cuCtxGetCurrent", 4000) || !find(driver.make_current, "cuCtxSetCurrent", 4000)) {
        driver.devices = 0;
        snprintf(driver.problem, sizeof driver.problem, "the CUDA driver lacks cuCtxGetCurrent or cuCtxSetCurrent");
        return driver;
    }
    find(driver.copy_batch, "cuMemcpyBatchAsync", 12080);
    return driver;
}

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Most waits are shorter than a microsecond or longer than fifty.
template <typename Query> int32_t poll(wr_context &context, int seconds, Query query) {
    const double deadline = now() + seconds;
    for (int turn = 0;; ++turn) {
        const cudaError_t error = query();
        if (error != cudaErrorNotReady) return checked(context, error, "waiting for the GPU");
        cudaGetLastError();
        if (turn < 200) {
            sched_yield();
            continue;
        }
        if (now() > deadline)
            return refuse(context.reason, WR_DEVICE, "the GPU has not finished within %d seconds", seconds);
        const timespec pause{0, 20000};
        nanosleep(&pause, nullptr);
    }
}

int32_t node_of(int device) {
    char bus[32] = {}, path[96];
    if (cudaDeviceGetPCIBusId(bus, sizeof bus, device) != cudaSuccess) {
        cudaGetLastError();
        return -1;
    }
    for (char *at = bus; *at != 0; ++at) *at = static_cast<char>(tolower(*at));
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/numa_node", bus);
    FILE *file = fopen(path, "r");
    int node = -1;
    if (file != nullptr) {
        if (fscanf(file, "%d", &node) != 1) node = -1;
        fclose(file);
    }
    return node;
}

int32_t describe_device(wr_context &context) {
    cudaDeviceProp properties;
    WR_CHECKED(context, cudaGetDeviceProperties(&properties, context.device), "asking for the GPU's properties");
    snprintf(context.name, sizeof context.name, "%.90s", properties.name);
    context.major = properties.major;
    context.minor = properties.minor;
    context.processors = properties.multiProcessorCount;
    context.node = node_of(context.device);
    if (context.major < 8)
        return refuse(context.reason, WR_UNSUPPORTED, "%s has compute capability %d.%d; 8.0 is the least", context.name,
                      context.major, context.minor);
    return WR_OK;
}

int32_t check_kernels(wr_context &context) {
    cudaError_t error = preload_moves();
    if (error == cudaSuccess) error = preload_codes();
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
        cudaGetLastError();
        return refuse(context.reason, WR_UNSUPPORTED, "this build has no kernels for %s (sm_%d%d): %s", context.name,
                      context.major, context.minor, cudaGetErrorString(error));
    }
    return checked(context, error, "loading the kernels");
}

int32_t take_memory(wr_context &context) {
    int least = 0, greatest = 0;
    WR_CHECKED(context, cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities");
    WR_CHECKED(context, cudaStreamCreateWithPriority(&context.side, cudaStreamNonBlocking, greatest), "making a stream");
    cudaEvent_t *events[] = {&context.begun,          &context.done,
                             &context.slots[0].filled, &context.slots[0].drained,
                             &context.slots[1].filled, &context.slots[1].drained};
    for (cudaEvent_t *event : events)
        WR_CHECKED(context, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "making an event");
    for (Slot &slot : context.slots)
        WR_CHECKED(context, cudaMalloc(&slot.memory, kSlotBytes), "taking staging memory of the GPU");
    WR_CHECKED(context, cudaMalloc(&context.sums, sizeof(uint64_t) * kMaxRows * kMaxLayers), "taking memory of the GPU");
    WR_CHECKED(context, cudaHostAlloc(&context.shared, sizeof(Shared), cudaHostAllocMapped | cudaHostAllocPortable),
               "taking page-locked memory");
    *context.shared = Shared{};
    WR_CHECKED(context,
               cudaHostGetDevicePointer(reinterpret_cast<void **>(&context.shared_device), context.shared, 0),
               "mapping page-locked memory");
    return WR_OK;
}

}  // namespace

const Driver &driver() {
    static const Driver found = find_driver();
    return found;
}

int32_t open(const wr_options &options, wr_context &context) {
    Reason &reason = context.reason;
    if (driver().devices == 0) return refuse(reason, WR_DEVICE, "%s", driver().problem);
    if (options.device < 0 || options.device >= driver().devices)
        return refuse(reason, WR_INVALID, "GPU %d of %d", options.device, driver().devices);
    if (options.threads < 0 || options.threads > 65535)
        return refuse(reason, WR_INVALID, "%d thread blocks", options.threads);
    if (options.path < WR_AUTO || options.path > WR_STAGED) return refuse(reason, WR_INVALID, "path %d", options.path);
    context.device = options.device;
    context.path = options.path;
    context.blocks = options.threads != 0 ? options.threads : kDefaultBlocks;
    context.process = getpid();
    CUcontext before = nullptr;
    driver().current(&before);
    int32_t status = checked(context, cudaSetDevice(options.device), "making the GPU current");
    if (status == WR_OK) status = checked(context, cudaFree(nullptr), "starting on the GPU");
    if (status == WR_OK && driver().current(&context.primary) != CUDA_SUCCESS)
        status = refuse(reason, WR_DEVICE, "the GPU has no current context");
    if (status == WR_OK) {
        const Current current(context.primary);
        status = describe_device(context);
        if (status == WR_OK) status = check_kernels(context);
        if (status == WR_OK) status = take_memory(context);
    }
    driver().make_current(before);
    return status;
}

void close(wr_context &context) {
    // CUDA does not work in a child of fork(), and what is there belongs to the parent.
    if (context.primary == nullptr || context.process != getpid()) return;
    const Current current(context.primary);
    bool idle = true;
    if (context.done != nullptr) idle = wait_for(context, context.done, kCloseSeconds) == WR_OK;
    if (context.side != nullptr && idle) idle = wait_for_stream(context, context.side, kCloseSeconds) == WR_OK;
    // Memory that a hung GPU may still write to stays taken.
    if (!idle) return;
    for (Slot &slot : context.slots) {
        if (slot.memory != nullptr) cudaFree(slot.memory);
        if (slot.filled != nullptr) cudaEventDestroy(slot.filled);
        if (slot.drained != nullptr) cudaEventDestroy(slot.drained);
    }
    if (context.sums != nullptr) cudaFree(context.sums);
    if (context.shared != nullptr) cudaFreeHost(context.shared);
    if (context.begun != nullptr) cudaEventDestroy(context.begun);
    if (context.done != nullptr) cudaEventDestroy(context.done);
    if (context.side != nullptr) cudaStreamDestroy(context.side);
    cudaGetLastError();
}

int32_t wait_for(wr_context &context, cudaEvent_t event, int seconds) {
    return poll(context, seconds, [&] { return cudaEventQuery(event); });
}

int32_t wait_for_stream(wr_context &context, cudaStream_t stream, int seconds) {
    return poll(context, seconds, [&] { return cudaStreamQuery(stream); });
}

int32_t check_stream(wr_context &context, void *stream) {
    if (stream == nullptr || stream == static_cast<void *>(cudaStreamLegacy))
        return refuse(context.reason, WR_INVALID,
                      "the default stream cannot be used: batched copies refuse it, and it waits for all others; give a "
                      "stream of your own");
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    WR_CHECKED(context, cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing), "asking for the stream");
    if (capturing != cudaStreamCaptureStatusNone)
        return refuse(context.reason, WR_INVALID, "the stream captures a graph; transfers cannot be part of one");
    return WR_OK;
}

int32_t resolve(wr_context &context, uint64_t address, uint64_t size, const char *what, uint64_t &device_address,
                bool &on_device) {
    on_device = false;
    if (in_slab(address, size, device_address)) return WR_OK;
    cudaPointerAttributes first{}, last{};
    const uint64_t end = address + (size > 0 ? size - 1 : 0);
    WR_CHECKED(context, cudaPointerGetAttributes(&first, reinterpret_cast<const void *>(address)), what);
    WR_CHECKED(context, cudaPointerGetAttributes(&last, reinterpret_cast<const void *>(end)), what);
    if (first.devicePointer == nullptr || last.devicePointer == nullptr || first.type == cudaMemoryTypeUnregistered ||
        last.type == cudaMemoryTypeUnregistered)
        return refuse(context.reason, WR_INVALID,
                      "%s at 0x%llx, %llu bytes, is neither GPU memory nor page-locked: use wr_slab_alloc, "
                      "cudaHostRegister or pinned tensors",
                      what, static_cast<unsigned long long>(address), static_cast<unsigned long long>(size));
    if (first.type == cudaMemoryTypeDevice && first.device != context.device)
        return refuse(context.reason, WR_INVALID, "%s is memory of GPU %d, this context is for GPU %d", what, first.device,
                      context.device);
    device_address = reinterpret_cast<uint64_t>(first.devicePointer);
    if (reinterpret_cast<uint64_t>(last.devicePointer) - device_address != end - address)
        return refuse(context.reason, WR_UNSUPPORTED, "%s lies in two registrations that the GPU sees apart", what);
    on_device = first.type == cudaMemoryTypeDevice;
    return WR_OK;
}

}  // namespace cuda
}  // namespace wr
