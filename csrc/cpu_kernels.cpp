// Choosing among the instruction sets that the core was compiled for.
#include "cpu_kernels.hpp"

#include <initializer_list>
#if defined(WR_WITH_X86)
#include <cpuid.h>
#endif
#if defined(WR_WITH_NEON)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace wr {

extern const Kernels PORTABLE_KERNELS;

#if defined(WR_WITH_X86)
extern const Kernels AVX2_KERNELS, AVX512_KERNELS;

// Which GCC before 11 and Clang before 18 do not know by name. AVX2 says that the system keeps the registers.
static bool has_f16c() {
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// Besides the vectors themselves, the tables are compiled for what every processor with them has.
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           has_f16c() && __builtin_cpu_supports("sse4.2");
}

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(WR_WITH_NEON)
extern const Kernels NEON_KERNELS;
#endif

const Kernels *kernels_of(int32_t isa) {
    switch (isa) {
        case WR_ISA_PORTABLE: return &PORTABLE_KERNELS;
#if defined(WR_WITH_X86)
        case WR_ISA_AVX2: return has_avx2() ? &AVX2_KERNELS : nullptr;
        case WR_ISA_AVX512: return has_avx512() ? &AVX512_KERNELS : nullptr;
#endif
#if defined(WR_WITH_NEON)
        case WR_ISA_NEON: return (getauxval(AT_HWCAP) & HWCAP_CRC32) ? &NEON_KERNELS : nullptr;
#endif
        case WR_ISA_BEST:
            for (int32_t each : {WR_ISA_AVX512, WR_ISA_AVX2, WR_ISA_NEON})
                if (const Kernels *kernels = kernels_of(each)) return kernels;
            return &PORTABLE_KERNELS;
        default: return nullptr;
    }
}

const Kernels &best_kernels() {
    static const Kernels *const best = kernels_of(WR_ISA_BEST);
    return *best;
}

}  // namespace wr
