// Rounding to bfloat16 with the instruction that AVX512-BF16 has for it.
#pragma once

#include "../maths/storage.h"
#include "x86_64.h"

#if defined(FUSEDREG_X86_64_LEVELS)
#include <immintrin.h>

namespace fusedreg::cpu {

inline bool rounds_to_bfloat16() {
  static const bool is_supported = __builtin_cpu_supports("avx512bf16");
  return is_supported;
}

// The same bits as store(). The instruction takes a denormal for zero and keeps the bits of a NaN, so what has one of
// them among 32 numbers goes without it.
__attribute__((target("arch=x86-64-v4,avx512bf16"))) inline void store_all(BFloat16* to, const float* from,
                                                                           std::int64_t count) {
  constexpr int kDenormalOrNaN = 0x20 | 0x01 | 0x80;
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512 first = _mm512_loadu_ps(from + i), second = _mm512_loadu_ps(from + i + 16);
    const __mmask16 others =
        _kor_mask16(_mm512_fpclass_ps_mask(first, kDenormalOrNaN), _mm512_fpclass_ps_mask(second, kDenormalOrNaN));
    if (__builtin_expect(others == 0, 1)) {
      _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    } else {
      for (std::int64_t k = i; k < i + 32; ++k) store(to[k], from[k]);
    }
  }
  for (; i < count; ++i) store(to[i], from[i]);
}

}  // namespace fusedreg::cpu
#endif
