// Stochastic rounding of a parameter's streams, a tile at a time, in place of the nearest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../maths/rounding.h"
#include "../maths/states.h"

namespace fusedreg::cpu {

// Stores `count` numbers of the arithmetic type as bfloat16, whose positions are `position`, `position + stride`, ...
using StoreRun = void (*)(void* to, const void* from, std::int64_t count, std::uint32_t position, std::uint32_t stride,
                          std::uint32_t key);

// Where elements that follow each other in memory stand in the whole parameter, counted row by row.
struct Positions {
  std::int64_t first = 0;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // sizes and strides, the outermost in memory first

  Positions() = default;
  // `sizes` and `memory` of what this process holds, dense; `strides` of the whole.
  Positions(std::int64_t first, const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& memory,
            const std::vector<std::int64_t>& strides);

  std::int64_t of(std::int64_t place) const;
};

struct Rounding {
  // What has a key of its own: the weights, the weights that stage 7 stores once more, and each state.
  enum Stream { kWeights, kWeightsOfUnits, kFirstState, kStreams = kFirstState + kMaxStates };

  StoreRun store_run = nullptr;
  std::size_t width = sizeof(float);  // of the arithmetic type
  Positions positions;
  std::uint32_t keys[kStreams] = {};

  void store(void* to, const void* from, std::int64_t begin, std::int64_t count, int stream) const;

  // Calls body(how many are before it, count, position of the first, stride of positions) for each run of elements
  // whose positions are evenly spaced.
  template <class Body>
  void for_each_run(std::int64_t begin, std::int64_t count, const Body& body) const {
    const auto& [size, stride] = positions.dims.back();
    for (std::int64_t done = 0, run; done < count; done += run) {
      run = std::min(size - (begin + done) % size, count - done);
      body(done, run, static_cast<std::uint32_t>(positions.of(begin + done)), static_cast<std::uint32_t>(stride));
    }
  }
};

}  // namespace fusedreg::cpu
