// In place of CUDA's own header, on a CPU: as much of it as csrc/cuda asks for. A block's threads are run one after the
// other (in_turn.h, in_turn.cpp) or all at once (at_once.cpp); which, is chosen when an extension is linked.
// cuda_emulation.py writes what is no C++ (`__shared__`, `<<<>>>`, PTX) as calls of what stands here.
#pragma once

#include <cstddef>
#include <functional>

#define __global__
#define __grid_constant__
#define __device__
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x;
};
inline thread_local EmulatedIndex threadIdx, blockIdx, gridDim;

void __syncthreads();
int __syncthreads_or(int predicate);

inline void* __cvta_global_to_generic(std::size_t address) { return reinterpret_cast<void*>(address); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNotReady = 600 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

constexpr std::size_t kSharedMemory = 48 * 1024;  // bytes: the most that a kernel may declare

// Of the block that this thread is of.
void* shared_memory();

template <class Shared>
Shared& shared() {
  static_assert(sizeof(Shared) <= kSharedMemory);
  return *static_cast<Shared*>(shared_memory());
}

// Runs `kernel` for each block, or for each thread of each block, and returns when all are done.
void launch(const char* name, unsigned blocks, unsigned threads, const std::function<void()>& kernel);

}  // namespace emulator
