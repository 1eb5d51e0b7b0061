#define WR_KERNELS AVX512_KERNELS
#define WR_KERNELS_TEXT "AVX-512"
#include "cpu_isa.hpp"
