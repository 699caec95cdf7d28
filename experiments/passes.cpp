// The CPU kernels without torch around them, for variants.py, which builds this file once for each variant of csrc/.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "rules/adam.h"

#define FUSEDREG_ISA level
#define FUSEDREG_TARGET __attribute__((target(LEVEL)))
#define FUSEDREG_VECTOR_BYTES VECTOR_BYTES
#include "cpu/squares_loop.h"
#include "cpu/update_loop.h"

using namespace fusedreg;

namespace {

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

constexpr double kStepsBefore[] = {10}, kStepsAfter[] = {11};

std::vector<double> adamw_fields() {
  Group<Adam> group;
  group.common.lr = 1e-3, group.common.weight_decay = 0.01, group.common.decoupled_weight_decay = 1;
  group.penalties.l1 = group.penalties.l2 = 1e-4;
  group.rule.beta1 = 0.9, group.rule.beta2 = 0.999, group.rule.eps = 1e-8;
  std::vector<double> fields;
  group.bind([&](const char*, double field) { fields.push_back(field); });
  return fields;
}

}  // namespace

// AdamW with decay, l1, l2 and a norm clip's coefficient, float32.
extern "C" void adamw(float* w, const float* g, float* m, float* v, std::int64_t n, std::int64_t chunk, int threads) {
  const std::vector<double> fields = adamw_fields();
  StepConstants<Adam, float> constants;
  fill_constants(constants, make_group<Adam>(fields.data()), kStepsBefore, kStepsAfter, 1, 0.5);
  const auto kernel = cpu::level::update_kernel<Adam, float>(fields.data(), Adam::kPlain);
  Pointers at;
  at.w = w, at.g = g, at.state[0] = m, at.state[1] = v;
  const cpu::DTypes float32;
  share_out(n, chunk, threads, [&](std::int64_t begin, std::int64_t count) {
    kernel(at, float32, begin, count, &constants, nullptr, nullptr);
  });
}

extern "C" double squares(const float* g, std::int64_t n, std::int64_t chunk, int threads) {
  const auto kernel = cpu::level::squares_kernel(DType::kFloat32, false);
  std::vector<double> sums((n + chunk - 1) / chunk);
  share_out(n, chunk, threads, [&](std::int64_t begin, std::int64_t count) {
    sums[begin / chunk] = kernel(g, begin, count, 1, INFINITY);
  });
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

// What a group pays in a step: `times` fillings of its constants from lr, betas and the step count.
extern "C" double fillings(std::int64_t times) {
  const std::vector<double> fields = adamw_fields();
  double sum = 0;
  for (std::int64_t i = 0; i < times; ++i) {
    const double before = static_cast<double>(i), after = before + 1;
    StepConstants<Adam, float> constants;
    fill_constants(constants, make_group<Adam>(fields.data()), &before, &after, 1, 0.5);
    sum += constants.rule.step_size;
  }
  return sum;
}
