// The CPU kernels without torch around them, for variants.py, which builds this file once for each variant of csrc/.
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/x86_64.h"
#define FUSEDREG_ISA level
#define FUSEDREG_TARGET __attribute__((target(LEVEL)))
#include "cpu/loop.h"

using namespace fusedreg;

namespace {

constexpr int kAdam = 0;  // the first of Rules

template <class Body>
void share_out(std::int64_t n, std::int64_t chunk, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t begin = next.fetch_add(chunk); begin < n; begin = next.fetch_add(chunk)) {
      body(begin, std::min(chunk, n - begin));
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

Hyper<double> make_adamw_hyper(Group& group) {
  group.lr = 1e-3, group.weight_decay = 0.01, group.decoupled_weight_decay = 1, group.l1 = 1e-4, group.l2 = 1e-4;
  group.clip_value = INFINITY, group.beta1 = 0.9, group.beta2 = 0.999, group.eps = 1e-8;
  return make_hyper<AdamHost>(group, 1, 0.5, 10);
}

}  // namespace

// AdamW with decay, l1, l2 and a norm clip's coefficient, float32.
extern "C" void adamw(float* w, const float* g, float* m, float* v, std::int64_t n, std::int64_t chunk, int threads) {
  Group group;
  const Hyper<double> hyper = make_adamw_hyper(group);
  const auto kernel = cpu::level::update_kernel(kAdam, group, DType::kFloat32);
  Pointers at;
  at.w = w, at.g = g, at.state[0] = m, at.state[1] = v;
  share_out(n, chunk, threads, [&](std::int64_t begin, std::int64_t count) { kernel(at, begin, count, hyper); });
}

extern "C" double squares(const float* g, std::int64_t n, std::int64_t chunk, int threads) {
  Group group;
  const Hyper<double> hyper = make_adamw_hyper(group);
  const auto kernel = cpu::level::squares_kernel(group, DType::kFloat32);
  std::vector<double> sums((n + chunk - 1) / chunk);
  share_out(n, chunk, threads,
            [&](std::int64_t begin, std::int64_t count) { sums[begin / chunk] = kernel(g, begin, count, hyper); });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

// An in-place stream, with ordinary and with non-temporal stores. x begins at a multiple of 64 bytes.
typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));

extern "C" FUSEDREG_TARGET void stream(float* x, std::int64_t n, std::int64_t chunk, int threads, bool non_temporal) {
  constexpr std::int64_t kWidth = VECTOR_BYTES / sizeof(float);
  share_out(n, chunk, threads, [&](std::int64_t begin, std::int64_t count) FUSEDREG_TARGET {
    for (std::int64_t i = begin; i < begin + count; i += kWidth) {
      Vector value = *reinterpret_cast<Vector*>(x + i) * 1.0000001f;
      if (non_temporal) {
        asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector*>(x + i)) : "v"(value));
      } else {
        *reinterpret_cast<Vector*>(x + i) = value;
      }
    }
    if (non_temporal) asm volatile("sfence" ::: "memory");
  });
}

// What a chunk pays to have its scalars in float: `times` conversions.
extern "C" FUSEDREG_TARGET float conversions(std::int64_t times) {
  Group group;
  Hyper<double> hyper = make_adamw_hyper(group);
  float sum = 0;
  for (std::int64_t i = 0; i < times; ++i) {
    asm volatile("" : "+m"(hyper));
    Hyper<float> h = hyper.as<float>();
    asm volatile("" : "+m"(h));
    sum += h.tau;
  }
  return sum;
}

// What a group pays in a step: `times` fillings of its scalars from lr, betas and the step count.
extern "C" double fillings(std::int64_t times) {
  Group group;
  double sum = 0;
  for (std::int64_t i = 0; i < times; ++i) {
    make_adamw_hyper(group);
    asm volatile("" : "+m"(group));
    sum += make_hyper<AdamHost>(group, 1, 0.5, static_cast<double>(i)).step_size;
  }
  return sum;
}
