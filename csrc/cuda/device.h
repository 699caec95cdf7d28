// A block of a kernel, as block.h sees it.
#pragma once

#include <cuda_runtime.h>

#include "block.h"

namespace fusedreg::cuda {

struct DeviceBlock {
  std::int64_t index, count;

  __device__ DeviceBlock() : index(blockIdx.x), count(gridDim.x) {}

  template <class Visitor>
  FUSEDREG_HD void each_thread(Visitor&& visitor) const {
#if defined(__CUDA_ARCH__)
    visitor(static_cast<int>(threadIdx.x));
    __syncthreads();
#endif
  }

  template <class Visitor>
  FUSEDREG_HD bool any_thread(Visitor&& visitor) const {
#if defined(__CUDA_ARCH__)
    return __syncthreads_or(visitor(static_cast<int>(threadIdx.x))) != 0;
#else
    return false;
#endif
  }
};

}  // namespace fusedreg::cuda
