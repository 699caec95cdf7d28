#include "plan.h"

namespace fusedreg::cpu {

Plan::Plan(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
           const py::list& clocks, const py::dict& optimizer_state)
    : Parameters(rule, params, groups, states, clocks, optimizer_state), kernels_(params.size()) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].param().is_cpu()) throw std::invalid_argument("a CPU plan takes CPU tensors");
    if (entries_[i].active) work_.add_tensor(static_cast<std::int32_t>(i), real_numel(entries_[i].param()));
  }
  work_.finish();
  partial_sums_.resize(work_.chunks().size());
}

bool Plan::set_groups(const std::vector<std::vector<double>>& groups) {
  if (!take_groups(groups)) return false;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].active) continue;
    const Group& group = groups_[entries_[i].group];
    kernels_[i].update = instruction_set().update(rule_, group, entries_[i].dtype);
    kernels_[i].squares = instruction_set().sum_of_squares(group, entries_[i].dtype);
  }
  return true;
}

double Plan::sum_of_squares(double inv_grad_scale) {
  std::vector<Hyper<double>> hypers(groups_.size());
  for (std::size_t i = 0; i < groups_.size(); ++i) fill_gradient_hyper(hypers[i], groups_[i], inv_grad_scale, 1);
  const std::vector<Chunk>& chunks = work_.chunks();
  {
    const py::gil_scoped_release no_gil;
    for_each_chunk(work_, [&](std::int64_t i) {
      const Chunk& chunk = chunks[i];
      const Entry& entry = entries_[chunk.tensor];
      const SquaresKernel squares = kernels_[chunk.tensor].squares;
      partial_sums_[i] = squares(entry.pointers.g, chunk.begin, chunk.count, hypers[entry.group]);
    });
  }
  double sum = 0;
  for (const double partial : partial_sums_) sum += partial;
  return sum;
}

void Plan::update(double inv_grad_scale, double clip_coef) {
  hypers_.clear();
  double previous_clock = 0;
  int previous_group = -1;
  double next_clock = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    const double clock = entry.clock.read();
    // Most parameters of a group are at the same step, and so share their scalars.
    if (entry.group != previous_group || clock != previous_clock) {
      previous_group = entry.group;
      previous_clock = clock;
      const Group& group = groups_[entry.group];
      Rules::visit(rule_, [&](auto host) {
        using RuleHost = decltype(host);
        next_clock = RuleHost::next_clock(group, clock);
        hypers_.push_back(make_hyper<RuleHost>(group, inv_grad_scale, clip_coef, clock));
      });
    }
    kernels_[i].hyper = static_cast<int>(hypers_.size()) - 1;
    entry.clock.write(next_clock);
  }
  const std::vector<Chunk>& chunks = work_.chunks();
  {
    const py::gil_scoped_release no_gil;
    for_each_chunk(work_, [&](std::int64_t i) {
      const Chunk& chunk = chunks[i];
      const Kernels& kernels = kernels_[chunk.tensor];
      kernels.update(entries_[chunk.tensor].pointers, chunk.begin, chunk.count, hypers_[kernels.hyper]);
    });
  }
  finish_update();
}

}  // namespace fusedreg::cpu
