#pragma once

#include "cuda.h"

typedef CUresult (*PFN_cuCtxGetCurrent_v4000)(CUcontext *context);
typedef CUresult (*PFN_cuCtxSetCurrent_v4000)(CUcontext context);
typedef CUresult (*PFN_cuMemcpyBatchAsync_v12080)(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                                                  CUmemcpyAttributes *attributes, size_t *first, size_t attribute_count,
                                                  size_t *failed, cudaStream_t stream);
