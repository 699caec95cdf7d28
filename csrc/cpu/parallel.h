// Runs the kernels over a work list on torch's own thread pool.
#pragma once

#include <atomic>

#include "../plan/work_list.h"
#include "kernels.h"
#include "threads.h"

namespace fusedreg::cpu {

// 32 Ki elements of fp32 Adam are 896 KiB: enough to amortise a call, little enough to share out evenly.
constexpr std::int64_t kChunkElements = 32 * 1024;

// Memory is read faster in long runs: of many elements, a chunk is longer, as long as there are some hundred chunks.
constexpr std::int64_t kLongestChunkElements = 128 * 1024, kLeastLongChunks = 256;

// The size of a chunk of so many elements, whoever shares them out: a sum over chunks does not depend on threads.
inline std::int64_t chunk_elements(std::int64_t elements) {
  std::int64_t size = kChunkElements;
  while (size < kLongestChunkElements && 2 * size * kLeastLongChunks <= elements) size *= 2;
  return size;
}

// Below this many elements one thread is done before a second one has woken up.
constexpr std::int64_t kSerialElements = 16 * 1024;

// Of what is left, a thread takes one in so many for each thread.
constexpr std::int64_t kShares = 8;

enum class Order { kForward, kBackward };

// Calls body(chunk index, worker) for every chunk, in one parallel region, where `worker` is below the number of
// threads and no two that run at a time have the same. A thread that is free takes a part of the tasks that are left:
// long runs first, and single tasks at the end.
template <class Body>
void for_each_chunk_of_worker(const WorkList& work, Order order, const Body& body) {
  const std::int64_t tasks = work.tasks();
  const auto run_task = [&](std::int64_t turn, std::int64_t worker) {
    const std::int64_t task = order == Order::kForward ? turn : tasks - 1 - turn;
    for (std::int64_t i = work.task_begin(task); i < work.task_end(task); ++i) body(i, worker);
  };
  const std::int64_t threads = thread_count();
  if (threads == 1 || work.elements() <= kSerialElements) {
    for (std::int64_t turn = 0; turn < tasks; ++turn) run_task(turn, 0);
    return;
  }
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, [&](std::int64_t worker, std::int64_t) {
    for (std::int64_t turn = next; turn < tasks;) {
      const std::int64_t end = turn + 1 + (tasks - turn) / (kShares * threads);
      if (!next.compare_exchange_weak(turn, end)) continue;
      for (; turn < end; ++turn) run_task(turn, worker);
      turn = next;
    }
  });
}

// Calls body(chunk index) for every chunk, likewise.
template <class Body>
void for_each_chunk(const WorkList& work, const Body& body) {
  for_each_chunk_of_worker(work, Order::kForward, [&](std::int64_t i, std::int64_t) { body(i); });
}

}  // namespace fusedreg::cpu
