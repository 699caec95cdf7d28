// bfloat16 to and from float32 in AVX-512, with the instruction that AVX512-BF16 has for rounding.
#pragma once

#include "../maths/storage.h"
#include "x86_64.h"

#if defined(FUSEDREG_X86_64_LEVELS)
#include <immintrin.h>
#endif

namespace fusedreg::cpu {

inline bool rounds_to_bfloat16() {
#if defined(FUSEDREG_X86_64_LEVELS)
  static const bool is_supported = __builtin_cpu_supports("avx512bf16");
  return is_supported;
#else
  return false;
#endif
}

#if defined(FUSEDREG_X86_64_LEVELS)
// 16 numbers.
__attribute__((target("arch=x86-64-v4"), always_inline)) inline __m512 load_bfloat16(const BFloat16* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// With the bits that store() gives. The instruction takes a denormal for zero and keeps the bits of a NaN, so what has
// one of them among 32 numbers goes without it. In assembly, as a function that is compiled for AVX512-BF16 is inlined
// into none that is not.
__attribute__((target("arch=x86-64-v4"), always_inline)) inline void store_bfloat16(BFloat16* to, const float* from) {
  constexpr int kDenormalOrNaN = 0x20 | 0x01 | 0x80;
  const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
  const __mmask16 others =
      _kor_mask16(_mm512_fpclass_ps_mask(first, kDenormalOrNaN), _mm512_fpclass_ps_mask(second, kDenormalOrNaN));
  if (__builtin_expect(others != 0, 0)) {
    for (std::int64_t i = 0; i < 32; ++i) store(to[i], from[i]);
    return;
  }
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
  _mm512_storeu_si512(to, both);
}

__attribute__((target("arch=x86-64-v4"))) inline void store_all(BFloat16* to, const float* from, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) store_bfloat16(to + i, from + i);
  for (; i < count; ++i) store(to[i], from[i]);
}

#endif

}  // namespace fusedreg::cpu
