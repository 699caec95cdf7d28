#include "codes.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fusedreg::cpu {

void load_codes(const CodeLoops& loops, void* to, const void* codes, const float* scales, std::int64_t begin,
                std::int64_t count) {
  char* numbers = static_cast<char*>(to);
  for (std::int64_t in_block; count > 0; begin += in_block, count -= in_block) {
    in_block = std::min(kBlockOfCodes - begin % kBlockOfCodes, count);
    loops.decode(numbers, static_cast<const char*>(codes) + begin, scales[begin / kBlockOfCodes], in_block);
    numbers += in_block * loops.width;
  }
}

void store_codes(const CodeLoops& loops, void* codes, float* scales, const void* from, std::int64_t begin,
                 std::int64_t count, const Rounding* rounding, int stream) {
  alignas(64) float numbers[kBlockOfCodes];
  const char* block = static_cast<const char*>(from);
  for (std::int64_t in_block; count > 0; begin += in_block, count -= in_block) {
    in_block = std::min(kBlockOfCodes, count);
    char* const its_codes = static_cast<char*>(codes) + begin;
    float& scale = scales[begin / kBlockOfCodes];
    const float largest = bit_cast<float>(loops.gather(numbers, block, in_block));
    block += in_block * loops.width;
    if (!(largest > 0) || !(largest < INFINITY)) {
      scale = largest == 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
      std::memset(its_codes, 0, in_block);
      continue;
    }
    scale = loops.scale(largest);
    if (rounding == nullptr) {
      loops.encode(its_codes, numbers, in_block, kOneInFixedPoint / scale);
      continue;
    }
    rounding->for_each_run(begin, in_block,
                           [&](std::int64_t done, std::int64_t run, std::uint32_t position, std::uint32_t stride) {
                             loops.encode_stochastically(its_codes + done, numbers + done, run, scale, position, stride,
                                                         rounding->keys[stream]);
                           });
  }
}

}  // namespace fusedreg::cpu
