// The norm's loop over a chunk. Included once per instruction set, by each_isa.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Sums in double, in a fixed number of lanes: the same to the bit on every instruction set and for any threads. A pass
// that only reads is bound by the misses that a core waits for at a time; in a chunk's four quarters at once, there are
// more of them.
template <bool kClamp, class T>
FUSEDREG_TARGET double sum_squares_of_chunk(const void* gradient, std::int64_t begin, std::int64_t count,
                                            double inv_grad_scale, double clip_value) {
  using A = ArithmeticOf<T>;
  constexpr int kLanes = 32, kStreams = 4, kLanesOfStream = kLanes / kStreams;
  constexpr int kTogether = 64 / sizeof(T);  // a line of memory
  const A scale = static_cast<A>(inv_grad_scale), bound = static_cast<A>(clip_value);
  const T* g = static_cast<const T*>(gradient) + begin;
  const auto element = [&](const T& x) __attribute__((always_inline)) -> double {
    const A value = load(x);
    return kClamp ? clip_gradient_value(value, scale, bound) : value;
  };
  double of_streams[kStreams][kLanesOfStream] = {};  // apart, so that it stays in registers
  const bool prefetches = !looks_ahead_by_itself();
  const std::int64_t length = count / (kStreams * kTogether) * kTogether;
  for (std::int64_t i = 0; i < length; i += kTogether) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const T* const at = g + stream * length + i;
      if (prefetches) prefetch(at, kNormAheadBytes, kTogether * sizeof(T));
      for (int first = 0; first < kTogether; first += kLanesOfStream) {
        for (int lane = 0; lane < kLanesOfStream; ++lane) {
          of_streams[stream][lane] += element(at[first + lane]) * element(at[first + lane]);
        }
      }
    }
  }
  double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = of_streams[lane / kLanesOfStream][lane % kLanesOfStream];
  for (std::int64_t i = kStreams * length; i < count; ++i) lanes[i % kLanes] += element(g[i]) * element(g[i]);
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
