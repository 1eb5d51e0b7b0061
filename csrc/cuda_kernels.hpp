// Launches of the CUDA backend's kernels. Each returns at once, with what the runtime said of the launch.
#ifndef WARMROUTE_CUDA_KERNELS_HPP
#define WARMROUTE_CUDA_KERNELS_HPP

#include <cuda_runtime_api.h>

#include "core/codec_layout.hpp"
#include "cuda_pages.hpp"

namespace wr {
namespace cuda {

struct Codes;

constexpr int32_t kMaxPairs = 256; // of a rotation

struct Factors {
    double cosines[kMaxPairs], sines[kMaxPairs];
    int32_t count;
};

// Where a launch runs: on at most so many thread blocks.
struct Launch {
    int32_t blocks;
    cudaStream_t stream;
};

// Raw content, in vectors of `width` bytes: 16, 8, 4, 2 or 1. `sums`, if not null, needs 16 or 8: a zeroed word per page.
cudaError_t launch_copy(const Pages &pages, uint32_t width, bool gather, uint64_t *sums, const Launch &on);

// Packed form to cache with a rotation, or a rotation in place. `width` is 16 or the element's size.
cudaError_t launch_turn(const Pages &pages, const Turn &turn, const Factors &factors, int32_t dtype, uint32_t width,
                        bool in_place, uint64_t *sums, const Launch &on);

// Add the checksums of packed pages of so many bytes to `sums`.
cudaError_t launch_sum(const Pages &pages, uint64_t bytes, uint64_t *sums, const Launch &on);

// The same of one run of bytes, to one word; its length is mixed in by `publish_sum`.
cudaError_t launch_sum_bytes(uint64_t address, uint64_t bytes, uint64_t *sum, const Launch &on);

// Store finished sums where the caller wants them: at `given`, in the order that the rows say.
cudaError_t launch_publish(const Pages &pages, uint64_t bytes, const uint64_t *sums, uint64_t given, const Launch &on);

// One launch after another for what an encoding is made of. `wide`: all content lies on boundaries of 16 bytes.
cudaError_t launch_codes(const Pages &pages, const Codes &codes, bool wide, bool encode, const Launch &on);


}  // namespace cuda
}  // namespace wr

#endif
