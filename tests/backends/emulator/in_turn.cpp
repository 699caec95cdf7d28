// Blocks one after the other. They go backwards: nothing may rest on their order.
#include <cstring>

#include "cuda_runtime.h"

namespace emulator {

void* shared_memory() {
  alignas(16) static thread_local char memory[kSharedMemory];
  std::memset(memory, 0xff, sizeof(memory));  // NaN, until something is written
  return memory;
}

void launch(const char*, unsigned blocks, unsigned, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  for (unsigned block = blocks; block-- > 0;) {
    blockIdx.x = block;
    kernel();
  }
}

}  // namespace emulator
