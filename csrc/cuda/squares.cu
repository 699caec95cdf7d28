// The norm's kernels.
#include "device.h"
#include "kernels.h"

namespace fusedreg::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kSquaresPerMultiprocessor)
    squares_kernel(const __grid_constant__ SquaresArgs args) {
  __shared__ SquaresShared shared;
  squares_block<T>(DeviceBlock(), args, shared);
}

}  // namespace

int launch_squares(DType dtype, const SquaresArgs& args, int blocks, void* stream) {
  visit_dtype(dtype, [&](auto element) {
    squares_kernel<decltype(element)><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
  return cudaGetLastError();
}

int take_earlier_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaErrorNotReady ? cudaSuccess : error;  // what a query of a busy stream leaves is no error
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fusedreg::cuda
