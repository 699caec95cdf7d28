// Sums the squares of each gradient as soon as autograd has made it, in a C++ hook. For norm_in_backward.py, which
// builds this file against torch.
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/extension.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/prefetch.h"

#define FUSEDREG_ISA level
#define FUSEDREG_TARGET __attribute__((target(LEVEL)))
#include "cpu/squares_loop.h"

using namespace fusedreg;

namespace {

constexpr std::int64_t kChunk = 32 * 1024;

double sum_of_squares = 0;
bool is_on = false;

double squares_of(const float* g, std::int64_t n) {
  const auto sum = [&](std::int64_t begin, std::int64_t end, double total) {
    for (; begin < end; begin += kChunk) {
      total += cpu::level::sum_squares_of_chunk<false, float>(g, begin, std::min(kChunk, end - begin), 1, 0);
    }
    return total;
  };
  if (n <= 2 * kChunk) return sum(0, n, 0);
  return at::parallel_reduce(0, n, kChunk, 0.0, sum, [](double a, double b) { return a + b; });
}

struct AddSquares : torch::autograd::PostAccumulateGradHook {
  void operator()(const torch::autograd::Variable& param) override {
    const at::Tensor& grad = param.grad();
    if (is_on) sum_of_squares += squares_of(grad.const_data_ptr<float>(), grad.numel());
  }
};

void add_hooks(const std::vector<at::Tensor>& params) {
  for (const at::Tensor& param : params) {
    torch::autograd::impl::set_post_acc_grad_hooks(param, std::make_unique<AddSquares>());
  }
}

// What the hooks have added up, which begins anew.
double take() { return std::exchange(sum_of_squares, 0); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("add_hooks", add_hooks);
  m.def("switch", [](bool on) { is_on = on; });
  m.def("take", take);
}
