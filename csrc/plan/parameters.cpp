#include "parameters.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <stdexcept>

namespace fusedreg {

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

int group_field(const std::string& scalar) {
  int index = 0;
#define FUSEDREG_FIND(name)          \
  if (scalar == #name) return index; \
  ++index;
  FUSEDREG_ALL_SCALARS(FUSEDREG_FIND)
#undef FUSEDREG_FIND
  throw std::invalid_argument("no such scalar: " + scalar);
}

namespace {

Group make_group(const std::vector<std::string>& names, const std::vector<double>& values) {
  Group group;
  for (std::size_t i = 0; i < names.size(); ++i) reinterpret_cast<double*>(&group)[group_field(names[i])] = values[i];
  return group;
}

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf ||
         type == at::kComplexFloat || type == at::kComplexDouble;
}

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

// A tensor made in inference mode has no version.
void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

bool is_plain(const at::Tensor& tensor) { return !tensor.is_conj() && !tensor.is_neg(); }

// Of a few numbers each: a call of memcmp costs more than the comparison.
bool same(at::IntArrayRef a, const std::vector<std::int64_t>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

template <class Items>
Items items_of(const py::dict& dict) {
  Items items;
  for (const auto& [key, value] : dict) {
    items.emplace_back(key.ptr(), value.ptr());
  }
  return items;
}

// Whether a dict holds these very objects, in this order.
template <class Items>
bool holds(PyObject* dict, const Items& items) {
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(items.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (auto item = items.begin(); PyDict_Next(dict, &position, &key, &value); ++item) {
    if (key != item->first || value != item->second) return false;
  }
  return true;
}

}  // namespace

Parameters::~Parameters() = default;

Parameters::Parameters(const std::string& rule, const py::list& params, const std::vector<int>& groups,
                       const py::list& states, const py::list& clocks, const py::dict& optimizer_state)
    : rule_(rule_index(rule)),
      scalar_names_(scalar_names(rule_)),
      optimizer_state_(optimizer_state.ptr()),
      optimizer_state_items_(items_of<Items>(optimizer_state)) {
  const std::vector<std::string> names = state_names(rule_);
  entries_.reserve(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    Entry& entry = entries_.emplace_back();
    entry.param_object = params[i].ptr();
    if (!THPVariable_Check(entry.param_object)) throw std::invalid_argument("a parameter is not a tensor");
    const at::Tensor& param = entry.param();
    if (!is_supported(param.scalar_type())) {
      throw std::invalid_argument("a plan takes floating point and complex tensors");
    }
    entry.group = groups.at(i);
    entry.dtype = dtype_of(param);
    entry.active = !states[i].is_none();
    entry.states = 0;
    if (!entry.active) continue;
    entry.data.w = param.data_ptr();
    entry.sizes = param.sizes().vec();
    entry.strides = param.strides().vec();
    entry.is_dense = param.is_non_overlapping_and_dense() && is_plain(param);
    const py::dict state = states[i];
    entry.state_dict = state.ptr();
    entry.state_items = items_of<Items>(state);
    for (const std::string& name : names) {
      // An older torch's SGD without momentum left None there.
      if (!state.contains(name) || !THPVariable_Check(py::object(state[name.c_str()]).ptr())) break;
      entry.state[entry.states] = state[name.c_str()].cast<at::Tensor>();
      entry.data.state[entry.states] = entry.state[entry.states].data_ptr();
      ++entry.states;
    }
    if (!clocks[i].is_none()) entry.clock.tensor = clocks[i].cast<at::Tensor>();
  }
}

bool Parameters::take_groups(const std::vector<std::vector<double>>& groups) {
  groups_.clear();
  for (const std::vector<double>& values : groups) {
    if (values.size() != scalar_names_.size()) throw std::invalid_argument("a group has another number of scalars");
    groups_.push_back(make_group(scalar_names_, values));
  }
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    int needed = 0;
    Rules::visit(rule_, [&](auto host) { needed = decltype(host)::state_count(groups_.at(entry.group)); });
    // Whether a rule keeps a clock changes with its state, and Python makes both.
    if (entry.states < needed || (entry.used >= 0 && entry.used != needed)) return false;
    entry.used = needed;
  }
  return true;
}

double Parameters::Clock::read() const {
  if (!tensor.defined()) return 0;
  const void* at = tensor.const_data_ptr();
  return tensor.scalar_type() == at::kDouble ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
}

void Parameters::Clock::write(double value) const {
  if (!tensor.defined()) return;
  void* at = tensor.data_ptr();
  if (tensor.scalar_type() == at::kDouble) {
    *static_cast<double*>(at) = value;
  } else {
    *static_cast<float*>(at) = static_cast<float>(value);
  }
}

void Parameters::prefetch(std::size_t i) const {
  constexpr std::size_t kAhead = 6;
  if (i + kAhead >= entries_.size()) return;
  const Entry& entry = entries_[i + kAhead];
  const auto touch = [](const void* at) {
    __builtin_prefetch(at);
    __builtin_prefetch(static_cast<const char*>(at) + 64);
    __builtin_prefetch(static_cast<const char*>(at) + 128);
  };
  touch(entry.param().unsafeGetTensorImpl());
  touch(entry.state_dict);
  for (int k = 0; k < entry.used; ++k) touch(entry.state[k].unsafeGetTensorImpl());
  if (entry.clock.tensor.defined()) touch(entry.clock.tensor.unsafeGetTensorImpl());
}

bool Parameters::refresh_gradients() {
  if (!holds(optimizer_state_, optimizer_state_items_)) return false;
  // Outside of InferenceMode, torch lets nobody write what was made inside.
  const bool may_write_inference = c10::InferenceMode::is_enabled();
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    if (!bind(entries_[i], may_write_inference)) return false;
  }
  return true;
}

bool Parameters::bind(Entry& entry, bool may_write_inference) {
  const at::Tensor& param = entry.param();
  entry.grad = param.unsafeGetTensorImpl()->grad();  // Tensor::grad() looks for reasons to warn first
  const at::Tensor& grad = entry.grad;
  if (grad.defined() != entry.active) return false;
  if (!entry.active) return true;
  const auto has_same_shape = [&](const at::Tensor& tensor) {
    return same(tensor.sizes(), entry.sizes) && tensor.scalar_type() == param.scalar_type();
  };
  if (param.data_ptr() != entry.data.w || !same(param.strides(), entry.strides) || dtype_of(param) != entry.dtype ||
      !has_same_shape(param) || (param.is_inference() && !may_write_inference) ||
      !holds(entry.state_dict, entry.state_items)) {
    return false;
  }
  if (!has_same_shape(grad) || grad.device() != param.device() || grad.layout() != at::kStrided) return false;
  bool fast = entry.is_dense && same(grad.strides(), entry.strides) && is_plain(grad);
  for (int i = 0; i < entry.used; ++i) {
    const at::Tensor& state = entry.state[i];
    if (!has_same_shape(state) || state.data_ptr() != entry.data.state[i]) return false;
    if (state.is_inference() && !may_write_inference) return false;
    fast = fast && same(state.strides(), entry.strides);
  }
  if (fast) {
    entry.staged.reset();
    entry.pointers = entry.data;
    entry.pointers.g = grad.const_data_ptr();
  } else {
    stage(entry, grad);
  }
  return true;
}

void Parameters::stage(Entry& entry, const at::Tensor& grad) {
  const c10::NoGradGuard no_grad;
  const auto copy = [](const at::Tensor& from) {
    at::Tensor to = at::empty(from.sizes(), from.options());
    to.copy_(from);
    return to;
  };
  entry.staged = std::make_unique<Staged>();
  entry.pointers.w = (entry.staged->param = copy(entry.param())).data_ptr();
  entry.pointers.g = (entry.staged->grad = copy(grad)).const_data_ptr();
  for (int i = 0; i < entry.used; ++i) {
    entry.pointers.state[i] = (entry.staged->state[i] = copy(entry.state[i])).data_ptr();
  }
}

void Parameters::unstage(Entry& entry) {
  const c10::NoGradGuard no_grad;
  // detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
  entry.param().detach().copy_(entry.staged->param);
  for (int i = 0; i < entry.used; ++i) entry.state[i].detach().copy_(entry.staged->state[i]);
  entry.staged.reset();
}

void Parameters::finish_update() {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    entry.grad.reset();
    if (entry.staged) {
      unstage(entry);
      continue;
    }
    // Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest.
    bump_version(entry.param());
    for (int k = 0; k < entry.used; ++k) bump_version(entry.state[k]);
  }
}

}  // namespace fusedreg
