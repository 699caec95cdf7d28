// Loops over a block of a state in 8 bits. Included once per instruction set, by each_isa.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

template <class Code, class A>
FUSEDREG_TARGET void decode_block(void* to, const void* from, float scale, std::int64_t count) {
  A* const numbers = static_cast<A*>(to);
  const Code* const codes = static_cast<const Code*>(from);
  if (!looks_ahead_by_itself()) prefetch(codes, kAheadBytes, count);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) numbers[i] = static_cast<A>(decode(codes[i], scale));
}

template <class Code, class A>
FUSEDREG_TARGET std::uint32_t gather_block(float* numbers, const void* from, std::int64_t count) {
  const A* const x = static_cast<const A*>(from);
  std::int32_t largest = 0;  // a NaN's bits are more than any number's
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const float narrow = static_cast<float>(x[i]);
    const float number = kIsRoot<Code> ? square_root(narrow) : narrow;
    numbers[i] = number;
    const std::int32_t magnitude = bit_cast<std::int32_t>(number) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<std::uint32_t>(largest);
}

template <class Code>
FUSEDREG_TARGET void encode_block(void* to, const float* numbers, std::int64_t count, float inverse) {
  Code* const codes = static_cast<Code*>(to);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) codes[i] = encode<Code>(numbers[i], inverse);
}

template <class Code>
FUSEDREG_TARGET void encode_run(void* to, const float* numbers, std::int64_t count, float scale, std::uint32_t position,
                                std::uint32_t stride, std::uint32_t key) {
  Code* const codes = static_cast<Code*>(to);
  const auto length = static_cast<std::uint32_t>(count);  // an index of 32 bits is as wide as a number
#pragma GCC ivdep
  for (std::uint32_t i = 0; i < length; ++i) {
    codes[i] = encode_stochastically<Code>(numbers[i], scale, random_bits(position + i * stride, key));
  }
}

template <class Code, class A>
inline constexpr CodeLoops kCodeLoops = {decode_block<Code, A>, gather_block<Code, A>, scale_of<Code>,
                                         encode_block<Code>,    encode_run<Code>,      sizeof(A)};

// nullptr for a dtype that is none of codes.
inline const CodeLoops* code_loops(DType dtype, DType arithmetic) {
  const bool is_double = arithmetic == DType::kFloat64;
  if (dtype == DType::kInt8) return is_double ? &kCodeLoops<std::int8_t, double> : &kCodeLoops<std::int8_t, float>;
  if (dtype == DType::kUInt8) return is_double ? &kCodeLoops<std::uint8_t, double> : &kCodeLoops<std::uint8_t, float>;
  return nullptr;
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
