#define WR_KERNELS NEON_KERNELS
#define WR_KERNELS_TEXT "NEON"
#include "cpu_isa.hpp"
