#include "codes.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fusedreg::cpu {

void load_codes(const CodeLoops& loops, void* to, const void* codes, const float* scales, std::int64_t begin,
                std::int64_t count) {
  loops.load(to, codes, scales, begin, count);
}

void set_scales(const CodeLoops& loops, float* scales, const void* from, std::int64_t begin, std::int64_t count) {
  loops.set_scales(scales + begin / kBlockOfCodes, from, count);
}

void store_codes(const CodeLoops& loops, void* codes, const float* scales, const void* from, std::int64_t begin,
                 std::int64_t count, const Rounding* rounding, int stream) {
  char* const its_codes = static_cast<char*>(codes) + begin;
  const float* const its_scales = scales + begin / kBlockOfCodes;
  if (rounding == nullptr) return loops.store(its_codes, its_scales, from, count);
  for (std::int64_t first = 0; first < count; first += kBlockOfCodes) {
    const std::int64_t in_block = std::min(kBlockOfCodes, count - first);
    const float scale = its_scales[first / kBlockOfCodes];
    if (!(scale > 0)) {
      std::memset(its_codes + first, 0, in_block);
      continue;
    }
    rounding->for_each_run(begin + first, in_block,
                           [&](std::int64_t done, std::int64_t run, std::uint32_t position, std::uint32_t stride) {
                             loops.store_run(its_codes + first + done,
                                             static_cast<const char*>(from) + (first + done) * loops.width, run, scale,
                                             position, stride, rounding->keys[stream]);
                           });
  }
}

}  // namespace fusedreg::cpu
