// A context of the CPU backend: its threads, and scratch memory of the call under way.
#ifndef WARMROUTE_CPU_CONTEXT_HPP
#define WARMROUTE_CPU_CONTEXT_HPP

#include <atomic>
#include <vector>

#include "core/check.hpp"
#include "cpu_kernels.hpp"
#include "pool.hpp"

struct wr_context {
    const wr::Kernels *kernels;
    wr::Helpers helpers;
    pid_t process;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    wr::Reason reason{};
    std::vector<float> factors;   // of a rotation
    std::vector<int64_t> starts;  // of spans or copies

    wr_context(const wr::Kernels *chosen, int threads) : kernels(chosen), helpers(threads), process(getpid()) {}
};

namespace wr {

constexpr int64_t PIECE = 256 << 10;  // bytes that one thread takes at a time; less than two of them are not shared
constexpr int64_t STREAMED = 2 << 20;  // more than this is not left in the caches

}  // namespace wr

#endif
