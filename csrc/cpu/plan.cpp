#include "plan.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <stdexcept>

namespace fusedreg::cpu {

namespace {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf ||
         type == at::kComplexFloat || type == at::kComplexDouble;
}

// A complex number is two real ones side by side, as in torch's own optimizers.
DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
    case at::kComplexDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

py::object interned(const std::string& name) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()));
}

std::int64_t real_numel(const at::Tensor& tensor) { return tensor.numel() * (tensor.is_complex() ? 2 : 1); }

bool is_plain(const at::Tensor& tensor) { return !tensor.is_conj() && !tensor.is_neg(); }

bool same_shape_and_dtype(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.is_cpu() && a.layout() == at::kStrided && a.sizes() == b.sizes();
}

double read_scalar(const at::Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>() : *scalar.const_data_ptr<float>();
}

void write_scalar(const at::Tensor& scalar, double value) {
  if (scalar.scalar_type() == at::kDouble) {
    *scalar.mutable_data_ptr<double>() = value;
  } else {
    *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

}  // namespace

int rule_index(const std::string& name) {
  for (int i = 0; i < Rules::kSize; ++i) {
    bool found = false;
    Rules::visit(i, [&](auto host) { found = name == decltype(host)::kName; });
    if (found) return i;
  }
  throw std::invalid_argument("no such rule: " + name);
}

std::vector<std::string> state_names(int rule) {
  std::vector<std::string> names;
  Rules::visit(rule, [&](auto host) {
    for (const char* name : decltype(host)::kStateNames) names.emplace_back(name);
  });
  return names;
}

#define FUSEDREG_NAME(name) #name,
constexpr const char* kCommonScalarNames[] = {FUSEDREG_COMMON_SCALARS(FUSEDREG_NAME)};
#undef FUSEDREG_NAME

std::vector<std::string> scalar_names(int rule) {
  std::vector<std::string> names(std::begin(kCommonScalarNames), std::end(kCommonScalarNames));
  Rules::visit(rule, [&](auto host) {
    for (const char* name : decltype(host)::kScalarNames) names.emplace_back(name);
  });
  return names;
}

namespace {

Group make_group(const std::vector<std::string>& names, const std::vector<double>& values) {
  Group group;
  for (std::size_t i = 0; i < names.size(); ++i) {
#define FUSEDREG_SET(name) \
  if (names[i] == #name) group.name = values[i];
    FUSEDREG_ALL_SCALARS(FUSEDREG_SET)
#undef FUSEDREG_SET
  }
  return group;
}

}  // namespace

Plan::~Plan() = default;

Plan::Plan(const std::string& rule, py::list params, std::vector<int> groups, py::list states, py::list clocks)
    : rule_(rule_index(rule)) {
  const std::vector<std::string> names = state_names(rule_);
  for (const std::string& name : names) watched_keys_.push_back(interned(name));
  watched_keys_.push_back(interned("step"));
  entries_.reserve(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    Entry& entry = entries_.emplace_back();
    entry.param = params[i].cast<at::Tensor>();
    if (!entry.param.is_cpu() || !is_supported(entry.param.scalar_type())) {
      throw std::invalid_argument("a CPU plan takes floating point and complex CPU tensors");
    }
    entry.group = groups[i];
    entry.dtype = dtype_of(entry.param);
    entry.active = !states[i].is_none();
    entry.states = 0;
    entry.watched.fill(nullptr);
    if (!entry.active) continue;
    entry.data = entry.param.const_data_ptr();
    entry.strides = entry.param.strides().vec();
    entry.state_dict = states[i];
    for (std::size_t k = 0; k < watched_keys_.size(); ++k) {
      entry.watched[k] = PyDict_GetItem(entry.state_dict.ptr(), watched_keys_[k].ptr());
      if (k < names.size() && k == static_cast<std::size_t>(entry.states) && entry.watched[k] != nullptr) {
        entry.state[entry.states++] = py::reinterpret_borrow<py::object>(entry.watched[k]).cast<at::Tensor>();
      }
    }
    if (!clocks[i].is_none()) entry.clock = clocks[i].cast<at::Tensor>();
    work_.add_tensor(static_cast<std::int32_t>(i), real_numel(entry.param));
  }
  work_.finish();
  partial_sums_.resize(work_.chunks().size());
}

bool Plan::set_groups(const std::vector<std::vector<double>>& groups) {
  const std::vector<std::string> names = scalar_names(rule_);
  groups_.clear();
  for (const std::vector<double>& values : groups) {
    if (values.size() != names.size()) throw std::invalid_argument("a group has another number of scalars");
    groups_.push_back(make_group(names, values));
  }
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    const Group& group = groups_.at(entry.group);
    int needed = 0;
    Rules::visit(rule_, [&](auto host) { needed = decltype(host)::state_count(group); });
    if (entry.states < needed) return false;
    entry.update_kernel = instruction_set().update(rule_, group, entry.dtype);
    entry.squares_kernel = instruction_set().sum_of_squares(group, entry.dtype);
  }
  return true;
}

bool Plan::is_current(const Entry& entry) const {
  const at::Tensor& grad = entry.param.grad();
  if (grad.defined() != entry.active) return false;
  if (!entry.active) return true;
  if (!same_shape_and_dtype(grad, entry.param) || dtype_of(entry.param) != entry.dtype) return false;
  if (entry.param.const_data_ptr() != entry.data || entry.param.strides() != entry.strides) return false;
  // opt.state and this entry hold the dict; where only this entry is left, opt.state has got another one.
  if (Py_REFCNT(entry.state_dict.ptr()) < 2) return false;
  for (std::size_t k = 0; k < watched_keys_.size(); ++k) {
    if (entry.watched[k] == nullptr) continue;  // not there, and not needed
    if (PyDict_GetItem(entry.state_dict.ptr(), watched_keys_[k].ptr()) != entry.watched[k]) return false;
  }
  for (int i = 0; i < entry.states; ++i) {
    if (!same_shape_and_dtype(entry.state[i], entry.param)) return false;
  }
  return true;
}

// Between two steps a training loop has driven all this out of the caches; asking ahead overlaps the misses.
void Plan::prefetch(std::size_t i) const {
  constexpr std::size_t kAhead = 6;
  if (i + kAhead >= entries_.size()) return;
  const Entry& entry = entries_[i + kAhead];
  const auto touch = [](const void* at) {
    __builtin_prefetch(at);
    __builtin_prefetch(static_cast<const char*>(at) + 64);
    __builtin_prefetch(static_cast<const char*>(at) + 128);
  };
  touch(entry.param.unsafeGetTensorImpl());
  touch(entry.state_dict.ptr());
  for (int k = 0; k < entry.states; ++k) touch(entry.state[k].unsafeGetTensorImpl());
  if (entry.clock.defined()) touch(entry.clock.unsafeGetTensorImpl());
}

bool Plan::refresh() {
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    Entry& entry = entries_[i];
    if (!is_current(entry)) return false;
    if (!entry.active) continue;
    elements += real_numel(entry.param);
    bind(entry);
  }
  return elements == work_.elements();
}

void Plan::bind(Entry& entry) {
  const at::Tensor& grad = entry.param.grad();
  bool fast = entry.param.is_non_overlapping_and_dense() && grad.strides() == entry.strides && is_plain(grad) &&
              is_plain(entry.param);
  for (int i = 0; i < entry.states; ++i) fast = fast && entry.state[i].strides() == entry.strides;
  if (!fast) return stage(entry, grad);
  entry.staged.reset();
  entry.pointers.w = entry.param.data_ptr();
  entry.pointers.g = grad.const_data_ptr();
  for (int i = 0; i < entry.states; ++i) entry.pointers.state[i] = entry.state[i].data_ptr();
}

void Plan::stage(Entry& entry, const at::Tensor& grad) {
  const c10::NoGradGuard no_grad;
  const auto copy = [](const at::Tensor& from) {
    at::Tensor to = at::empty(from.sizes(), from.options());
    to.copy_(from);
    return to;
  };
  entry.staged = std::make_unique<Staged>();
  entry.pointers.w = (entry.staged->param = copy(entry.param)).data_ptr();
  entry.pointers.g = (entry.staged->grad = copy(grad)).const_data_ptr();
  for (int i = 0; i < entry.states; ++i) {
    entry.pointers.state[i] = (entry.staged->state[i] = copy(entry.state[i])).data_ptr();
  }
}

void Plan::unstage(Entry& entry) {
  const c10::NoGradGuard no_grad;
  // detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
  entry.param.detach().copy_(entry.staged->param);
  for (int i = 0; i < entry.states; ++i) entry.state[i].detach().copy_(entry.staged->state[i]);
  entry.staged.reset();
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
      partial_sums_[i] = entry.squares_kernel(entry.pointers.g, chunk.begin, chunk.count, hypers[entry.group]);
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
    double clock = entry.clock.defined() ? read_scalar(entry.clock) : 0;
    // Most parameters of a group are at the same step, and so share their scalars.
    if (entry.group != previous_group || clock != previous_clock) {
      previous_group = entry.group;
      previous_clock = next_clock = clock;
      Rules::visit(rule_, [&](auto host) {
        hypers_.push_back(make_hyper<decltype(host)>(groups_[entry.group], inv_grad_scale, clip_coef, next_clock));
      });
    }
    entry.hyper = static_cast<int>(hypers_.size()) - 1;
    if (entry.clock.defined()) write_scalar(entry.clock, next_clock);
  }
  const std::vector<Chunk>& chunks = work_.chunks();
  {
    const py::gil_scoped_release no_gil;
    for_each_chunk(work_, [&](std::int64_t i) {
      const Chunk& chunk = chunks[i];
      const Entry& entry = entries_[chunk.tensor];
      entry.update_kernel(entry.pointers, chunk.begin, chunk.count, hypers_[entry.hyper]);
    });
  }
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    if (entry.staged) {
      unstage(entry);
      continue;
    }
    // Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest.
    entry.param.unsafeGetTensorImpl()->bump_version();
    for (int k = 0; k < entry.states; ++k) entry.state[k].unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace fusedreg::cpu
