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
    uint64_t string_from;
    wr::Helpers helpers;
    pid_t process;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    wr::Reason reason{};
    std::vector<float> factors;   // of a rotation
    std::vector<int64_t> starts;  // of spans or copies

    wr_context(const wr::Kernels *chosen, uint64_t string_copies, int threads)
        : kernels(chosen), string_from(string_copies), helpers(threads), process(getpid()) {}
};

namespace wr {

constexpr int64_t PIECE = 256 << 10;  // bytes that one thread takes at a time; less than two of them are not shared

}  // namespace wr

#endif
