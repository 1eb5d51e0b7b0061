// Kernels that encode and decode.
#include "cuda_codes.hpp"
#include "cuda_start.hpp"

namespace wr {
namespace cuda {

namespace {

template <int kType, bool kWide, bool kEncode>
__global__ void __launch_bounds__(kThreads)
    code_tokens(const __grid_constant__ Pages pages, const __grid_constant__ Codes codes, uint32_t first_half,
                uint32_t halves) {
#if defined(WR_ON_DEVICE)
    token_body<kType, kWide, kEncode>(pages, codes, this_thread(), first_half, halves);
#endif
}

template <int kType, bool kWide, bool kEncode>
__global__ void __launch_bounds__(kThreads)
    code_channels(const __grid_constant__ Pages pages, const __grid_constant__ Codes codes) {
#if defined(WR_ON_DEVICE)
    channel_body<kType, kWide, kEncode>(pages, codes, this_thread());
#endif
}

template <bool kWide, bool kEncode>
__global__ void __launch_bounds__(kThreads)
    code_tiles(const __grid_constant__ Pages pages, const __grid_constant__ Codes codes) {
#if defined(WR_ON_DEVICE)
    __shared__ TileWork works[kThreads / kLanes];
    tile_body<kWide, kEncode>(pages, codes, this_thread(), works);
#endif
}

// The halves whose tokens have items: K and V, or one of them.
void halves_of(const Codes &codes, uint32_t &first, uint32_t &count) {
    const bool keys = codes.shape.k_bytes != 0 && codes.encoding != WR_INT8, values = codes.shape.v_bytes != 0;
    first = keys ? 0 : 1;
    count = static_cast<uint32_t>(keys) + static_cast<uint32_t>(values);
}

template <int kType, bool kWide, bool kEncode>
cudaError_t scaled(const Pages &pages, const Codes &codes, const Launch &on) {
    uint32_t first, halves;
    halves_of(codes, first, halves);
    if (halves != 0) {
        const uint64_t items = uint64_t{pages.total} * halves * static_cast<uint32_t>(codes.shape.tokens);
        start(code_tokens<kType, kWide, kEncode>, blocks_for(items, on), on, pages, codes, first, halves);
    }
    if (codes.encoding == WR_INT8 && codes.shape.k_bytes != 0) {
        const uint64_t items = uint64_t{pages.total} * static_cast<uint32_t>((k_half(codes.shape).width + 7) / 8);
        start(code_channels<kType, kWide, kEncode>, blocks_for(items, on), on, pages, codes);
    }
    return cudaGetLastError();
}

template <bool kWide, bool kEncode>
cudaError_t tiled(const Pages &pages, const Codes &codes, const Launch &on) {
    const uint64_t items = uint64_t{pages.total} * tiles_of(codes);
    start(code_tiles<kWide, kEncode>, blocks_for(items * kLanes, on), on, pages, codes);
    return cudaGetLastError();
}

template <bool kWide, bool kEncode>
cudaError_t launch_as(const Pages &pages, const Codes &codes, const Launch &on) {
    if (codes.encoding == WR_EXP12) return tiled<kWide, kEncode>(pages, codes, on);
    switch (codes.shape.dtype) {
        case WR_F32: return scaled<WR_F32, kWide, kEncode>(pages, codes, on);
        case WR_F16: return scaled<WR_F16, kWide, kEncode>(pages, codes, on);
        case WR_BF16: return scaled<WR_BF16, kWide, kEncode>(pages, codes, on);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t launch_codes(const Pages &pages, const Codes &codes, bool wide, bool encode, const Launch &on) {
    if (wide) return encode ? launch_as<true, true>(pages, codes, on) : launch_as<true, false>(pages, codes, on);
    return encode ? launch_as<false, true>(pages, codes, on) : launch_as<false, false>(pages, codes, on);
}

namespace {

template <int kType> cudaError_t preload_scaled() {
    const cudaError_t errors[] = {
        preload(code_tokens<kType, true, true>),
        preload(code_tokens<kType, true, false>),
        preload(code_channels<kType, true, true>),
        preload(code_channels<kType, true, false>),
    };
    for (const cudaError_t error : errors)
        if (error != cudaSuccess) return error;
    return cudaSuccess;
}

}  // namespace

cudaError_t preload_codes() {
    const cudaError_t errors[] = {
        preload_scaled<WR_F16>(),
        preload_scaled<WR_BF16>(),
        preload(code_tiles<true, true>),
        preload(code_tiles<true, false>),
    };
    for (const cudaError_t error : errors)
        if (error != cudaSuccess) return error;
    return cudaSuccess;
}

}  // namespace cuda
}  // namespace wr
