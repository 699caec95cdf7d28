// The CUDA driver's plan: a parameter list of one device, with the tables that its launches walk. It speaks to the
// device through torch's allocator and copies and through the launchers of args.h alone, so that a host can play device
// in a test.
#pragma once

#include <optional>
#include <tuple>

#include "../plan/parameters.h"
#include "args.h"

namespace fusedreg::cuda {

// A scalar of a group that is a tensor on the device: group index, scalar's name, tensor.
using OnDevice = std::tuple<int, std::string, at::Tensor>;

// What a step needs beyond the groups; None where it is not given.
struct Step {
  std::uint64_t stream = 0;
  bool capturing = false;  // into a CUDA graph
  double inv_grad_scale = 1;
  std::optional<at::Tensor> grad_scale, found_inf;
};

class __attribute__((visibility("hidden"))) Plan : public Parameters {
 public:
  // host_clocks: clocks in the CPU's memory are the host's to move. False only where the host plays device.
  Plan(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
       const py::list& clocks, const py::dict& optimizer_state, bool host_clocks);

  bool set_groups(const std::vector<std::vector<double>>& groups, std::vector<OnDevice> on_device);
  bool refresh() { return refresh_gradients(); }

  // Partial sums of squares of the gradients after stages 1 and 2: the same bits in every run.
  at::Tensor sum_of_squares(const Step& step);

  // Stages 1 to 6, and the clocks. `squares` adds up to the square of the norm, which is written to `norm`.
  void update(const Step& step, const std::optional<at::Tensor>& squares, double max_grad_norm,
              const std::optional<at::Tensor>& max_grad_norm_on_device, const std::optional<at::Tensor>& norm);

 private:
  // A run of rows of one dtype that share no more slots than a launch can be given.
  struct Launch {
    DType dtype;
    int first_row, rows;
    std::int64_t first_chunk, chunks;
    bool clocks_on_device = false;
    int slot_count = 0;
    int groups[kMaxSlots];  // of the slots
    StepArgs step;
  };

  struct DeviceTables {
    at::Tensor rows, chunks, partial_sums, blocks_done;
  };

  void prepare(const Step& step);
  void assign_slots();
  bool add_to_launch(Launch& launch, Tensor& row, const Entry& entry);
  at::Tensor upload(const void* data, std::size_t bytes, const Step& step) const;
  DeviceTables make_tables(const Step& step);
  int partial_sum_count() const;

  const c10::Device device_;
  const bool host_clocks_;
  std::vector<std::size_t> order_;  // the active entries, those of a dtype side by side; a row each
  std::vector<Tensor> rows_;
  std::vector<std::int64_t> first_chunks_;  // of each row, and the end
  WorkList work_{kChunkElements};
  std::vector<OnDevice> on_device_;
  std::vector<Launch> launches_;

  DeviceTables tables_;
  std::vector<Tensor> uploaded_rows_;
  std::uint64_t uploaded_on_ = 0;
  bool has_tables_ = false;
};

}  // namespace fusedreg::cuda
