// torch's own pool of threads.
#pragma once

#include <cstdint>

#if defined(FUSEDREG_STABLE)
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#else
#include <ATen/Parallel.h>
#endif

namespace fusedreg::cpu {

#if defined(FUSEDREG_STABLE)

inline std::int64_t thread_count() {
  std::uint32_t count = 1;
  if (torch_get_num_threads(&count) != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch has no threads");
  return count;
}

// Calls body(begin, end) for parts of [0, count), by several threads. What that throws becomes an error without a name.
template <class Body>
void parallel_for(std::int64_t count, const Body& body) {
  const auto call = [](std::int64_t begin, std::int64_t end, void* its) {
    (*static_cast<const Body*>(its))(begin, end);
  };
  if (torch_parallel_for(0, count, 1, call, const_cast<Body*>(&body)) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch could not share out the work among its threads");
  }
}

#else

inline std::int64_t thread_count() { return at::get_num_threads(); }

// Calls body(begin, end) for parts of [0, count), by several threads.
template <class Body>
void parallel_for(std::int64_t count, const Body& body) {
  at::parallel_for(0, count, 1, body);
}

#endif

}  // namespace fusedreg::cpu
