// Starting kernels: one block size for all, and no more blocks than there is work.
#ifndef WARMROUTE_CUDA_START_HPP
#define WARMROUTE_CUDA_START_HPP

#include "cuda_kernels.hpp"
#include "cuda_lanes.hpp"

namespace wr {
namespace cuda {

static inline uint32_t blocks_for(uint64_t threads, const Launch &on) {
    const uint64_t wanted = (threads + kThreads - 1) / kThreads, most = static_cast<uint64_t>(on.blocks);
    return static_cast<uint32_t>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

#if defined(__CUDACC__)

template <typename... Parameters, typename... Arguments>
static void start(void (*kernel)(Parameters...), uint32_t blocks, const Launch &on, const Arguments &...arguments) {
    kernel<<<blocks, kThreads, 0, on.stream>>>(arguments...);
}

template <typename... Parameters> static cudaError_t preload(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernel));
}

#endif

}  // namespace cuda
}  // namespace wr

#endif
