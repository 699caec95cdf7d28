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
    FUSEDREG_COMMON_SCALARS(FUSEDREG_SET)
    FUSEDREG_ADAM_SCALARS(FUSEDREG_SET)
    FUSEDREG_SGD_SCALARS(FUSEDREG_SET)
#undef FUSEDREG_SET
  }
  return group;
}

}  // namespace

Plan::Plan(const std::string& rule, py::list params, std::vector<int> groups, py::list states, py::list clocks)
    : rule_(rule_index(rule)) {
  const std::vector<std::string> names = state_names(rule_);
  entries_.reserve(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    Entry entry{};
    entry.param_object = params[i];
    entry.param = params[i].cast<at::Tensor>();
    entry.group = groups[i];
    if (!entry.param.is_cpu() || !is_supported(entry.param.scalar_type())) {
      throw std::invalid_argument("a CPU plan takes floating point and complex CPU tensors");
    }
    entry.dtype = dtype_of(entry.param);
    entry.active = !states[i].is_none();
    if (entry.active) {
      entry.state_dict = states[i];
      const auto watch = [&](const std::string& name) -> at::Tensor {
        const py::object key = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()));
        PyObject* value = PyDict_GetItem(entry.state_dict.ptr(), key.ptr());
        if (value == nullptr) return {};
        entry.watched.emplace_back(key, py::reinterpret_borrow<py::object>(value));
        return py::reinterpret_borrow<py::object>(value).cast<at::Tensor>();
      };
      for (const std::string& name : names) {
        at::Tensor state = watch(name);
        if (!state.defined()) break;
        entry.state.push_back(std::move(state));
      }
      if (!clocks[i].is_none()) entry.clock = clocks[i].cast<at::Tensor>();
      watch("step");
    }
    entries_.push_back(std::move(entry));
    const Entry& added = entries_.back();
    if (added.active) work_.add_tensor(static_cast<std::int32_t>(i), real_numel(added.param));
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
    if (static_cast<int>(entry.state.size()) < needed) return false;
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
  // opt.state and this entry hold the dict; where only this entry is left, opt.state has got another one.
  if (Py_REFCNT(entry.state_dict.ptr()) < 2) return false;
  for (const auto& [key, value] : entry.watched) {
    if (PyDict_GetItem(entry.state_dict.ptr(), key.ptr()) != value.ptr()) return false;
  }
  for (const at::Tensor& state : entry.state) {
    if (!same_shape_and_dtype(state, entry.param)) return false;
  }
  return true;
}

bool Plan::refresh() {
  std::int64_t elements = 0;
  for (const Entry& entry : entries_) {
    if (!is_current(entry)) return false;
    if (entry.active) elements += real_numel(entry.param);
  }
  if (elements != work_.elements()) return false;
  for (Entry& entry : entries_) {
    if (entry.active) bind(entry);
  }
  return true;
}

void Plan::bind(Entry& entry) {
  const at::Tensor& grad = entry.param.grad();
  const auto strides = entry.param.strides();
  bool fast = entry.param.is_non_overlapping_and_dense() && grad.strides() == strides && is_plain(grad) &&
              is_plain(entry.param);
  for (const at::Tensor& state : entry.state) fast = fast && state.strides() == strides;
  entry.staged = !fast;
  if (entry.staged) return stage(entry, grad);
  entry.pointers.w = entry.param.data_ptr();
  entry.pointers.g = grad.const_data_ptr();
  for (std::size_t i = 0; i < entry.state.size(); ++i) entry.pointers.state[i] = entry.state[i].data_ptr();
}

void Plan::stage(Entry& entry, const at::Tensor& grad) {
  const c10::NoGradGuard no_grad;
  const auto copy = [](const at::Tensor& from) {
    at::Tensor to = at::empty(from.sizes(), from.options());
    to.copy_(from);
    return to;
  };
  entry.pointers.w = (entry.staged_tensors[0] = copy(entry.param)).data_ptr();
  entry.pointers.g = (entry.staged_tensors[1] = copy(grad)).const_data_ptr();
  for (std::size_t i = 0; i < entry.state.size(); ++i) {
    entry.pointers.state[i] = (entry.staged_tensors[2 + i] = copy(entry.state[i])).data_ptr();
  }
}

void Plan::unstage(Entry& entry) {
  const c10::NoGradGuard no_grad;
  // detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
  entry.param.detach().copy_(entry.staged_tensors[0]);
  for (std::size_t i = 0; i < entry.state.size(); ++i) entry.state[i].detach().copy_(entry.staged_tensors[2 + i]);
  for (at::Tensor& tensor : entry.staged_tensors) tensor.reset();
}

double Plan::sum_of_squares(double grad_scale) {
  std::vector<Hyper<double>> hypers(groups_.size());
  for (std::size_t i = 0; i < groups_.size(); ++i) fill_gradient_hyper(hypers[i], groups_[i], grad_scale, 1);
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

void Plan::update(double grad_scale, double clip_coef) {
  hypers_.clear();
  double previous_clock = 0;
  int previous_group = -1;
  double next_clock = 0;
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    double clock = entry.clock.defined() ? read_scalar(entry.clock) : 0;
    // Most parameters of a group are at the same step, and so share their scalars.
    if (entry.group != previous_group || clock != previous_clock) {
      previous_group = entry.group;
      previous_clock = next_clock = clock;
      Rules::visit(rule_, [&](auto host) {
        hypers_.push_back(make_hyper<decltype(host)>(groups_[entry.group], grad_scale, clip_coef, next_clock));
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
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    if (entry.staged) {
      unstage(entry);
      continue;
    }
    // Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest.
    entry.param.unsafeGetTensorImpl()->bump_version();
    for (const at::Tensor& state : entry.state) state.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace fusedreg::cpu
