// What a launch is given: plain structs, the same for the device and for a host that plays device in a test.
#pragma once

#include "../chunks.h"
#include "../update.h"

namespace fusedreg::cuda {

constexpr int kThreads = 256;  // of a block; one block takes one chunk

// 16 Ki elements of fp32 Adam move 448 KiB: long enough to hide what a block does before its first load, short enough
// that the last blocks of a launch do not keep the device waiting.
constexpr std::int64_t kChunkElements = 16 * 1024;

// The norm: this many partial sums at the most, each a fixed set of chunks added up in a fixed order.
constexpr int kMaxPartialSums = 512;

// One parameter. `slot` tells where its scalars are in UpdateArgs.
struct Tensor {
  Pointers pointers;
  void* clock = nullptr;  // the rule's clock on the device, or null where the host keeps it
  std::int32_t slot = 0;
  bool clock_is_double = false;
  bool aligned = false;  // all pointers at multiples of 16 bytes
};

// A scalar of the step that only the device knows: a float or double in its memory.
struct DeviceScalar {
  const void* at = nullptr;
  bool is_double = false;

  FUSEDREG_HD explicit operator bool() const { return at != nullptr; }
  FUSEDREG_HD double read() const {
    return is_double ? *static_cast<const double*>(at) : static_cast<double>(*static_cast<const float*>(at));
  }
};

// A group's scalar that is a tensor on the device, such as a learning rate that a CUDA graph must see change. What a
// clock is moved by (SGD's momentum) cannot be one.
struct GroupOverride {
  DeviceScalar value;
  std::int32_t slot = 0;
  std::int32_t field = 0;  // the index of the double in Group
};

// Parameters of the same group and at the same step share a slot.
struct Slot {
  Group group;
  double clock = 0;  // where the host keeps it
};

// Kernel parameters of any GPU hold 4 KiB. Where there are more slots, a step takes more than one launch.
constexpr int kMaxSlots = 24;
constexpr int kMaxOverrides = 16;

struct StepArgs {
  Slot slots[kMaxSlots];
  GroupOverride overrides[kMaxOverrides];
  std::int32_t override_count = 0;
  double inv_grad_scale = 1;
  DeviceScalar grad_scale;  // in place of inv_grad_scale, where it is given
  DeviceScalar found_inf;
};

struct SquaresArgs {
  StepArgs step;
  const Tensor* tensors = nullptr;
  const Chunk* chunks = nullptr;
  std::int32_t chunk_count = 0;
  double* partial_sums = nullptr;  // gridDim.x of them
};

struct UpdateArgs {
  StepArgs step;
  const Tensor* tensors = nullptr;
  const Chunk* chunks = nullptr;
  std::int32_t chunk_count = 0;
  std::int32_t first_tensor = 0;
  std::int32_t tensor_count = 0;
  // max_grad_norm: what the norm pass left, and where the norm goes. Null where nothing is clipped.
  const double* partial_sums = nullptr;
  std::int32_t partial_sum_count = 0;
  double max_grad_norm = 0;
  DeviceScalar max_grad_norm_on_device;
  double* norm = nullptr;
  // Counts the blocks that are done; the last one moves the clocks on. Null where the host keeps them all.
  unsigned* blocks_done = nullptr;
};

static_assert(sizeof(UpdateArgs) <= 4096 && sizeof(SquaresArgs) <= 4096);

// Launched on the current device. Both return a cudaError_t.
int launch_sum_of_squares(DType dtype, const SquaresArgs& args, int blocks, void* stream);
int launch_update(int rule, DType dtype, const UpdateArgs& args, void* stream);
const char* error_string(int error);

}  // namespace fusedreg::cuda
