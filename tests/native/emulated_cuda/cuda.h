// The part of the driver's interface that the backend uses.
#pragma once

#include "cuda_runtime_api.h"

typedef struct EmulatedContext *CUcontext;
typedef uint64_t CUdeviceptr;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_NOT_SUPPORTED = 801 };
enum CUmemcpySrcAccessOrder { CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1, CU_MEMCPY_SRC_ACCESS_ORDER_ANY = 3 };
struct CUmemcpyAttributes {
    CUmemcpySrcAccessOrder srcAccessOrder;
    unsigned flags;
};
