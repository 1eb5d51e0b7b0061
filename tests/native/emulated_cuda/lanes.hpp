// A device's accesses and warps: memory that is not aligned as a GPU needs it ends the process.
#pragma once

#include <string.h>

#include "cuda_runtime_api.h"

namespace wr {
namespace cuda {

template <typename V> static inline V load_once(const V *at) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) emulated_fault("misaligned load", at);
    V value;
    memcpy(&value, at, sizeof(V));
    return value;
}
template <typename V> static inline void store_once(V *at, V value) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) emulated_fault("misaligned store", at);
    memcpy(at, &value, sizeof(V));
}
static inline void count_one(uint32_t *at) { ++*at; }
static inline void add_atomic(uint64_t *at, uint64_t value) { *at += value; }
static inline void warp_sync() { emulated_warp(WarpOp::sync, 0, 0); }
static inline bool warp_all(bool value) { return emulated_warp(WarpOp::all, value, 0) != 0; }
static inline uint32_t warp_max(uint32_t value) { return uint32_t(emulated_warp(WarpOp::max, value, 0)); }
static inline uint32_t warp_take(uint32_t value, uint32_t lane) { return uint32_t(emulated_warp(WarpOp::take, value, lane)); }
static inline uint32_t warp_up(uint32_t value, uint32_t by) { return uint32_t(emulated_warp(WarpOp::up, value, by)); }
static inline uint64_t warp_xor(uint64_t value, uint32_t by) { return emulated_warp(WarpOp::exchange, value, by); }

struct Launch;

template <typename... Parameters, typename On, typename... Arguments>
static void start(void (*kernel)(Parameters...), uint32_t blocks, const On &on, const Arguments &...arguments) {
    emulated_launch(on.stream, blocks, kThreads,
                    [kernel, held = std::tuple<std::decay_t<Parameters>...>(arguments...)] { std::apply(kernel, held); });
}

template <typename... Parameters> static cudaError_t preload(void (*)(Parameters...)) { return cudaSuccess; }

}  // namespace cuda
}  // namespace wr
