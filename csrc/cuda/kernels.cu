// The kernels: barriers, reductions and launches around what block.h says. Knows nothing of torch.
#include <cuda_runtime.h>

#include "block.h"

namespace fusedreg::cuda {

namespace {

// Sets the registers that a thread may take: 64 for float, whose packs are the smallest, 128 for the others. Left
// alone, ptxas spills to fit more blocks.
template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 4 ? 4 : 2;

// The sum over a block in a fixed order; every thread gets it.
__device__ double block_sum(double value) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kWarps = kThreads / 32;
  __shared__ double of_warp[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    squares_kernel(const __grid_constant__ SquaresArgs args) {
  __shared__ Group group;
  __shared__ Hyper<double> hyper;
  double sum = 0;
  for (int i = blockIdx.x; i < args.chunk_count; i += gridDim.x) {
    const Chunk chunk = args.chunks[i];
    const Tensor& tensor = args.tensors[chunk.tensor];
    __syncthreads();  // the round before may still be reading hyper
    if (threadIdx.x == 0) {
      resolve_group(args.step, tensor.slot, group);
      fill_gradient_hyper(hyper, group, inv_grad_scale(args.step), 1);
    }
    __syncthreads();
    sum += squares_of_share<T>(tensor, chunk, hyper.as<ArithmeticOf<T>>(), threadIdx.x, blockDim.x);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) args.partial_sums[blockIdx.x] = sum;
}

template <class RuleHost, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    update_kernel(const __grid_constant__ UpdateArgs args) {
  if (skips(args.step)) return;
  double clip_coef = 1;
  if (args.partial_sums != nullptr) {
    double sum = 0;
    for (int i = threadIdx.x; i < args.partial_sum_count; i += blockDim.x) sum += args.partial_sums[i];
    const double norm = sqrt(block_sum(sum));
    clip_coef = clip_coefficient(args, norm);
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.norm = norm;
  }

  __shared__ Group group;
  __shared__ Hyper<double> hyper;
  if (blockIdx.x < args.chunk_count) {
    const Chunk chunk = args.chunks[blockIdx.x];
    const Tensor tensor = args.tensors[chunk.tensor];
    if (threadIdx.x == 0) {
      resolve_group(args.step, tensor.slot, group);
      hyper = make_hyper<RuleHost>(group, inv_grad_scale(args.step), clip_coef, read_clock(args.step, tensor));
    }
    __syncthreads();
    visit_update<RuleHost>(group, [&](auto update) {
      update_share<decltype(update), T>(tensor, chunk, hyper.as<ArithmeticOf<T>>(), threadIdx.x, blockDim.x);
    });
  }

  if (args.blocks_done == nullptr) return;
  // The clocks may move only when every block has read them.
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(args.blocks_done, gridDim.x - 1) == gridDim.x - 1;  // and back to 0
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < args.tensor_count; i += blockDim.x) {
    move_clock<RuleHost>(args.step, args.tensors[args.first_tensor + i]);
  }
}

}  // namespace

int launch_sum_of_squares(DType dtype, const SquaresArgs& args, int blocks, void* stream) {
  visit_dtype(dtype, [&](auto element) {
    squares_kernel<decltype(element)><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
  return cudaGetLastError();
}

int launch_update(int rule, DType dtype, const UpdateArgs& args, void* stream) {
  const int blocks = args.chunk_count > 0 ? args.chunk_count : 1;  // one at least, to move the clocks
  Rules::visit(rule, [&](auto host) {
    visit_dtype(dtype, [&](auto element) {
      update_kernel<decltype(host), decltype(element)>
          <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
  });
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fusedreg::cuda
