#include "plan.h"

namespace fusedreg::cpu {

namespace {

DType arithmetic_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The common hyperparameters come first among a rule's fields.
CommonHyperparameters common_of(const double* fields) {
  CommonHyperparameters common;
  common.bind([&](const char*, double& field) { field = *fields++; });
  return common;
}

}  // namespace

Plan::Plan(const std::string& rule, const Columns& columns)
    : Parameters(find_rule(rules(), rule).info, columns),
      kernels_(find_rule(rules(), rule)),
      work_(columns.params.size()),
      constants_stride_((kernels_.constants_size - 1) / sizeof(std::max_align_t) + 1) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].param().is_cpu()) throw std::invalid_argument("a CPU plan takes CPU tensors");
    const Entry& entry = entries_[i];
    if (!entry.active) continue;
    work_list_.add_tensor(static_cast<std::int32_t>(i), real_numel(entry.param()));
    DTypes& dtypes = work_[i].dtypes;
    dtypes.w = dtypes.g = entry.dtype;
    for (DType& state : dtypes.state) state = entry.dtype;
    dtypes.converted = entry.dtype != arithmetic_of(entry.dtype);
  }
  work_list_.finish();
  partial_sums_.resize(work_list_.chunks().size());
}

void Plan::set_groups(const std::vector<std::vector<double>>& groups) {
  take_groups(groups);
  common_.clear();
  for (const std::vector<double>& fields : groups_) common_.push_back(common_of(fields.data()));
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (!entry.active) continue;
    const double* fields = groups_.at(entry.group).data();
    const bool clamps = !std::isinf(common_[entry.group].clip_value);
    work_[i].update = kernels_.update(instruction_set().isa, arithmetic_of(entry.dtype), fields, entry.needed);
    work_[i].squares = instruction_set().sum_of_squares(entry.dtype, clamps);
  }
}

double Plan::sum_of_squares(double inv_grad_scale) {
  const std::vector<Chunk>& chunks = work_list_.chunks();
  {
    const py::gil_scoped_release no_gil;
    for_each_chunk(work_list_, [&](std::int64_t i) {
      const Chunk& chunk = chunks[i];
      const Entry& entry = entries_[chunk.tensor];
      const CommonHyperparameters& common = common_[entry.group];
      partial_sums_[i] = work_[chunk.tensor].squares(entry.pointers.g, chunk.begin, chunk.count,
                                                     signed_inv_grad_scale(common, inv_grad_scale), common.clip_value);
    });
  }
  double sum = 0;
  for (const double partial : partial_sums_) sum += partial;
  return sum;
}

// Parameters of a group whose scalar states are equal share their constants: most are at the same step.
void Plan::prepare(double inv_grad_scale, double clip_coef) {
  constants_.resize(entries_.size() * constants_stride_);  // once: pointers into it are handed out below
  std::size_t used = 0;
  const Entry* previous = nullptr;
  double before[kMaxScalarStates] = {}, after[kMaxScalarStates] = {}, now[kMaxScalarStates] = {};
  unsigned singles = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    read_scalar_states(entry, now);
    const bool shares = previous != nullptr && previous->group == entry.group && previous->dtype == entry.dtype &&
                        std::equal(std::begin(now), std::end(now), std::begin(before)) &&
                        singles == this->singles(entry);
    if (!shares) {
      previous = &entry;
      std::copy(std::begin(now), std::end(now), std::begin(before));
      std::copy(std::begin(now), std::end(now), std::begin(after));
      const double* fields = groups_[entry.group].data();
      singles = this->singles(entry);
      rule_.next(fields, after, singles);
      kernels_.fill(constants_.data() + used++ * constants_stride_, arithmetic_of(entry.dtype), fields, before, after,
                    inv_grad_scale, clip_coef);
    }
    work_[i].constants = constants_.data() + (used - 1) * constants_stride_;
    write_scalar_states(entry, after);
  }
}

void Plan::update(double inv_grad_scale, double clip_coef) {
  prepare(inv_grad_scale, clip_coef);
  const std::vector<Chunk>& chunks = work_list_.chunks();
  {
    const py::gil_scoped_release no_gil;
    for_each_chunk(work_list_, [&](std::int64_t i) {
      const Chunk& chunk = chunks[i];
      const Work& work = work_[chunk.tensor];
      work.update(entries_[chunk.tensor].pointers, work.dtypes, chunk.begin, chunk.count, work.constants);
    });
  }
  finish_update();
}

}  // namespace fusedreg::cpu
