#include "parameters.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <stdexcept>

namespace fusedreg {

namespace {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf ||
         type == at::kComplexFloat || type == at::kComplexDouble;
}

bool is_plain(const at::Tensor& tensor) { return !tensor.is_conj() && !tensor.is_neg(); }

// What has none: a subclass that keeps its numbers elsewhere, zeros that are only known to be such, freed storage.
bool has_memory(const at::Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && !tensor._is_zerotensor() &&
         (tensor.const_data_ptr() != nullptr || tensor.numel() == 0);
}

// Of a few numbers each: a call of memcmp costs more than the comparison.
bool same(at::IntArrayRef a, const std::vector<std::int64_t>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// Whether two tensors of these sizes have their elements in the same order. The stride of a size of 1 says nothing:
// channels_last convolutions of 1x1 and their gradients come with different ones.
bool same_layout(const std::vector<std::int64_t>& sizes, at::IntArrayRef a, const std::vector<std::int64_t>& b) {
  if (a.size() != sizes.size()) return false;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (a[i] != b[i] && sizes[i] > 1) return false;
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

// What a DTensor calls its parts.
struct Names {
  PyObject* const local_tensor = PyUnicode_InternFromString("_local_tensor");
  PyObject* const spec = PyUnicode_InternFromString("_spec");
  PyObject* const mesh = PyUnicode_InternFromString("mesh");
  PyObject* const placements = PyUnicode_InternFromString("placements");
};

const Names& names() {
  static const Names names;
  return names;
}

// An attribute that the object itself holds.
PyObject* borrow_attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  Py_DECREF(value);
  return value;
}

bool are_equal(PyObject* a, PyObject* b) {
  const int answer = PyObject_RichCompareBool(a, b, Py_EQ);
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

}  // namespace

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

void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

Parameters::~Parameters() = default;

const at::Tensor& Parameters::local_of(PyObject* dtensor) {
  PyObject* const local = borrow_attribute(dtensor, names().local_tensor);
  if (!THPVariable_Check(local)) throw std::invalid_argument("a part of a DTensor is not a tensor");
  return THPVariable_Unpack(local);
}

Parameters::Parameters(const RuleInfo& rule, const Columns& columns, bool takes_other_gradients)
    : rule_(rule),
      scalar_state_count_(rule.scalar_states.size()),
      place_of_field_(rule.fields.size(), -1),
      given_fields_(columns.field_names.size()),
      takes_other_gradients_(takes_other_gradients),
      optimizer_state_(columns.optimizer_state.ptr()),
      optimizer_state_items_(items_of<Items>(columns.optimizer_state)) {
  const std::vector<std::string>& field_names = columns.field_names;
  for (std::size_t i = 0; i < field_names.size(); ++i) {
    const auto found = std::find(rule.fields.begin(), rule.fields.end(), field_names[i]);
    if (found == rule.fields.end()) {
      throw std::invalid_argument("the kernel of the rule '" + rule.name + "' has no field '" + field_names[i] + "'");
    }
    place_of_field_[found - rule.fields.begin()] = static_cast<int>(i);
  }
  entries_.reserve(columns.params.size());
  for (std::size_t i = 0; i < columns.params.size(); ++i) {
    Entry& entry = entries_.emplace_back();
    entry.param_object = columns.params[i].ptr();
    if (!THPVariable_Check(entry.param_object)) throw std::invalid_argument("a parameter is not a tensor");
    entry.sharded = columns.sharded;
    const at::Tensor& param = entry.param();
    if (!is_supported(param.scalar_type())) {
      throw std::invalid_argument("a plan takes floating point and complex tensors");
    }
    entry.group = columns.groups.at(i);
    entry.dtype = entry.grad_dtype = dtype_of(param);
    entry.active = !columns.state_dicts[i].is_none();
    if (!entry.active) continue;
    if (!columns.positions[i].is_none()) {
      const auto items = columns.positions[i].cast<py::tuple>();
      entry.rounds_stochastically = true;
      entry.number = items[0].cast<std::uint32_t>();
      entry.first_position = items[1].cast<std::int64_t>();
      entry.position_strides = items[2].cast<std::vector<std::int64_t>>();
    }
    entry.data.w = param.data_ptr();
    entry.sizes = param.sizes().vec();
    entry.strides = param.strides().vec();
    entry.is_dense = param.is_non_overlapping_and_dense() && is_plain(param);
    const py::dict state_dict = columns.state_dicts[i];
    entry.state_dict = state_dict.ptr();
    entry.state_items = items_of<Items>(state_dict);
    const py::tuple its_states = columns.states[i], its_scalars = columns.scalar_states[i];
    if (its_states.size() != rule.states.size() || its_scalars.size() != rule.scalar_states.size()) {
      throw std::invalid_argument("a parameter comes with another number of states than its rule has");
    }
    for (std::size_t k = 0; k < its_states.size(); ++k) {
      if (its_states[k].is_none()) continue;
      entry.state_objects[k] = py::handle(its_states[k]).ptr();
      if (!THPVariable_Check(entry.state_objects[k])) throw std::invalid_argument("a state is not a tensor");
      entry.state[k] = entry.sharded ? local_of(entry.state_objects[k]) : THPVariable_Unpack(entry.state_objects[k]);
      entry.data.state[k] = entry.state[k].data_ptr();
      entry.state_dtypes[k] = dtype_of(entry.state[k]);
      entry.needed |= StateMask{1} << k;
    }
    if (std::find(rule.variants.begin(), rule.variants.end(), entry.needed) == rule.variants.end()) {
      throw std::invalid_argument("the rule '" + rule.name + "' has no kernel for these states together");
    }
    for (std::size_t k = 0; k < its_scalars.size(); ++k) {
      if (!its_scalars[k].is_none()) entry.scalar_states[k].tensor = its_scalars[k].cast<at::Tensor>();
    }
  }
}

void Parameters::take_groups(const std::vector<std::vector<double>>& groups) {
  groups_.clear();
  for (const std::vector<double>& values : groups) {
    if (values.size() != given_fields_) throw std::invalid_argument("a group has another number of fields");
    std::vector<double>& fields = groups_.emplace_back(rule_.defaults);
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (place_of_field_[i] >= 0) fields[i] = values[place_of_field_[i]];
    }
  }
}

double Parameters::ScalarState::read() const {
  if (!tensor.defined()) return 0;
  const void* at = tensor.const_data_ptr();
  return tensor.scalar_type() == at::kDouble ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
}

void Parameters::ScalarState::write(double value) const {
  if (!tensor.defined()) return;
  void* at = tensor.data_ptr();
  if (tensor.scalar_type() == at::kDouble) {
    *static_cast<double*>(at) = value;
  } else {
    *static_cast<float*>(at) = static_cast<float>(value);
  }
}

void Parameters::read_scalar_states(const Entry& entry, double* values) const {
  for (std::size_t k = 0; k < scalar_state_count_; ++k) values[k] = entry.scalar_states[k].read();
}

void Parameters::write_scalar_states(const Entry& entry, const double* values) const {
  for (std::size_t k = 0; k < scalar_state_count_; ++k) entry.scalar_states[k].write(values[k]);
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
  for_each_state(entry.needed, [&](std::size_t k) { touch(entry.state[k].unsafeGetTensorImpl()); });
  for (std::size_t k = 0; k < scalar_state_count_; ++k) touch(entry.scalar_states[k].tensor.unsafeGetTensorImpl());
}

unsigned Parameters::singles(const Entry& entry) const {
  unsigned mask = 0;
  for (std::size_t k = 0; k < scalar_state_count_; ++k) mask |= entry.scalar_states[k].is_single() ? 1u << k : 0u;
  return mask;
}

bool Parameters::read_gradient(Entry& entry) {
  // Tensor::grad() looks for reasons to warn first
  entry.grad = THPVariable_Unpack(entry.param_object).unsafeGetTensorImpl()->grad();
  if (!entry.sharded || !entry.grad.defined()) return true;
  const auto grad = py::reinterpret_steal<py::object>(THPVariable_Wrap(entry.grad));
  if (Py_TYPE(grad.ptr()) != Py_TYPE(entry.param_object)) return false;
  PyObject* const ours = borrow_attribute(entry.param_object, names().spec);
  PyObject* const theirs = borrow_attribute(grad.ptr(), names().spec);
  if (ours != theirs &&
      !(are_equal(borrow_attribute(ours, names().mesh), borrow_attribute(theirs, names().mesh)) &&
        are_equal(borrow_attribute(ours, names().placements), borrow_attribute(theirs, names().placements)))) {
    return false;
  }
  entry.grad = local_of(grad.ptr());
  return true;
}

bool Parameters::refresh_gradients(const py::object& gradients) {
  if (!holds(optimizer_state_, optimizer_state_items_)) return false;
  const bool are_given = !gradients.is_none();
  const auto given = are_given ? py::reinterpret_borrow<py::list>(gradients) : py::list();
  if (are_given && given.size() != entries_.size()) throw std::invalid_argument("not one gradient a parameter");
  // Outside of InferenceMode, torch lets nobody write what was made inside.
  const bool may_write_inference = c10::InferenceMode::is_enabled();
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i);
    Entry& entry = entries_[i];
    if (are_given) {
      PyObject* const grad = PyList_GET_ITEM(given.ptr(), i);
      entry.grad = THPVariable_Check(grad) ? THPVariable_Unpack(grad) : at::Tensor();
    } else if (!read_gradient(entry)) {
      return false;
    }
    if (!bind(entry, may_write_inference)) return false;
  }
  return true;
}

bool Parameters::takes(DType grad_dtype, const Entry& entry) const {
  if (grad_dtype == entry.dtype) return true;
  return takes_other_gradients_ && grad_dtype != DType::kFloat64 && entry.dtype != DType::kFloat64 &&
         !entry.param().is_complex();
}

bool Parameters::bind(Entry& entry, bool may_write_inference) {
  const at::Tensor& param = entry.param();
  const at::Tensor& grad = entry.grad;
  if (grad.defined() != entry.active) return false;
  if (!entry.active) return true;
  const auto has_same_shape = [&](const at::Tensor& tensor, DType dtype) {
    return same(tensor.sizes(), entry.sizes) && is_supported(tensor.scalar_type()) && dtype_of(tensor) == dtype &&
           tensor.is_complex() == param.is_complex();
  };
  if (param.data_ptr() != entry.data.w || !same(param.strides(), entry.strides) ||
      !has_same_shape(param, entry.dtype) || (param.is_inference() && !may_write_inference) ||
      !holds(entry.state_dict, entry.state_items)) {
    return false;
  }
  const DType grad_dtype = dtype_of(grad);
  if (!takes(grad_dtype, entry) || !has_same_shape(grad, grad_dtype) || grad.device() != param.device() ||
      grad.layout() != at::kStrided || !has_memory(grad)) {
    return false;
  }
  bool fast = entry.is_dense && same_layout(entry.sizes, grad.strides(), entry.strides) && is_plain(grad);
  bool fits = true;
  for_each_state(entry.needed, [&](std::size_t k) {
    const at::Tensor& state = entry.state[k];
    fits = fits && has_same_shape(state, entry.state_dtypes[k]) && state.data_ptr() == entry.data.state[k] &&
           (may_write_inference || !state.is_inference()) &&
           (!entry.sharded || local_of(entry.state_objects[k]).is_same(state));
    fast = fast && same_layout(entry.sizes, state.strides(), entry.strides);
  });
  if (!fits) return false;
  entry.grad_dtype = grad_dtype;
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
  for_each_state(entry.needed, [&](std::size_t k) {
    entry.pointers.state[k] = (entry.staged->state[k] = copy(entry.state[k])).data_ptr();
  });
}

void Parameters::unstage(Entry& entry) {
  const c10::NoGradGuard no_grad;
  // detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
  entry.param().detach().copy_(entry.staged->param);
  for_each_state(entry.needed, [&](std::size_t k) { entry.state[k].detach().copy_(entry.staged->state[k]); });
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
    for_each_state(entry.needed, [&](std::size_t k) { bump_version(entry.state[k]); });
    if (!entry.sharded) continue;
    bump_version(THPVariable_Unpack(entry.param_object));  // a DTensor counts for itself, too
    for_each_state(entry.needed, [&](std::size_t k) { bump_version(THPVariable_Unpack(entry.state_objects[k])); });
  }
}

}  // namespace fusedreg
