// The norm's loop over a chunk. Included once per instruction set, by each_isa.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Sums in double, in a fixed number of lanes: the same to the bit on every instruction set and for any threads.
template <bool kClamp, class T>
FUSEDREG_TARGET double sum_squares_of_chunk(const void* gradient, std::int64_t begin, std::int64_t count,
                                            double inv_grad_scale, double clip_value) {
  using A = ArithmeticOf<T>;
  constexpr int kLanes = 32;
  const A scale = static_cast<A>(inv_grad_scale), bound = static_cast<A>(clip_value);
  const T* g = static_cast<const T*>(gradient) + begin;
  const auto element = [&](const T& x) __attribute__((always_inline)) -> double {
    const A value = load(x);
    return kClamp ? clip_gradient_value(value, scale, bound) : value;
  };
  double lanes[kLanes] = {};
  const bool prefetches = !looks_ahead_by_itself();
  for (; count >= kLanes; count -= kLanes, g += kLanes) {
    if (prefetches) prefetch(g, kNormAheadBytes, kLanes * sizeof(T));
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += element(g[lane]) * element(g[lane]);
  }
  for (std::int64_t i = 0; i < count; ++i) lanes[i] += element(g[i]) * element(g[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  // Without a value clip, the scale comes out of the sum.
  return kClamp ? lanes[0] : lanes[0] * inv_grad_scale * inv_grad_scale;
}

inline SquaresKernel squares_kernel(DType dtype, bool clamps) {
  return visit_dtype(dtype, [&](auto element) -> SquaresKernel {
    using T = decltype(element);
    return clamps ? sum_squares_of_chunk<true, T> : sum_squares_of_chunk<false, T>;
  });
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
