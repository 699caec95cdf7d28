// Runs the kernels over a work list on torch's own thread pool.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>

#include "../plan/work_list.h"
#include "kernels.h"

namespace fusedreg::cpu {

// 32 Ki elements of fp32 Adam are 896 KiB: enough to amortise a call, little enough to share out evenly.
constexpr std::int64_t kChunkElements = 32 * 1024;

// Below this many elements one thread is done before a second one has woken up.
constexpr std::int64_t kSerialElements = 16 * 1024;

// Calls body(chunk index) for every chunk, in one parallel region. Threads take the next task when they are free.
template <class Body>
void for_each_chunk(const WorkList& work, const Body& body) {
  const auto run_task = [&](std::int64_t task) {
    for (std::int64_t i = work.task_begin(task); i < work.task_end(task); ++i) body(i);
  };
  const int threads = at::get_num_threads();
  if (threads == 1 || work.elements() <= kSerialElements) {
    for (std::int64_t task = 0; task < work.tasks(); ++task) run_task(task);
    return;
  }
  std::atomic<std::int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
    for (std::int64_t task = next++; task < work.tasks(); task = next++) run_task(task);
  });
}

}  // namespace fusedreg::cpu
