// Kernels that copy, rotate and sum.
#include "cuda_moves.hpp"
#include "cuda_start.hpp"

namespace wr {
namespace cuda {

namespace {

template <typename V, bool kGather, bool kSums>
__global__ void __launch_bounds__(kThreads) copy_pages(const __grid_constant__ Pages pages, uint64_t *sums) {
#if defined(WR_ON_DEVICE)
    copy_body<V, kGather, kSums>(pages, this_thread(), sums);
#endif
}

template <int kType, typename V, bool kInPlace, bool kSums>
__global__ void __launch_bounds__(kThreads)
    turn_pages(const __grid_constant__ Pages pages, const __grid_constant__ Factors factors, const Turn turn,
               uint64_t *sums) {
#if defined(WR_ON_DEVICE)
    typedef typename ElementOf<kType>::Wide Wide;
    __shared__ Wide cosines[kMaxPairs], sines[kMaxPairs];
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < factors.count; i += static_cast<int32_t>(blockDim.x)) {
        cosines[i] = static_cast<Wide>(factors.cosines[i]);
        sines[i] = static_cast<Wide>(factors.sines[i]);
    }
    __syncthreads();
    turn_body<kType, V, kInPlace, kSums>(pages, turn, this_thread(), cosines, sines, sums);
#endif
}

__global__ void __launch_bounds__(kThreads) sum_pages(const __grid_constant__ Pages pages, uint64_t bytes, uint32_t parts,
                                                      uint64_t *sums) {
#if defined(WR_ON_DEVICE)
    sum_body(pages, this_thread(), bytes, parts, sums);
#endif
}

__global__ void __launch_bounds__(kThreads) sum_bytes(uint64_t address, uint64_t bytes, uint64_t parts, uint64_t *sum) {
#if defined(WR_ON_DEVICE)
    const Thread at = this_thread();
    const uint32_t warps = at.threads / kLanes;
    for (uint64_t part = at.block * warps + at.thread / kLanes; part < parts; part += at.blocks * warps)
        sum_part(address, bytes, part, 0, sum, at.thread % kLanes);
#endif
}

__global__ void __launch_bounds__(kThreads)
    publish_sums(const __grid_constant__ Pages pages, uint64_t bytes, const uint64_t *sums, uint64_t given) {
#if defined(WR_ON_DEVICE)
    publish_body(pages, this_thread(), bytes, sums, given);
#endif
}

template <typename V> cudaError_t copy_with(const Pages &pages, bool gather, const Launch &on) {
    const uint32_t blocks = blocks_for((pages.total + kInFlight - 1) / kInFlight, on);
    if (gather) start(copy_pages<V, true, false>, blocks, on, pages, nullptr);
    else start(copy_pages<V, false, false>, blocks, on, pages, nullptr);
    return cudaGetLastError();
}

template <typename V> cudaError_t copy_and_sum(const Pages &pages, bool gather, uint64_t *sums, const Launch &on) {
    const uint32_t blocks = blocks_for((pages.total + kInFlight - 1) / kInFlight, on);
    if (gather) start(copy_pages<V, true, true>, blocks, on, pages, sums);
    else start(copy_pages<V, false, true>, blocks, on, pages, sums);
    return cudaGetLastError();
}

struct Turning {
    const Pages &pages;
    const Turn &turn;
    const Factors &factors;
    bool in_place;
    uint64_t *sums;
    const Launch &on;
};

template <int kType, typename V> cudaError_t turn_with(const Turning &work) {
    const Launch &on = work.on;
    const uint32_t blocks = blocks_for((work.pages.total + kInFlight - 1) / kInFlight, on);
    if (work.in_place)
        start(turn_pages<kType, V, true, false>, blocks, on, work.pages, work.factors, work.turn, nullptr);
    else if (work.sums == nullptr)
        start(turn_pages<kType, V, false, false>, blocks, on, work.pages, work.factors, work.turn, nullptr);
    else if constexpr (sizeof(V) >= 8)
        start(turn_pages<kType, V, false, true>, blocks, on, work.pages, work.factors, work.turn, work.sums);
    else return cudaErrorInvalidValue;
    return cudaGetLastError();
}

template <int kType> cudaError_t turn_as(const Turning &work, uint32_t width) {
    return width == 16 ? turn_with<kType, Word128>(work) : turn_with<kType, typename ElementOf<kType>::Bits>(work);
}

}  // namespace

cudaError_t launch_copy(const Pages &pages, uint32_t width, bool gather, uint64_t *sums, const Launch &on) {
    if (sums != nullptr) {
        if (width == 16) return copy_and_sum<Word128>(pages, gather, sums, on);
        return width == 8 ? copy_and_sum<Word64>(pages, gather, sums, on) : cudaErrorInvalidValue;
    }
    switch (width) {
        case 16: return copy_with<Word128>(pages, gather, on);
        case 8: return copy_with<Word64>(pages, gather, on);
        case 4: return copy_with<uint32_t>(pages, gather, on);
        case 2: return copy_with<uint16_t>(pages, gather, on);
        default: return copy_with<uint8_t>(pages, gather, on);
    }
}

cudaError_t launch_turn(const Pages &pages, const Turn &turn, const Factors &factors, int32_t dtype, uint32_t width,
                        bool in_place, uint64_t *sums, const Launch &on) {
    const Turning work{pages, turn, factors, in_place, sums, on};
    switch (dtype) {
        case WR_F32: return turn_as<WR_F32>(work, width);
        case WR_F16: return turn_as<WR_F16>(work, width);
        case WR_BF16: return turn_as<WR_BF16>(work, width);
        case WR_F64: return turn_as<WR_F64>(work, width);
        default: return cudaErrorInvalidValue;
    }
}

cudaError_t launch_sum(const Pages &pages, uint64_t bytes, uint64_t *sums, const Launch &on) {
    const uint64_t parts = (bytes + kSumPart - 1) / kSumPart, pages_here = uint64_t{pages.layer_count} * pages.rows_of_layer.value;
    const uint32_t blocks = blocks_for(pages_here * parts * kLanes, on);
    start(sum_pages, blocks, on, pages, bytes, static_cast<uint32_t>(parts), sums);
    return cudaGetLastError();
}

cudaError_t launch_sum_bytes(uint64_t address, uint64_t bytes, uint64_t *sum, const Launch &on) {
    const uint64_t parts = (bytes + kSumPart - 1) / kSumPart;
    if (parts == 0) return cudaSuccess;
    start(sum_bytes, blocks_for(parts * kLanes, on), on, address, bytes, parts, sum);
    return cudaGetLastError();
}

cudaError_t launch_publish(const Pages &pages, uint64_t bytes, const uint64_t *sums, uint64_t given, const Launch &on) {
    const uint32_t blocks = blocks_for(uint64_t{pages.layer_count} * pages.rows_of_layer.value, on);
    start(publish_sums, blocks, on, pages, bytes, sums, given);
    return cudaGetLastError();
}

namespace {

template <typename V> cudaError_t preload_copies() {
    const cudaError_t error = preload(copy_pages<V, true, false>);
    return error == cudaSuccess ? preload(copy_pages<V, false, false>) : error;
}

template <int kType> cudaError_t preload_turns() {
    const cudaError_t errors[] = {
        preload(turn_pages<kType, Word128, true, false>),
        preload(turn_pages<kType, Word128, false, false>),
        preload(turn_pages<kType, Word128, false, true>),
    };
    for (const cudaError_t error : errors)
        if (error != cudaSuccess) return error;
    return cudaSuccess;
}

}  // namespace

// With lazy loading, a kernel's first launch would wait for the whole device: what transfers use is loaded at once.
cudaError_t preload_moves() {
    const cudaError_t errors[] = {
        preload_copies<Word128>(),
        preload_copies<Word64>(),
        preload_copies<uint32_t>(),
        preload_copies<uint16_t>(),
        preload_copies<uint8_t>(),
        preload(copy_pages<Word128, true, true>),
        preload(copy_pages<Word128, false, true>),
        preload(copy_pages<Word64, true, true>),
        preload(copy_pages<Word64, false, true>),
        preload_turns<WR_F32>(),
        preload_turns<WR_F16>(),
        preload_turns<WR_BF16>(),
        preload(sum_pages),
        preload(sum_bytes),
        preload(publish_sums),
    };
    for (const cudaError_t error : errors)
        if (error != cudaSuccess) return error;
    return cudaSuccess;
}

}  // namespace cuda
}  // namespace wr
