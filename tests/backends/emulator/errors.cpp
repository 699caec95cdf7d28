// Errors of an emulated GPU.
#include <utility>

#include "cuda_runtime.h"

// A test sets it.
extern "C" int fusedreg_left_behind;
int fusedreg_left_behind = 0;

cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(std::exchange(fusedreg_left_behind, 0)); }

const char* cudaGetErrorString(cudaError_t error) {
  return error != cudaSuccess ? "an emulated error" : "none: the CPU emulates the GPU";
}
