// The loops over a chunk. Included once per instruction set, with FUSEDREG_ISA (a namespace) and FUSEDREG_TARGET (a
// function attribute) defined; the maths is always_inline, so it is compiled for the loop's instruction set.
#include "kernels.h"

#if !defined(FUSEDREG_ISA) || !defined(FUSEDREG_TARGET)
#error "define FUSEDREG_ISA and FUSEDREG_TARGET before this header"
#endif

namespace fusedreg::cpu::FUSEDREG_ISA {

// The loop is left to the compiler's vectoriser. `ivdep`, not `restrict`: a gradient may share its parameter's memory
// element by element.
template <class U, class T>
FUSEDREG_TARGET void update_chunk(const Pointers& at, std::int64_t begin, std::int64_t count,
                                  const Hyper<double>& hyper) {
  using A = ArithmeticOf<T>;
  static_assert(kMaxStates == 3);
  constexpr int kStates = U::Rule::kStates;
  const Hyper<A> h = hyper.as<A>();
  T* const w = static_cast<T*>(at.w) + begin;
  const T* const g = static_cast<const T*>(at.g) + begin;
  T* const s0 = kStates > 0 ? static_cast<T*>(at.state[0]) + begin : nullptr;
  T* const s1 = kStates > 1 ? static_cast<T*>(at.state[1]) + begin : nullptr;
  T* const s2 = kStates > 2 ? static_cast<T*>(at.state[2]) + begin : nullptr;
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
template <bool kClamp, class T>
FUSEDREG_TARGET double sum_squares_of_chunk(const void* gradient, std::int64_t begin, std::int64_t count,
                                            const Hyper<double>& hyper) {
  using A = ArithmeticOf<T>;
  constexpr int kLanes = 32;
  const Hyper<A> h = hyper.as<A>();
  const T* g = static_cast<const T*>(gradient) + begin;
  const auto element = [&h](const T& x) __attribute__((always_inline)) -> double {
    const A value = load(x);
    return kClamp ? clip_gradient_value(value, h) : value;
  };
  double lanes[kLanes] = {};
  for (; count >= kLanes; count -= kLanes, g += kLanes) {
    // A page ahead: 1.4 times the bandwidth on a Cascade Lake Xeon. The update loop got slower with prefetches.
    for (int offset = 0; offset < kLanes * static_cast<int>(sizeof(T)); offset += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(g) + 4096 + offset);
    }
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += element(g[lane]) * element(g[lane]);
  }
  for (std::int64_t i = 0; i < count; ++i) lanes[i] += element(g[i]) * element(g[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  // Without a value clip, the scale comes out of the sum.
  return kClamp ? lanes[0] : lanes[0] * hyper.inv_grad_scale * hyper.inv_grad_scale;
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

template <bool kClamp>
SquaresKernel squares_kernel_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return sum_squares_of_chunk<kClamp, float>;
    case DType::kFloat64:
      return sum_squares_of_chunk<kClamp, double>;
    case DType::kBFloat16:
      return sum_squares_of_chunk<kClamp, BFloat16>;
    case DType::kFloat16:
      return sum_squares_of_chunk<kClamp, Float16>;
  }
  return nullptr;
}

inline SquaresKernel squares_kernel(const Group& group, DType dtype) {
  return std::isinf(group.clip_value) ? squares_kernel_of<false>(dtype) : squares_kernel_of<true>(dtype);
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
