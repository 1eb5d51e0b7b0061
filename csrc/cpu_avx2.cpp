#define WR_KERNELS AVX2_KERNELS
#define WR_KERNELS_TEXT "AVX2"
#include "cpu_isa.hpp"
