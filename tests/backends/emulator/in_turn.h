// In place of csrc/cuda/device.h: a block whose threads go one after the other, from one barrier to the next. That is
// quick, and finds what is wrong with a kernel's numbers; at_once.cpp finds what is wrong with its barriers.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.h"

namespace fusedreg::cuda {

struct DeviceBlock {
  std::int64_t index, count;

  DeviceBlock() : index(blockIdx.x), count(gridDim.x) {}

  template <class Visitor>
  void each_thread(Visitor&& visitor) const {
    for (int i = 0; i < kThreads; ++i) visitor(index % 2 == 0 ? i : kThreads - 1 - i);
  }

  template <class Visitor>
  bool any_thread(Visitor&& visitor) const {
    bool any = false;
    each_thread([&](int thread) { any |= visitor(thread); });
    return any;
  }
};

}  // namespace fusedreg::cuda
