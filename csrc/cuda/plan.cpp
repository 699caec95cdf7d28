#include "plan.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace fusedreg::cuda {

namespace {

DeviceScalar device_scalar(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return {};
  if (tensor->scalar_type() != at::kFloat && tensor->scalar_type() != at::kDouble) {
    throw std::invalid_argument("a scalar on the device must be float32 or float64");
  }
  return {tensor->const_data_ptr(), tensor->scalar_type() == at::kDouble};
}

bool is_aligned(const Pointers& pointers, int states) {
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(pointers.w) | reinterpret_cast<std::uintptr_t>(pointers.g);
  for (int i = 0; i < states; ++i) bits |= reinterpret_cast<std::uintptr_t>(pointers.state[i]);
  return bits % 16 == 0;
}

bool same_row(const Tensor& a, const Tensor& b) {
  return a.pointers.w == b.pointers.w && a.pointers.g == b.pointers.g &&
         std::equal(std::begin(a.pointers.state), std::end(a.pointers.state), std::begin(b.pointers.state)) &&
         a.clock == b.clock && a.slot == b.slot;
}

void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("fusedreg: a CUDA launch failed: ") + error_string(error));
}

// A graph that is replayed copies from this memory again, as long as it lives; nobody says when that ends.
void keep_for_ever(const at::Tensor& tensor) {
  static auto* const kept = new std::vector<at::Tensor>;
  kept->push_back(tensor);
}

}  // namespace

Plan::Plan(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
           const py::list& clocks, const py::dict& optimizer_state, bool host_clocks)
    : Parameters(rule, params, groups, states, clocks, optimizer_state),
      device_(entries_.at(0).param().device()),
      host_clocks_(host_clocks) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].param().device() != device_) throw std::invalid_argument("a CUDA plan takes tensors of one device");
    if (entries_[i].active) order_.push_back(i);
  }
  std::stable_sort(order_.begin(), order_.end(),
                   [&](std::size_t a, std::size_t b) { return entries_[a].dtype < entries_[b].dtype; });
  for (std::size_t row = 0; row < order_.size(); ++row) {
    first_chunks_.push_back(static_cast<std::int64_t>(work_.chunks().size()));
    work_.add_tensor(static_cast<std::int32_t>(row), real_numel(entries_[order_[row]].param()));
  }
  first_chunks_.push_back(static_cast<std::int64_t>(work_.chunks().size()));
  rows_.resize(order_.size());
}

bool Plan::set_groups(const std::vector<std::vector<double>>& groups, std::vector<OnDevice> on_device) {
  on_device_ = std::move(on_device);
  return take_groups(groups);
}

// Finds the slot of an entry's group and clock, or makes one; false where the launch has no room for it.
bool Plan::add_to_launch(Launch& launch, Tensor& row, const Entry& entry) {
  const at::Tensor& its_clock = entry.clock.tensor;
  const bool on_device = its_clock.defined() && !(its_clock.is_cpu() && host_clocks_);
  const double clock = on_device ? 0 : entry.clock.read();
  row.clock = on_device ? its_clock.data_ptr() : nullptr;
  row.clock_is_double = on_device && its_clock.scalar_type() == at::kDouble;
  const int used = launch.slot_count;
  for (row.slot = 0; row.slot < used; ++row.slot) {
    if (launch.groups[row.slot] == entry.group && launch.step.slots[row.slot].clock == clock) break;
  }
  if (row.slot == used) {
    const auto is_ours = [&](const OnDevice& scalar) { return std::get<0>(scalar) == entry.group; };
    const auto overrides = std::count_if(on_device_.begin(), on_device_.end(), is_ours);
    if (used == kMaxSlots || launch.step.override_count + overrides > kMaxOverrides) return false;
    launch.groups[used] = entry.group;
    launch.step.slots[used] = {groups_[entry.group], clock};
    ++launch.slot_count;
    for (const OnDevice& scalar : on_device_) {
      if (!is_ours(scalar)) continue;
      const auto& [group, name, tensor] = scalar;
      launch.step.overrides[launch.step.override_count++] = {device_scalar(tensor), used, group_field(name)};
    }
  }
  launch.clocks_on_device = launch.clocks_on_device || row.clock != nullptr;
  return true;
}

void Plan::assign_slots() {
  launches_.clear();
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const Entry& entry = entries_[order_[i]];
    Tensor& row = rows_[i];
    row.pointers = entry.pointers;
    row.aligned = is_aligned(entry.pointers, entry.used);
    const auto begin_launch = [&] {
      Launch& launch = launches_.emplace_back();
      launch.dtype = entry.dtype;
      launch.first_row = static_cast<int>(i);
      launch.first_chunk = first_chunks_[i];
    };
    if (launches_.empty() || launches_.back().dtype != entry.dtype) begin_launch();
    if (!add_to_launch(launches_.back(), row, entry)) {
      begin_launch();
      if (!add_to_launch(launches_.back(), row, entry)) {
        throw std::invalid_argument("a group has more scalars on the device than a launch can be given");
      }
    }
    launches_.back().rows = static_cast<int>(i) + 1 - launches_.back().first_row;
    launches_.back().chunks = first_chunks_[i + 1] - launches_.back().first_chunk;
  }
}

at::Tensor Plan::upload(const void* data, std::size_t bytes, const Step& step) const {
  const auto size = static_cast<std::int64_t>(bytes);
  // From pageable memory the copy would wait for the device.
  const auto options = at::TensorOptions().dtype(at::kByte);
  const at::Tensor host = at::empty({size}, options.pinned_memory(device_.is_cuda()));
  std::memcpy(host.mutable_data_ptr(), data, bytes);
  const at::Tensor on_device = at::empty({size}, options.device(device_));
  on_device.copy_(host, /*non_blocking=*/true);
  if (step.capturing) keep_for_ever(host);
  return on_device;
}

int Plan::partial_sum_count() const {
  int count = 0;
  for (const Launch& launch : launches_)
    count += static_cast<int>(std::min<std::int64_t>(launch.chunks, kMaxPartialSums));
  return count;
}

Plan::DeviceTables Plan::make_tables(const Step& step) {
  DeviceTables tables;
  const auto options = at::TensorOptions().device(device_);
  tables.chunks = upload(work_.chunks().data(), work_.chunks().size() * sizeof(Chunk), step);
  tables.blocks_done = at::zeros({1}, options.dtype(at::kInt));
  return tables;
}

// Brings the tables on the device up to date.
void Plan::prepare(const Step& step) {
  assign_slots();
  for (Launch& launch : launches_) {
    launch.step.inv_grad_scale = step.inv_grad_scale;
    launch.step.grad_scale = device_scalar(step.grad_scale);
    launch.step.found_inf = device_scalar(step.found_inf);
  }
  // What is uploaded into a graph is there only when it is replayed: a graph has tables of its own. So has a stream:
  // torch's allocator takes memory back in the order of the stream that it was asked for on.
  if (!has_tables_ || step.capturing || uploaded_on_ != step.stream) {
    tables_ = make_tables(step);
    uploaded_rows_.clear();
    uploaded_on_ = step.stream;
  }
  has_tables_ = !step.capturing;
  if (uploaded_rows_.size() != rows_.size() ||
      !std::equal(rows_.begin(), rows_.end(), uploaded_rows_.begin(), same_row)) {
    tables_.rows = upload(rows_.data(), rows_.size() * sizeof(Tensor), step);
    uploaded_rows_ = rows_;
  }
}

at::Tensor Plan::sum_of_squares(const Step& step) {
  const c10::DeviceGuard guard(device_);
  prepare(step);
  const int count = partial_sum_count();
  if (!tables_.partial_sums.defined() || tables_.partial_sums.numel() != count) {
    tables_.partial_sums = at::empty({count}, at::TensorOptions().device(device_).dtype(at::kDouble));
  }
  double* next = count > 0 ? tables_.partial_sums.mutable_data_ptr<double>() : nullptr;
  for (const Launch& launch : launches_) {
    if (launch.chunks == 0) continue;
    SquaresArgs args;
    args.step = launch.step;
    args.tensors = static_cast<const Tensor*>(tables_.rows.const_data_ptr());
    args.chunks = static_cast<const Chunk*>(tables_.chunks.const_data_ptr()) + launch.first_chunk;
    args.chunk_count = static_cast<std::int32_t>(launch.chunks);
    args.partial_sums = next;
    const int blocks = std::min(args.chunk_count, kMaxPartialSums);
    check(launch_sum_of_squares(launch.dtype, args, blocks, reinterpret_cast<void*>(step.stream)));
    next += blocks;
  }
  return tables_.partial_sums;
}

void Plan::update(const Step& step, const std::optional<at::Tensor>& squares, double max_grad_norm,
                  const std::optional<at::Tensor>& max_grad_norm_on_device, const std::optional<at::Tensor>& norm) {
  const c10::DeviceGuard guard(device_);
  if (!squares) prepare(step);  // else sum_of_squares has
  for (const Launch& launch : launches_) {
    UpdateArgs args;
    args.step = launch.step;
    args.tensors = static_cast<const Tensor*>(tables_.rows.const_data_ptr());
    args.chunks = static_cast<const Chunk*>(tables_.chunks.const_data_ptr()) + launch.first_chunk;
    args.chunk_count = static_cast<std::int32_t>(launch.chunks);
    args.first_tensor = launch.first_row;
    args.tensor_count = launch.rows;
    if (squares) {
      args.partial_sums = squares->const_data_ptr<double>();
      args.partial_sum_count = static_cast<std::int32_t>(squares->numel());
      args.max_grad_norm = max_grad_norm;
      args.max_grad_norm_on_device = device_scalar(max_grad_norm_on_device);
      args.norm = norm.value().mutable_data_ptr<double>();
    }
    if (launch.clocks_on_device) args.blocks_done = static_cast<unsigned*>(tables_.blocks_done.mutable_data_ptr());
    check(launch_update(rule_, launch.dtype, args, reinterpret_cast<void*>(step.stream)));
  }
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const Entry& entry = entries_[order_[i]];
    if (rows_[i].clock != nullptr) continue;  // the device moves it
    Rules::visit(rule_, [&](auto host) {
      entry.clock.write(decltype(host)::next_clock(groups_[entry.group], entry.clock.read()));
    });
  }
  finish_update();
}

}  // namespace fusedreg::cuda
