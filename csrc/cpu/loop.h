// The loops over a chunk. Included once per instruction set, with FUSEDREG_ISA (a namespace) and FUSEDREG_TARGET (a
// function attribute) defined; the maths is always_inline, so it is compiled for the loop's instruction set.
#include "kernels.h"

#if !defined(FUSEDREG_ISA) || !defined(FUSEDREG_TARGET)
#error "define FUSEDREG_ISA and FUSEDREG_TARGET before this header"
#endif

namespace fusedreg::cpu::FUSEDREG_ISA {

// The loop is left to the compiler's vectoriser, which handles full vectors and the tail apart. `ivdep`, not
// `restrict`: a gradient may share its parameter's memory element by element.
template <class U, class T>
FUSEDREG_TARGET void update_chunk(const Pointers& at, std::int64_t begin, std::int64_t count,
                                  const Hyper<double>& hyper) {
  using A = ArithmeticOf<T>;
  constexpr int kStates = U::Rule::kStates;
  const Hyper<A> h = hyper.as<A>();
  T* const w = static_cast<T*>(at.w) + begin;
  const T* const g = static_cast<const T*>(at.g) + begin;
  T* const s0 = static_cast<T*>(at.state[0]) + (kStates > 0 ? begin : 0);
  T* const s1 = static_cast<T*>(at.state[1]) + (kStates > 1 ? begin : 0);
  T* const s2 = static_cast<T*>(at.state[2]) + (kStates > 2 ? begin : 0);
  static_assert(kMaxStates == 3);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A weight = load(w[i]);
    A state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = load(s0[i]);
    if constexpr (kStates > 1) state[1] = load(s1[i]);
    if constexpr (kStates > 2) state[2] = load(s2[i]);
    U::apply(weight, static_cast<A>(load(g[i])), state, h);
    store(w[i], weight);
    if constexpr (kStates > 0) store(s0[i], state[0]);
    if constexpr (kStates > 1) store(s1[i], state[1]);
    if constexpr (kStates > 2) store(s2[i], state[2]);
  }
}

// Sums in double, in a fixed number of lanes: the same to the bit on every instruction set and for any threads.
template <class T>
FUSEDREG_TARGET double sum_squares_of_chunk(const void* gradient, std::int64_t begin, std::int64_t count,
                                            const Hyper<double>& hyper) {
  using A = ArithmeticOf<T>;
  constexpr int kLanes = 32;
  const Hyper<A> h = hyper.as<A>();
  const T* const g = static_cast<const T*>(gradient) + begin;
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double x = clip_gradient_value(static_cast<A>(load(g[i + lane])), h);
      lanes[lane] += x * x;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const double x = clip_gradient_value(static_cast<A>(load(g[i])), h);
    lanes[lane] += x * x;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <class T>
UpdateKernel update_kernel_of(int rule, const Group& group) {
  UpdateKernel kernel = nullptr;
  Rules::visit(rule, [&](auto host) {
    visit_update<decltype(host)>(group, [&](auto update) { kernel = update_chunk<decltype(update), T>; });
  });
  return kernel;
}

inline UpdateKernel update_kernel(int rule, const Group& group, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return update_kernel_of<float>(rule, group);
    case DType::kFloat64:
      return update_kernel_of<double>(rule, group);
    case DType::kBFloat16:
      return update_kernel_of<BFloat16>(rule, group);
    case DType::kFloat16:
      return update_kernel_of<Float16>(rule, group);
  }
  return nullptr;
}

inline SquaresKernel squares_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_squares_of_chunk<float>;
    case DType::kFloat64:
      return sum_squares_of_chunk<double>;
    case DType::kBFloat16:
      return sum_squares_of_chunk<BFloat16>;
    case DType::kFloat16:
      return sum_squares_of_chunk<Float16>;
  }
  return nullptr;
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
