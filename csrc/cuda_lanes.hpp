// What the kernels' bodies need of a GPU: streaming accesses, atomics, and operations of a warp. With WR_EMULATED, which
// names a header that has the same for the host, all of the backend runs in tests on machines without a GPU.
#ifndef WARMROUTE_CUDA_LANES_HPP
#define WARMROUTE_CUDA_LANES_HPP

#include "cuda_pages.hpp"

// What only a device can run, or an emulation of one.
#if defined(__CUDA_ARCH__) || defined(WR_EMULATED)
#define WR_ON_DEVICE
#endif

namespace wr {
namespace cuda {

constexpr uint32_t kLanes = 32;

// A thread's place in its launch.
struct Thread {
    uint32_t block, blocks, thread, threads;
};

#if defined(__CUDA_ARCH__)

static __device__ __forceinline__ Word128 load_once(const Word128 *at) {
    const uint4 taken = __ldcs(reinterpret_cast<const uint4 *>(at));
    return {taken.x, taken.y, taken.z, taken.w};
}
static __device__ __forceinline__ Word64 load_once(const Word64 *at) {
    const uint2 taken = __ldcs(reinterpret_cast<const uint2 *>(at));
    return {taken.x, taken.y};
}
static __device__ __forceinline__ uint32_t load_once(const uint32_t *at) { return __ldcs(at); }
static __device__ __forceinline__ uint16_t load_once(const uint16_t *at) { return __ldcs(at); }
static __device__ __forceinline__ uint8_t load_once(const uint8_t *at) { return __ldcs(at); }

static __device__ __forceinline__ void store_once(Word128 *at, Word128 value) {
    __stcs(reinterpret_cast<uint4 *>(at), make_uint4(value.x, value.y, value.z, value.w));
}
static __device__ __forceinline__ void store_once(Word64 *at, Word64 value) {
    __stcs(reinterpret_cast<uint2 *>(at), make_uint2(value.x, value.y));
}
static __device__ __forceinline__ void store_once(uint32_t *at, uint32_t value) { __stcs(at, value); }
static __device__ __forceinline__ void store_once(uint16_t *at, uint16_t value) { __stcs(at, value); }
static __device__ __forceinline__ void store_once(uint8_t *at, uint8_t value) { __stcs(at, value); }

static __device__ __forceinline__ void count_one(uint32_t *at) { atomicAdd(at, 1u); }
static __device__ __forceinline__ void add_atomic(uint64_t *at, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long *>(at), static_cast<unsigned long long>(value));
}
static __device__ __forceinline__ void warp_sync() { __syncwarp(); }
static __device__ __forceinline__ bool warp_all(bool value) { return __all_sync(0xFFFFFFFFu, value) != 0; }
static __device__ __forceinline__ uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xFFFFFFFFu, value); }
static __device__ __forceinline__ uint32_t warp_take(uint32_t value, uint32_t lane) {
    return __shfl_sync(0xFFFFFFFFu, value, static_cast<int>(lane));
}
static __device__ __forceinline__ uint32_t warp_up(uint32_t value, uint32_t distance) {
    return __shfl_up_sync(0xFFFFFFFFu, value, distance);
}
static __device__ __forceinline__ uint64_t warp_xor(uint64_t value, uint32_t lanes) {
    return __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(value), static_cast<int>(lanes));
}

#elif defined(WR_EMULATED)

}  // namespace cuda
}  // namespace wr
#include WR_EMULATED
namespace wr {
namespace cuda {

#else

// Never called: the host part of a kernel's compilation only has to name them.
template <typename V> static inline V load_once(const V *) { return V{}; }
template <typename V> static inline void store_once(V *, V) {}
static inline void count_one(uint32_t *) {}
static inline void add_atomic(uint64_t *, uint64_t) {}
static inline void warp_sync() {}
static inline bool warp_all(bool value) { return value; }
static inline uint32_t warp_max(uint32_t value) { return value; }
static inline uint32_t warp_take(uint32_t value, uint32_t) { return value; }
static inline uint32_t warp_up(uint32_t value, uint32_t) { return value; }
static inline uint64_t warp_xor(uint64_t value, uint32_t) { return value; }

#endif

// Bodies call what only a device has, or an emulation of one.
#if defined(__CUDACC__)
#define WR_BODY static __device__ __forceinline__
#else
#define WR_BODY static inline
#endif

#if defined(WR_ON_DEVICE)
WR_BODY Thread this_thread() { return {blockIdx.x, gridDim.x, threadIdx.x, blockDim.x}; }
#endif

template <typename V> WR_BODY V load_at(uint64_t address) { return load_once(reinterpret_cast<const V *>(address)); }
template <typename V> WR_BODY void store_at(uint64_t address, V value) {
    store_once(reinterpret_cast<V *>(address), value);
}

// Add to a page's sum. All lanes of a warp call it together; those with nothing to add add 0.
WR_BODY void add_sum(uint64_t *sums, uint32_t page, uint64_t value, uint32_t lane) {
    if (warp_all(page == warp_take(page, 0))) {
        for (uint32_t distance = kLanes / 2; distance > 0; distance /= 2) value += warp_xor(value, distance);
        if (lane == 0) add_atomic(sums + page, value);
    } else if (value != 0) {
        add_atomic(sums + page, value);
    }
}

// The sum of the values of all lower lanes, and of all lanes.
WR_BODY uint32_t warp_sum_before(uint32_t value, uint32_t lane, uint32_t &all) {
    uint32_t sum = value;
    for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
        const uint32_t below = warp_up(sum, distance);
        if (lane >= distance) sum += below;
    }
    all = warp_take(sum, kLanes - 1);
    return sum - value;
}

}  // namespace cuda
}  // namespace wr

#endif
