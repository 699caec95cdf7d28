// The work list of the CPU: tensors cut into chunks, chunks gathered into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fusedreg {

struct Chunk {
  std::int32_t tensor;
  std::int64_t begin;
  std::int64_t count;
};

// The size of a chunk does not go by threads, so that a sum over chunks does not depend on who takes which.
class WorkList {
 public:
  explicit WorkList(std::int64_t chunk_elements) : chunk_elements_(chunk_elements) {}

  // `unit` elements that follow each other, at most a chunk's, are not cut.
  void add_tensor(std::int32_t tensor, std::int64_t numel, std::int64_t unit = 1) {
    const std::int64_t size = chunk_elements_ / unit * unit;
    for (std::int64_t begin = 0; begin < numel; begin += size) {
      const std::int64_t count = std::min(size, numel - begin);
      chunks_.push_back({tensor, begin, count});
      elements_ += count;
      pending_ += count;
      if (pending_ >= size) close_task();
    }
  }

  void finish() {
    if (pending_ > 0) close_task();
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  std::int64_t elements() const { return elements_; }

  // A task is a run of chunks worth handing to a thread: many small tensors, or one chunk of a large one.
  std::int64_t tasks() const { return static_cast<std::int64_t>(tasks_.size()) - 1; }
  std::int64_t task_begin(std::int64_t task) const { return tasks_[task]; }
  std::int64_t task_end(std::int64_t task) const { return tasks_[task + 1]; }

 private:
  void close_task() {
    tasks_.push_back(static_cast<std::int64_t>(chunks_.size()));
    pending_ = 0;
  }

  std::int64_t chunk_elements_;
  std::vector<Chunk> chunks_;
  std::vector<std::int64_t> tasks_ = {0};
  std::int64_t elements_ = 0;
  std::int64_t pending_ = 0;
};

}  // namespace fusedreg
