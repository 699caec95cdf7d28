// The loops over a chunk. Included once per instruction set, with FUSEDREG_ISA (a namespace) and FUSEDREG_TARGET (a
// function attribute) defined; the maths is always_inline, so it is compiled for the loop's instruction set.
#include "kernels.h"

#if !defined(FUSEDREG_ISA) || !defined(FUSEDREG_TARGET)
#error "define FUSEDREG_ISA and FUSEDREG_TARGET before this header"
#endif

namespace fusedreg::cpu::FUSEDREG_ISA {

// A prox keeps an Intel processor too busy to look far ahead by itself. Asked for in time, memory streams as fast as
// without one: 41 ms instead of 53 for 50M parameters on a Cascade Lake Xeon. Blocks four times as long lose half of
// that, and so does asking for a whole page ahead. AMD's (Zen 5) looks ahead by itself, and is 5 % faster if left
// alone.
constexpr std::int64_t kBlockBytes = 256;
constexpr std::int64_t kAheadBytes = 2048;

inline bool looks_ahead_by_itself() {
#if defined(__x86_64__)
  static const bool is_amd = __builtin_cpu_is("amd");
  return is_amd;
#else
  return false;
#endif
}

template <class T>
FUSEDREG_HD void prefetch_block(const T* at) {
  for (std::int64_t line = 0; line < kBlockBytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(at) + kAheadBytes + line);
  }
}

// The loop is left to the compiler's vectoriser. `ivdep`, not `restrict`: a gradient may share its parameter's memory
// element by element.
template <class U, class T>
FUSEDREG_HD void update_elements(T* w, const T* g, T* s0, T* s1, T* s2, std::int64_t count,
                                 const Hyper<ArithmeticOf<T>>& h) {
  using A = ArithmeticOf<T>;
  constexpr int kStates = U::Rule::kStates;
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

template <class U, class T>
FUSEDREG_TARGET void update_chunk(const Pointers& at, std::int64_t begin, std::int64_t count,
                                  const Hyper<double>& hyper) {
  static_assert(kMaxStates == 3);
  constexpr int kStates = U::Rule::kStates;
  constexpr std::int64_t kBlock = kBlockBytes / sizeof(T);
  const Hyper<ArithmeticOf<T>> h = hyper.as<ArithmeticOf<T>>();
  T* w = static_cast<T*>(at.w) + begin;
  const T* g = static_cast<const T*>(at.g) + begin;
  T* s0 = kStates > 0 ? static_cast<T*>(at.state[0]) + begin : nullptr;
  T* s1 = kStates > 1 ? static_cast<T*>(at.state[1]) + begin : nullptr;
  T* s2 = kStates > 2 ? static_cast<T*>(at.state[2]) + begin : nullptr;
  const bool prefetch = !looks_ahead_by_itself();
  for (; count >= kBlock; count -= kBlock) {
    if (prefetch) {
      prefetch_block(w);
      prefetch_block(g);
      if constexpr (kStates > 0) prefetch_block(s0);
      if constexpr (kStates > 1) prefetch_block(s1);
      if constexpr (kStates > 2) prefetch_block(s2);
    }
    update_elements<U>(w, g, s0, s1, s2, kBlock, h);
    w += kBlock;
    g += kBlock;
    if constexpr (kStates > 0) s0 += kBlock;
    if constexpr (kStates > 1) s1 += kBlock;
    if constexpr (kStates > 2) s2 += kBlock;
  }
  update_elements<U>(w, g, s0, s1, s2, count, h);
}

// The norm pass reads one stream, and wants it a page ahead: 1.4 times the bandwidth on the same Xeon.
constexpr std::int64_t kNormAheadBytes = 4096;

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
  const bool prefetch = !looks_ahead_by_itself();
  for (; count >= kLanes; count -= kLanes, g += kLanes) {
    for (int offset = 0; prefetch && offset < kLanes * static_cast<int>(sizeof(T)); offset += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(g) + kNormAheadBytes + offset);
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

inline UpdateKernel update_kernel(int rule, const Group& group, DType dtype) {
  UpdateKernel kernel = nullptr;
  visit_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Rules::visit(rule, [&](auto host) {
      visit_update<decltype(host)>(group, [&](auto update) { kernel = update_chunk<decltype(update), T>; });
    });
  });
  return kernel;
}

inline SquaresKernel squares_kernel(const Group& group, DType dtype) {
  return visit_dtype(dtype, [&](auto element) -> SquaresKernel {
    using T = decltype(element);
    return std::isinf(group.clip_value) ? sum_squares_of_chunk<false, T> : sum_squares_of_chunk<true, T>;
  });
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
