#include "rounding.h"

#include <algorithm>

namespace fusedreg::cpu {

Positions::Positions(std::int64_t first, const std::vector<std::int64_t>& sizes,
                     const std::vector<std::int64_t>& memory, const std::vector<std::int64_t>& strides)
    : first(first) {
  std::vector<std::size_t> order;
  for (std::size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] > 1) order.push_back(dim);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return memory[a] > memory[b]; });
  for (const std::size_t dim : order) {
    if (!dims.empty() && dims.back().second == sizes[dim] * strides[dim]) {
      dims.back() = {dims.back().first * sizes[dim], strides[dim]};
    } else {
      dims.emplace_back(sizes[dim], strides[dim]);
    }
  }
  if (dims.empty()) dims.emplace_back(1, 1);
}

std::int64_t Positions::of(std::int64_t place) const {
  std::int64_t position = first;
  for (std::size_t i = dims.size(); i-- > 0;) {
    const auto& [size, stride] = dims[i];
    position += place % size * stride;
    place /= size;
  }
  return position;
}

void Rounding::store(void* to, const void* from, std::int64_t begin, std::int64_t count, int stream) const {
  for_each_run(begin, count, [&](std::int64_t done, std::int64_t run, std::uint32_t position, std::uint32_t stride) {
    store_run(static_cast<BFloat16*>(to) + begin + done,
              static_cast<const char*>(from) + done * static_cast<std::int64_t>(width), run, position, stride,
              keys[stream]);
  });
}

}  // namespace fusedreg::cpu
