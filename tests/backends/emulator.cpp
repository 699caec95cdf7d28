// A host that plays device: the launchers of csrc/cuda/args.h without a GPU. It runs the device functions of
// csrc/cuda/block.h for every thread of every block, in the places where csrc/cuda/kernels.cu calls them; its sums are
// in another order. Blocks go backwards: nothing may rest on their order.
#include "../../csrc/cuda/block.h"

namespace fusedreg::cuda {

namespace {

template <class T>
void squares_block(const SquaresArgs& args, int block, int blocks) {
  double sum = 0;
  for (int i = block; i < args.chunk_count; i += blocks) {
    const Chunk& chunk = args.chunks[i];
    const Tensor& tensor = args.tensors[chunk.tensor];
    Group group;
    resolve_group(args.step, tensor.slot, group);
    Hyper<double> hyper;
    fill_gradient_hyper(hyper, group, inv_grad_scale(args.step), 1);
    for (int thread = 0; thread < kThreads; ++thread) {
      sum += squares_of_share<T>(tensor, chunk, hyper.as<ArithmeticOf<T>>(), thread, kThreads);
    }
  }
  args.partial_sums[block] = sum;
}

template <class RuleHost, class T>
void update_block(const UpdateArgs& args, int block, int blocks) {
  if (skips(args.step)) return;
  double clip_coef = 1;
  if (args.partial_sums != nullptr) {
    double sum = 0;
    for (int i = 0; i < args.partial_sum_count; ++i) sum += args.partial_sums[i];
    clip_coef = clip_coefficient(args, std::sqrt(sum));
    if (block == 0) *args.norm = std::sqrt(sum);
  }
  if (block < args.chunk_count) {
    const Chunk& chunk = args.chunks[block];
    const Tensor& tensor = args.tensors[chunk.tensor];
    Group group;
    resolve_group(args.step, tensor.slot, group);
    const Hyper<double> hyper =
        make_hyper<RuleHost>(group, inv_grad_scale(args.step), clip_coef, read_clock(args.step, tensor));
    visit_update<RuleHost>(group, [&](auto update) {
      for (int thread = 0; thread < kThreads; ++thread) {
        update_share<decltype(update), T>(tensor, chunk, hyper.as<ArithmeticOf<T>>(), thread, kThreads);
      }
    });
  }
  if (args.blocks_done == nullptr) return;
  const bool is_last = (*args.blocks_done)++ == static_cast<unsigned>(blocks) - 1;
  if (!is_last) return;
  *args.blocks_done = 0;
  for (int i = 0; i < args.tensor_count; ++i) {
    move_clock<RuleHost>(args.step, args.tensors[args.first_tensor + i]);
  }
}

}  // namespace

int launch_sum_of_squares(DType dtype, const SquaresArgs& args, int blocks, void*) {
  visit_dtype(dtype, [&](auto element) {
    for (int block = blocks - 1; block >= 0; --block) squares_block<decltype(element)>(args, block, blocks);
  });
  return 0;
}

int launch_update(int rule, DType dtype, const UpdateArgs& args, void*) {
  const int blocks = args.chunk_count > 0 ? args.chunk_count : 1;
  Rules::visit(rule, [&](auto host) {
    visit_dtype(dtype, [&](auto element) {
      for (int block = blocks - 1; block >= 0; --block) {
        update_block<decltype(host), decltype(element)>(args, block, blocks);
      }
    });
  });
  return 0;
}

const char* error_string(int) { return "none: a host plays device"; }

}  // namespace fusedreg::cuda
