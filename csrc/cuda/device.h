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

// How many blocks are to share a multiprocessor sets the registers that a thread may take. Left alone, ptxas spills to
// fit more. `streams` are those that the kernel has in registers at once.
template <class T>
constexpr int blocks_per_multiprocessor(int streams) {
  if (sizeof(T) == 2) return streams > 4 ? 2 : 3;
  if (sizeof(T) != 4) return 2;  // 128 registers: a pack has more elements, or larger ones
  return streams > 4 ? 3 : 4;    // 80, 64
}

}  // namespace fusedreg::cuda
