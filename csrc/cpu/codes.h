// States in 8 bits, to and from tiles of the arithmetic type.
#pragma once

#include "../maths/codes.h"
#include "rounding.h"

namespace fusedreg::cpu {

// Loops over at most a block, of one dtype of codes and one arithmetic type.
struct CodeLoops {
  void (*decode)(void* to, const void* codes, float scale, std::int64_t count);
  // Numbers, or their roots, as float32. Returns the bits of the largest magnitude; of one that is not a finite number,
  // they are the largest that there are.
  std::uint32_t (*gather)(float* numbers, const void* from, std::int64_t count);
  float (*scale)(float largest);
  void (*encode)(void* codes, const float* numbers, std::int64_t count, float inverse_scale);
  // Of elements whose positions are `position`, `position + stride`, ...
  void (*encode_stochastically)(void* codes, const float* numbers, std::int64_t count, float scale,
                                std::uint32_t position, std::uint32_t stride, std::uint32_t key);
  std::int64_t width;  // of the arithmetic type
};

// The elements [begin, begin + count) of a state, to a tile.
void load_codes(const CodeLoops& loops, void* to, const void* codes, const float* scales, std::int64_t begin,
                std::int64_t count);

// And back, where begin is a multiple of kBlockOfCodes, and so is count but at the state's end. To the nearest where
// `rounding` is null.
void store_codes(const CodeLoops& loops, void* codes, float* scales, const void* from, std::int64_t begin,
                 std::int64_t count, const Rounding* rounding, int stream);

}  // namespace fusedreg::cpu
