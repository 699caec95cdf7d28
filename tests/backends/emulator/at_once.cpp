// Every thread of a block is a thread of the CPU's, and a few blocks run at once, in an order drawn by lot.
//
// Blocks know nothing of each other, but that all begin after the launch and end before it returns. Each has shared
// memory of its own. So ThreadSanitizer sees the kernels' own barriers and no others, and reports a race wherever two
// threads meet without one, however they happened to be run. A barrier can be hidden from it, which is how a test takes
// it away: all still wait there, so that nothing hangs, and a race does not go by who was first.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

// ThreadSanitizer's: what a thread does between the two orders nothing.
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);

namespace emulator {

namespace {

constexpr unsigned kBlocksAtOnce = 3;

struct Block {
  Block(unsigned its_index, unsigned threads) : index(its_index) {
    pthread_barrier_init(&barrier, nullptr, threads);
    std::memset(memory, 0xff, sizeof(memory));  // NaN, until something is written
  }
  ~Block() { pthread_barrier_destroy(&barrier); }

  unsigned index;
  pthread_barrier_t barrier;
  // Of three votes: the one before, whose count some may still read, this one, and the next. Relaxed: a barrier orders.
  std::atomic<int> votes[3] = {};
  alignas(16) char memory[kSharedMemory];
};

struct Launch {
  const std::function<void()>* kernel;
  unsigned blocks;
  bool hides;  // a barrier
  std::vector<std::unique_ptr<Block>> order;
};

// What a test sets before a launch, and reads after it.
struct Settings {
  std::mt19937 lot;
  std::string hidden_in, twice;
  std::set<int> hidden;
  std::map<std::string, int> barriers;  // of each kernel, the most of a block
} settings;

thread_local Block* its_block;
thread_local bool hides;
thread_local int barriers_passed, votes_taken;

void wait_for_all() {
  const bool is_hidden = hides && settings.hidden.count(barriers_passed) != 0;
  ++barriers_passed;
  if (is_hidden) AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  pthread_barrier_wait(&its_block->barrier);
  if (is_hidden) AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}

// Threads that live as long as the process does: to start them takes longer than most launches.
class Pool {
 public:
  explicit Pool(unsigned threads) : threads_(threads) {
    pthread_barrier_init(&all_begin_, nullptr, kBlocksAtOnce * threads);
    for (unsigned group = 0; group < kBlocksAtOnce; ++group) {
      for (unsigned thread = 0; thread < threads; ++thread) {
        std::thread([this, group, thread] { work(group, thread); }).detach();
      }
    }
  }

  int run(const Launch& launch, unsigned threads) {
    if (threads != threads_) std::abort();
    std::unique_lock lock(mutex_);
    launch_ = &launch;
    busy_ = kBlocksAtOnce * threads_;
    most_barriers_ = 0;
    ++launches_;
    begun_.notify_all();
    done_.wait(lock, [&] { return busy_ == 0; });
    return most_barriers_;
  }

 private:
  void work(unsigned group, unsigned thread) {
    threadIdx.x = thread;
    std::unique_lock lock(mutex_);
    for (int launches = 0;; ++launches) {
      begun_.wait(lock, [&] { return launches_ > launches; });
      lock.unlock();
      // Or the lock would order one that begins late behind one that has ended, and a race of theirs not be seen.
      pthread_barrier_wait(&all_begin_);
      int most = 0;
      gridDim.x = launch_->blocks;
      hides = launch_->hides;
      for (std::size_t i = group; i < launch_->order.size(); i += kBlocksAtOnce) {
        its_block = launch_->order[i].get();
        blockIdx.x = its_block->index;
        barriers_passed = votes_taken = 0;
        (*launch_->kernel)();
        most = std::max(most, barriers_passed);
      }
      lock.lock();
      most_barriers_ = std::max(most_barriers_, most);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const unsigned threads_;
  std::mutex mutex_;
  std::condition_variable begun_, done_;
  pthread_barrier_t all_begin_;
  const Launch* launch_ = nullptr;
  int launches_ = 0, most_barriers_ = 0;
  unsigned busy_ = 0;
};

}  // namespace

void* shared_memory() { return its_block->memory; }

void launch(const char* name, unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  static Pool* const pool = new Pool(threads);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), settings.lot);
  Launch launch{&kernel, blocks, name == settings.hidden_in, {}};
  for (const unsigned block : order) {
    for (int i = 0; i < (name == settings.twice ? 2 : 1); ++i) {
      launch.order.push_back(std::make_unique<Block>(block, threads));
    }
  }
  int& barriers = settings.barriers[name];
  barriers = std::max(barriers, pool->run(launch, threads));
}

}  // namespace emulator

void __syncthreads() { emulator::wait_for_all(); }

int __syncthreads_or(int predicate) {
  using namespace emulator;
  const int vote = votes_taken++;
  if (predicate != 0) its_block->votes[vote % 3].store(1, std::memory_order_relaxed);
  wait_for_all();
  // The one before was counted by all; the one after the next begins when all have come to the next.
  if (threadIdx.x == 0) its_block->votes[(vote + 2) % 3].store(0, std::memory_order_relaxed);
  return its_block->votes[vote % 3].load(std::memory_order_relaxed);
}

extern "C" {

// The order of blocks in the launches to come.
void fusedreg_draw(unsigned seed) { emulator::settings.lot.seed(seed); }

// From now on nobody sees this one, too, of the barriers that a kernel's block passes; they are counted from 0.
void fusedreg_hide_barrier(const char* kernel, int barrier) {
  emulator::settings.hidden_in = kernel;
  emulator::settings.hidden.insert(barrier);
}

// From now on each block of the kernel runs twice, both at once.
void fusedreg_run_twice(const char* kernel) { emulator::settings.twice = kernel; }

// How many barriers a block of a kernel has passed, at the most. 0 where it was not launched.
int fusedreg_barriers(const char* kernel) { return emulator::settings.barriers[kernel]; }
}
