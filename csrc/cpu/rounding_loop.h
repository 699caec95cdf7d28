// The loop that rounds stochastically. Included once per instruction set, by each_isa.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

template <class A>
FUSEDREG_TARGET void store_run_of(void* to, const void* from, std::int64_t count, std::uint32_t position,
                                  std::uint32_t stride, std::uint32_t key) {
  BFloat16* const elements = static_cast<BFloat16*>(to);
  const A* const numbers = static_cast<const A*>(from);
  const auto length = static_cast<std::uint32_t>(count);  // a tile's: an index of 32 bits is as wide as a number
  const auto store_in_steps_of = [&](std::uint32_t step) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (std::uint32_t i = 0; i < length; ++i) {
      store_stochastically(elements[i], static_cast<float>(numbers[i]), random_bits(position + i * step, key));
    }
  };
  // As a constant, what nearly all strides are takes no multiplication.
  stride == 1 ? store_in_steps_of(1) : store_in_steps_of(stride);
}

inline StoreRun store_run(DType arithmetic) {
  return arithmetic == DType::kFloat64 ? store_run_of<double> : store_run_of<float>;
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
