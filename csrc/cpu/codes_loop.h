// Loops over blocks of a state in 8 bits. Included once per instruction set, by each_isa.h, behind unit_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Codes as numbers, a vector of them. Left to itself, the compiler widens codes in more steps.
#if FUSEDREG_VECTOR_BYTES == 64
FUSEDREG_TARGET FUSEDREG_HD Vector<float> widen(const std::int8_t* codes) {
  return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
}
FUSEDREG_TARGET FUSEDREG_HD Vector<float> widen(const std::uint8_t* codes) {
  return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes)));
}
#elif FUSEDREG_VECTOR_BYTES == 32
FUSEDREG_TARGET FUSEDREG_HD Vector<float> widen(const std::int8_t* codes) {
  return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes)));
}
FUSEDREG_TARGET FUSEDREG_HD Vector<float> widen(const std::uint8_t* codes) {
  return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes)));
}
#endif

template <class Code, class A>
FUSEDREG_TARGET FUSEDREG_HD void decode_block(A* numbers, const Code* codes, float scale, std::int64_t count) {
  std::int64_t i = 0;
#if FUSEDREG_VECTOR_BYTES > 16
  if constexpr (sizeof(A) == sizeof(float)) {
    constexpr std::int64_t kWidth = sizeof(Vector<A>) / sizeof(A);
#pragma GCC unroll 4
    for (; i + kWidth <= count; i += kWidth) {
      const Vector<A> decoded = decode<Code>(widen(codes + i), scale);
      std::memcpy(numbers + i, &decoded, sizeof(decoded));
    }
  }
#endif
#pragma GCC ivdep
  for (; i < count; ++i) numbers[i] = static_cast<A>(decode<Code>(static_cast<float>(codes[i]), scale));
}

template <class Code, class A>
FUSEDREG_TARGET void load_blocks(void* to, const void* from, const float* scales, std::int64_t begin,
                                 std::int64_t count) {
  A* numbers = static_cast<A*>(to);
  const Code* const codes = static_cast<const Code*>(from);
  if (!looks_ahead_by_itself()) prefetch(codes + begin, kAheadBytes, count);
  for (std::int64_t in_block; count > 0; begin += in_block, count -= in_block, numbers += in_block) {
    in_block = std::min(kBlockOfCodes - begin % kBlockOfCodes, count);
    const float scale = scales[begin / kBlockOfCodes];
    if (in_block == kBlockOfCodes) {
      decode_block(numbers, codes + begin, scale, kBlockOfCodes);
    } else {
      decode_block(numbers, codes + begin, scale, in_block);
    }
  }
}

// Of roots, the largest is that of the largest number.
template <class Code, class A>
FUSEDREG_TARGET FUSEDREG_HD float scale_of_block(const A* x, std::int64_t count) {
  std::uint32_t largest_bits = 0;  // a NaN's bits, and a negative number's, are more than any other's
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const float number = static_cast<float>(x[i]);
    const std::uint32_t bits = bit_cast<std::uint32_t>(kIsRoot<Code> ? number + 0.0f : absolute(number));  // no -0
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const float largest = bit_cast<float>(largest_bits);
  if (largest > 0 && largest < INFINITY) return scale_of<Code>(kIsRoot<Code> ? square_root(largest) : largest);
  return largest == 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
}

template <class Code, class A>
FUSEDREG_TARGET void set_scales_of(float* scales, const void* from, std::int64_t count) {
  const A* const x = static_cast<const A*>(from);
  for (std::int64_t i = 0; i < count; i += kBlockOfCodes) {
    *scales++ = scale_of_block<Code>(x + i, std::min(kBlockOfCodes, count - i));
  }
}

template <class Code, class A>
FUSEDREG_HD float number_to_encode(A x) {
  const float number = static_cast<float>(x);
  return kIsRoot<Code> ? square_root(number) : number;
}

template <class Code, class A>
FUSEDREG_TARGET void store_blocks(void* to, const float* scales, const void* from, std::int64_t count) {
  Code* const codes = static_cast<Code*>(to);
  const A* const x = static_cast<const A*>(from);
  for (std::int64_t begin = 0; begin < count; begin += kBlockOfCodes) {
    const std::int64_t end = std::min(begin + kBlockOfCodes, count);
    const float scale = scales[begin / kBlockOfCodes];
    if (!(scale > 0)) {
      std::memset(codes + begin, 0, end - begin);
      continue;
    }
    const float inverse = kOneInFixedPoint / scale;
#pragma GCC ivdep
    for (std::int64_t i = begin; i < end; ++i) codes[i] = encode<Code>(number_to_encode<Code>(x[i]), inverse);
  }
}

template <class Code, class A>
FUSEDREG_TARGET void store_run_of_codes(void* to, const void* from, std::int64_t count, float scale,
                                        std::uint32_t position, std::uint32_t stride, std::uint32_t key) {
  Code* const codes = static_cast<Code*>(to);
  const A* const x = static_cast<const A*>(from);
  const auto length = static_cast<std::uint32_t>(count);  // an index of 32 bits is as wide as a number
#pragma GCC ivdep
  for (std::uint32_t i = 0; i < length; ++i) {
    codes[i] =
        encode_stochastically<Code>(number_to_encode<Code>(x[i]), scale, random_bits(position + i * stride, key));
  }
}

template <class Code, class A>
inline constexpr CodeLoops kCodeLoops = {load_blocks<Code, A>, set_scales_of<Code, A>, store_blocks<Code, A>,
                                         store_run_of_codes<Code, A>, sizeof(A)};

// nullptr for a dtype that is none of codes.
inline const CodeLoops* code_loops(DType dtype, DType arithmetic) {
  const bool is_double = arithmetic == DType::kFloat64;
  if (dtype == DType::kInt8) return is_double ? &kCodeLoops<std::int8_t, double> : &kCodeLoops<std::int8_t, float>;
  if (dtype == DType::kUInt8) return is_double ? &kCodeLoops<std::uint8_t, double> : &kCodeLoops<std::uint8_t, float>;
  return nullptr;
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
