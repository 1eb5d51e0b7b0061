#define WR_KERNELS PORTABLE_KERNELS
#define WR_KERNELS_TEXT "portable"
#include "cpu_isa.hpp"
