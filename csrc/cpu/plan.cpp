#include "plan.h"

#include <algorithm>
#include <cmath>

namespace fusedreg::cpu {

namespace {

DType arithmetic_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The common hyperparameters come first among a rule's fields, then the penalties.
void read_fields(const double* fields, CommonHyperparameters& common, Penalties& penalties) {
  const auto read = [&](const char*, double& field) { field = *fields++; };
  common.bind(read);
  penalties.bind(read);
}

std::vector<std::int64_t> contiguous_strides(const std::vector<std::int64_t>& sizes) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t dim = strides.size(); dim > 1; --dim) strides[dim - 2] = strides[dim - 1] * sizes[dim - 1];
  return strides;
}

}  // namespace

Plan::Plan(const std::string& rule, const Columns& columns)
    : Parameters(find_rule(rules(), rule).info, columns, true),
      kernels_(find_rule(rules(), rule)),
      work_(columns.groups.size()),
      constants_stride_((kernels_.constants_size - 1) / sizeof(std::max_align_t) + 1) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].active) take_dtypes(i);
  }
  make_work_list();
}

void Plan::take_dtypes(std::size_t i) {
  const Entry& entry = entries_[i];
  DTypes& dtypes = work_[i].dtypes;
  const DType arithmetic = arithmetic_of(entry.dtype);
  dtypes.w = entry.dtype;
  dtypes.g = entry.grad_dtype;
  dtypes.converted = Converted::kNone;
  const auto note = [&](DType dtype) {
    if (dtype == arithmetic) return;
    dtypes.converted =
        std::max(dtypes.converted, dtype == DType::kBFloat16 ? Converted::kBFloat16 : Converted::kOthers);
  };
  note(dtypes.w);
  note(dtypes.g);
  const InstructionSet& set = instruction_set();
  for_each_state(entry.needed, [&](std::size_t k) {
    dtypes.state[k] = entry.state_dtypes[k];
    dtypes.codes[k] = set.codes(dtypes.state[k], arithmetic);
    note(dtypes.state[k]);
  });
}

void Plan::choose_squares(std::size_t i) {
  const bool clamps = !std::isinf(common_[entries_[i].group].clip_value);
  work_[i].squares = instruction_set().sum_of_squares(entries_[i].grad_dtype, clamps);
}

bool Plan::refresh(PyObject* gradients) {
  return refresh_gradients(gradients, [&](std::size_t i, const void* g) {
    Entry& entry = entries_[i];
    if (!entry.active) return;
    if (g != nullptr) {
      entry.pointers.g = g;
      entry.grad_dtype = entry.dtype;
    }
    if (work_[i].dtypes.g != entry.grad_dtype) {
      take_dtypes(i);
      choose_squares(i);
    }
    // The pass comes when all are bound: a small tensor's elements are there by then.
    __builtin_prefetch(entry.pointers.w);
    __builtin_prefetch(entry.pointers.g);
    for_each_state(entry.needed, [&](std::size_t k) { __builtin_prefetch(entry.pointers.state[k]); });
  });
}

void Plan::make_work_list() {
  std::int64_t elements = 0;
  for (const Entry& entry : entries_) elements += entry.active ? entry.numel : 0;
  work_list_ = WorkList(chunk_elements(elements));
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].active) continue;
    work_list_.add_tensor(static_cast<std::int32_t>(i), entries_[i].numel, work_[i].whole);
  }
  work_list_.finish();
  partial_sums_.resize(work_list_.chunks().size());
}

// Of the parameter where the kernels find it: a staged one is contiguous.
UnitLayout Plan::layout_of_units(const Entry& entry) const {
  const int unit = static_cast<int>(penalties_[entry.group].unit);
  const auto& [sizes, strides] = *entry.layout;
  return unit_layout(sizes, !entry.is_copied() && entry.is_dense ? strides : contiguous_strides(sizes), unit);
}

UnitWork Plan::unit_work(std::size_t i) const {
  const Entry& entry = entries_[i];
  const DType arithmetic = arithmetic_of(entry.dtype);
  return {entry.pointers,
          work_[i].dtypes,
          arithmetic,
          layout_of_units(entry),
          make_unit_constants(common_[entry.group], penalties_[entry.group], kernels_.has_metric, work_[i].tau),
          work_[i].constants,
          nullptr,
          kernels_.metric(instruction_set().isa, arithmetic, entry.needed),
          kernels_.has_floor_ratio(entry.needed),
          instruction_set().units(arithmetic)};
}

void Plan::set_groups(const std::vector<std::vector<double>>& groups) {
  take_groups(groups);
  common_.clear();
  penalties_.clear();
  for (const std::vector<double>& fields : groups_) {
    read_fields(fields.data(), common_.emplace_back(), penalties_.emplace_back());
  }
  bool is_cut_otherwise = false;
  const Entry* previous = nullptr;
  UpdateKernel kernel = nullptr;  // of the previous one, and of most
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (!entry.active) continue;
    choose_squares(i);
    if (previous == nullptr || previous->group != entry.group || previous->dtype != entry.dtype ||
        previous->needed != entry.needed) {
      const double* fields = groups_.at(entry.group).data();
      kernel = kernels_.update(instruction_set().isa, arithmetic_of(entry.dtype), fields, entry.needed);
      previous = &entry;
    }
    work_[i].update = kernel;
    work_[i].has_units = has_units(common_[entry.group], penalties_[entry.group]);
    std::int64_t whole = 1;
    if (work_[i].has_units) {
      const UnitLayout layout = layout_of_units(entry);
      const bool cuts_blocks = entry.has_codes() && layout.run % kBlockOfCodes != 0;
      if (layout.outer == 1 && layout.run > 0 && layout.run <= kUnitElements && !cuts_blocks) whole = layout.run;
    }
    is_cut_otherwise |= whole != work_[i].whole;
    work_[i].whole = whole;
  }
  if (is_cut_otherwise) make_work_list();
}

double Plan::sum_of_squares(double inv_grad_scale) {
  const std::vector<Chunk>& chunks = work_list_.chunks();
  {
    std::optional<WithoutGil> no_gil;
    if (takes_long()) no_gil.emplace();
    for_each_chunk(work_list_, [&](std::int64_t i) {
      const Chunk& chunk = chunks[i];
      const Entry& entry = entries_[chunk.tensor];
      const CommonHyperparameters& common = common_[entry.group];
      partial_sums_[i] = work_[chunk.tensor].squares(entry.pointers.g, chunk.begin, chunk.count,
                                                     signed_inv_grad_scale(common, inv_grad_scale), common.clip_value);
    });
  }
  has_read_gradients_ = true;
  double sum = 0;
  for (const double partial : partial_sums_) sum += partial;
  return sum;
}

// Parameters of a group whose scalar states are equal share their constants: most are at the same step.
void Plan::prepare(double inv_grad_scale, double clip_coef) {
  constants_.resize(entries_.size() * constants_stride_);  // once: pointers into it are handed out below
  std::size_t used = 0;
  const Entry* previous = nullptr;
  Scalars before, now;
  double after[kMaxScalarStates] = {}, tau = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch_scalars(i);
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    read_scalar_states(entry, now);
    const bool shares = previous != nullptr && previous->group == entry.group && previous->dtype == entry.dtype &&
                        std::equal(std::begin(now.values), std::end(now.values), std::begin(before.values)) &&
                        before.singles == now.singles;
    if (!shares) {
      previous = &entry;
      before = now;
      std::copy(std::begin(now.values), std::end(now.values), std::begin(after));
      const double* fields = groups_[entry.group].data();
      rule_.next(fields, after, now.singles);
      tau = kernels_.fill(constants_.data() + used++ * constants_stride_, arithmetic_of(entry.dtype), fields,
                          before.values, after, inv_grad_scale, clip_coef);
    }
    work_[i].tau = tau;
    work_[i].constants = constants_.data() + (used - 1) * constants_stride_;
    write_scalar_states(now, after);
  }
}

// A parameter may have been staged, and so laid out otherwise, since it was cut into chunks.
static bool are_whole_in_chunks(const UnitLayout& layout, std::int64_t whole) {
  return layout.outer == 1 && layout.run == whole;
}

void Plan::update_chunk(const Chunk& chunk, UnitMemory& memory) const {
  const Work& work = work_[chunk.tensor];
  const Entry& entry = entries_[chunk.tensor];
  const auto update = [&] {
    work.update(entry.pointers, work.dtypes, chunk.begin, chunk.count, work.constants, nullptr, nullptr);
  };
  if (!work.has_units) return update();
  UnitWork units = unit_work(chunk.tensor);
  if (!are_whole_in_chunks(units.layout, work.whole)) return update();
  units.update = work.update;
  const std::int64_t first = chunk.begin / work.whole, count = chunk.count / work.whole;
  const std::int64_t together = std::max<std::int64_t>(kUnitTile / work.whole, 1);
  for (std::int64_t done = 0; done < count; done += together) {
    prox_of_units(units, first + done, std::min(together, count - done), memory);
  }
}

void Plan::prepare_rounding(const std::vector<std::uint32_t>& keys) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (!entry.active || !entry.rounds_stochastically) continue;
    Work& work = work_[i];
    const DType arithmetic = arithmetic_of(entry.dtype);
    const bool as_stored = !entry.is_copied() && entry.is_dense;
    if (work.places_as_stored != as_stored) {  // it may be staged in one step and not in another
      const auto& [sizes, strides] = *entry.layout;
      work.rounding.positions = Positions(entry.first_position, sizes, as_stored ? strides : contiguous_strides(sizes),
                                          entry.position_strides);
      work.places_as_stored = as_stored;
    }
    work.rounding.store_run = instruction_set().store_run(arithmetic);
    work.rounding.width = arithmetic == DType::kFloat64 ? sizeof(double) : sizeof(float);
    const std::uint32_t key = key_of(keys.at(entry.group), entry.number);
    for (std::uint32_t stream = 0; stream < Rounding::kStreams; ++stream) {
      work.rounding.keys[stream] = key_of(key, stream);
    }
    work.dtypes.rounding = &work.rounding;
  }
}

void Plan::update(double inv_grad_scale, double clip_coef, const std::vector<std::uint32_t>& rounding_keys,
                  const Items& next_seeds) {
  if (!rounding_keys.empty()) prepare_rounding(rounding_keys);  // first: it takes memory, and moves nothing
  prepare(inv_grad_scale, clip_coef);
  const std::vector<Chunk>& chunks = work_list_.chunks();
  {
    std::optional<WithoutGil> no_gil;
    if (takes_long()) no_gil.emplace();
    unit_memory_.resize(thread_count());
    // The gradients that a norm pass has read last are still in the cache.
    const Order order = has_read_gradients_ ? Order::kBackward : Order::kForward;
    has_read_gradients_ = false;
    for_each_chunk_of_worker(
        work_list_, order, [&](std::int64_t i, std::int64_t worker) { update_chunk(chunks[i], unit_memory_[worker]); });
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (!entries_[i].active || !work_[i].has_units) continue;
      const UnitWork units = unit_work(i);
      if (!are_whole_in_chunks(units.layout, work_[i].whole)) prox_of_all_units(units);
    }
  }
  finish_update();
  for (const auto& [group, seed] : next_seeds) {
    if (PyDict_SetItemString(group, "rounding_seed", seed) != 0) throw PythonError();
  }
}

}  // namespace fusedreg::cpu
