#include "parameters.h"

#include <algorithm>
#include <stdexcept>

namespace fusedreg {

namespace {

// Of a few numbers each: a call of memcmp costs more than the comparison.
bool same(const std::int64_t* a, std::size_t size, const std::vector<std::int64_t>& b) {
  if (size != b.size()) return false;
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (a[i] != b[i]) return false;
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
  return Object::own(PyObject_GetAttr(object, name)).get();
}

// Where they are. False: they are not what a state of `numel` codes has.
bool look_at_scales(const Tensor& tensor, std::int64_t numel, float*& scales) {
  View view;
  if (!tensor.look(view) || view.element != Element::kFloat32 || view.dim != 1 || view.sizes[0] != scale_count(numel) ||
      (view.sizes[0] > 1 && view.strides[0] != 1)) {
    return false;
  }
  scales = static_cast<float*>(view.data);
  return true;
}

bool are_equal(PyObject* a, PyObject* b) {
  const int answer = PyObject_RichCompareBool(a, b, Py_EQ);
  if (answer < 0) throw PythonError();
  return answer == 1;
}

}  // namespace

bool is_dense(const View& view) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < view.dim; ++i) {
    if (view.sizes[i] == 0) return true;
    if (view.sizes[i] > 1) order.push_back(i);  // the stride of a size of 1 says nothing
  }
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return view.strides[a] < view.strides[b]; });
  std::int64_t together = 1;
  for (const std::size_t i : order) {
    if (view.strides[i] != together) return false;
    together *= view.sizes[i];
  }
  return true;
}

static bool is_contiguous(const View& view) {
  std::int64_t together = 1;
  for (std::size_t i = view.dim; i-- > 0;) {
    if (view.sizes[i] > 1 && view.strides[i] != together) return false;
    together *= view.sizes[i];
  }
  return true;
}

Columns::Columns(PyObject* columns)
    : field_names(to_vector(tuple_item(columns, 0), to_string)),
      params(tuple_item(columns, 1)),
      groups(to_vector(tuple_item(columns, 2), [](PyObject* group) { return static_cast<int>(to_int(group)); })),
      state_dicts(tuple_item(columns, 3)),
      states(tuple_item(columns, 4)),
      scales(tuple_item(columns, 5)),
      scalar_states(tuple_item(columns, 6)),
      positions(tuple_item(columns, 7)),
      optimizer_state(tuple_item(columns, 8)),
      sharded(to_bool(tuple_item(columns, 9))),
      written(tuple_item(columns, 10)) {
  if (PyDict_Check(optimizer_state) == 0) throw std::invalid_argument("an optimizer's state is a dict");
}

Parameters::~Parameters() = default;

PyObject* Parameters::local_of(PyObject* dtensor) {
  PyObject* const local = borrow_attribute(dtensor, names().local_tensor);
  if (!is_tensor(local)) throw std::invalid_argument("a part of a DTensor is not a tensor");
  return local;
}

Parameters::Parameters(const RuleInfo& rule, const Columns& columns, bool takes_other_gradients)
    : rule_(rule),
      scalar_state_count_(rule.scalar_states.size()),
      sharded_(columns.sharded),
      place_of_field_(rule.fields.size(), -1),
      given_fields_(columns.field_names.size()),
      takes_other_gradients_(takes_other_gradients),
      written_(columns.written),
      optimizer_state_(columns.optimizer_state),
      optimizer_state_items_(columns.optimizer_state) {
  const std::vector<std::string>& field_names = columns.field_names;
  for (std::size_t i = 0; i < field_names.size(); ++i) {
    const auto found = std::find(rule.fields.begin(), rule.fields.end(), field_names[i]);
    if (found == rule.fields.end()) {
      throw std::invalid_argument("the kernel of the rule '" + rule.name + "' has no field '" + field_names[i] + "'");
    }
    place_of_field_[found - rule.fields.begin()] = static_cast<int>(i);
  }
  const std::size_t count = length(columns.params);
  entries_.reserve(count);
  watched_.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    Entry& entry = entries_.emplace_back();
    entry.param_object = item(columns.params, i);
    if (!is_tensor(entry.param_object)) throw std::invalid_argument("a parameter is not a tensor");
    entry.sharded = columns.sharded;
    entry.group = columns.groups.at(i);
    Watched& watched = watched_[i];
    watched.param = entry.param_object;
    watched.state_dict = item(columns.state_dicts, i);
    entry.active = watched.state_dict != Py_None;
    if (!entry.active) continue;
    if (PyDict_Check(watched.state_dict) == 0) throw std::invalid_argument("a parameter's state is a dict");
    View param;
    if (!look(entry.param(), param) || !is_supported(param.element)) {
      throw std::invalid_argument("a plan takes floating point and complex tensors with memory of their own");
    }
    if (PyObject* const rounding = item(columns.positions, i); rounding != Py_None) {
      entry.rounds_stochastically = true;
      entry.number = static_cast<std::uint32_t>(to_unsigned(tuple_item(rounding, 0)));
      entry.first_position = to_int(tuple_item(rounding, 1));
      entry.position_strides = to_vector(tuple_item(rounding, 2), to_int);
    }
    entry.element = param.element;
    entry.dtype = entry.grad_dtype = dtype_of(param.element);
    entry.data.w = param.data;
    const auto numbers = [&](const std::int64_t* first) { return std::vector<std::int64_t>(first, first + param.dim); };
    entry.layout = watched.layout = &*layouts_.insert({numbers(param.sizes), numbers(param.strides)}).first;
    watched.place = Place(entry.param());
    watched.place_of_grad = place_of_gradient(entry.param_object);
    entry.numel = param.numel() * (is_complex(param.element) ? 2 : 1);
    entry.device = param.device;
    entry.is_dense = is_dense(param) && is_as_stored(entry.param());
    entry.has_inference = is_inference(entry.param());
    watched.state_items = Unchanged(watched.state_dict);
    PyObject *const its_states = item(columns.states, i), *const its_scalars = item(columns.scalar_states, i);
    PyObject* const its_scales = item(columns.scales, i);
    if (tuple_length(its_states) != rule.states.size() || tuple_length(its_scales) != rule.states.size() ||
        tuple_length(its_scalars) != rule.scalar_states.size()) {
      throw std::invalid_argument("a parameter comes with another number of states than its rule has");
    }
    for (std::size_t k = 0; k < rule.states.size(); ++k) {
      PyObject* const state = entry.state_objects[k] = tuple_item(its_states, k);
      if (state == Py_None) continue;
      if (!is_tensor(state)) throw std::invalid_argument("a state is not a tensor");
      watched.state[k] = Tensor(entry.sharded ? local_of(state) : state);
      watched.state_places[k] = Place(watched.state[k]);
      View seen;
      if (!watched.state[k].look(seen)) throw std::invalid_argument("a state has no memory of its own");
      entry.data.state[k] = seen.data;
      entry.state_dtypes[k] = dtype_of(seen.element);
      entry.has_inference |= is_inference(entry.sharded ? local_of(state) : state);
      entry.is_dense = entry.is_dense && is_as_stored(entry.sharded ? local_of(state) : state);
      entry.needed |= StateMask{1} << k;
      if (!is_code(entry.state_dtypes[k])) continue;
      PyObject* const scales = tuple_item(its_scales, k);
      if (!is_tensor(scales)) throw std::invalid_argument("a state in 8 bits has no scales");
      entry.scale_objects[k] = scales;
      entry.scales[k] = Tensor(scales);
      if (!look_at_scales(entry.scales[k], entry.numel, entry.data.scales[k])) {
        throw std::invalid_argument("the scales of a state in 8 bits are not as many as its blocks");
      }
    }
    watched.needed = entry.needed;
    has_inference_ |= entry.has_inference;
    if (std::find(rule.variants.begin(), rule.variants.end(), entry.needed) == rule.variants.end()) {
      throw std::invalid_argument("the rule '" + rule.name + "' has no kernel for these states together");
    }
    for (std::size_t k = 0; k < rule.scalar_states.size(); ++k) {
      PyObject* const scalar = tuple_item(its_scalars, k);
      if (scalar == Py_None) continue;
      if (!is_tensor(scalar)) throw std::invalid_argument("a scalar state is not a tensor");
      entry.scalar_states[k].tensor = Tensor(scalar);
      entry.scalar_places[k] = Place(entry.scalar_states[k].tensor);
    }
  }
}

void Parameters::take_groups(const std::vector<std::vector<double>>& groups) {
  groups_.resize(groups.size());
  for (std::size_t group = 0; group < groups.size(); ++group) {
    const std::vector<double>& values = groups[group];
    if (values.size() != given_fields_) throw std::invalid_argument("a group has another number of fields");
    std::vector<double>& fields = groups_[group];
    fields = rule_.defaults;
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (place_of_field_[i] >= 0) fields[i] = values[place_of_field_[i]];
    }
  }
}

void Parameters::read_scalar_states(const Entry& entry, Scalars& scalars) const {
  scalars.singles = 0;
  for (std::size_t k = 0; k < scalar_state_count_; ++k) {
    const ScalarState& scalar = entry.scalar_states[k];
    scalars.at[k] = scalar.tensor.is_there() ? scalar.tensor.write() : nullptr;
    if (scalars.at[k] == nullptr) {
      scalars.values[k] = 0;
      continue;
    }
    const bool is_single = scalar.is_single();
    scalars.singles |= is_single ? 1u << k : 0u;
    scalars.values[k] = read_number(scalars.at[k], is_single);
  }
}

void Parameters::write_scalar_states(const Scalars& scalars, const double* values) const {
  for (std::size_t k = 0; k < scalar_state_count_; ++k) {
    if (scalars.at[k] != nullptr) write_number(scalars.at[k], (scalars.singles >> k & 1u) != 0, values[k]);
  }
}

bool Parameters::read_sharded_gradient(Watched& watched) {
  watched.grad = Gradient::of_parameter(watched.param);
  if (!watched.grad.is_there()) return true;
  const Object grad = watched.grad.object();
  if (Py_TYPE(grad.get()) != Py_TYPE(watched.param)) return false;
  PyObject* const ours = borrow_attribute(watched.param, names().spec);
  PyObject* const theirs = borrow_attribute(grad.get(), names().spec);
  if (ours != theirs &&
      !(are_equal(borrow_attribute(ours, names().mesh), borrow_attribute(theirs, names().mesh)) &&
        are_equal(borrow_attribute(ours, names().placements), borrow_attribute(theirs, names().placements)))) {
    return false;
  }
  watched.grad = Gradient::of(local_of(grad.get()));
  return true;
}

bool Parameters::can_refresh(PyObject* gradients) {
  if (!optimizer_state_items_.is(optimizer_state_)) return false;
  if (gradients != Py_None && length(gradients) != entries_.size()) {
    throw std::invalid_argument("not one gradient a parameter");
  }
  // Outside of InferenceMode, torch lets nobody write what was made inside.
  return !has_inference_ || is_inference_mode();
}

bool Parameters::takes(Element gradient, const Entry& entry) const {
  if (gradient == entry.element) return true;
  const auto is_narrow = [](Element element) {
    return is_supported(element) && !is_complex(element) && dtype_of(element) != DType::kFloat64;
  };
  return takes_other_gradients_ && is_narrow(gradient) && is_narrow(entry.element);
}

bool Parameters::bind(std::size_t i) {
  Entry& entry = entries_[i];
  Watched& watched = watched_[i];
  if (watched.grad.is_there() != entry.active) return false;
  if (!entry.active) return true;
  watched.is_known = false;
  const Layout& layout = *entry.layout;
  const auto has_shape = [&](const View& view) { return same(view.sizes, view.dim, layout.sizes); };
  const auto has_layout = [&](const View& view) { return layout.is(view.sizes, view.strides, view.dim); };
  View param, grad;
  if (!look(entry.param(), param) || param.data != entry.data.w || param.element != entry.element ||
      !has_shape(param) || !same(param.strides, param.dim, layout.strides) ||
      !watched.state_items.is(watched.state_dict)) {
    return false;
  }
  if (entry.is_dense && !is_still_as_stored(entry.param())) return false;
  if (!watched.grad.look(grad) || !takes(grad.element, entry) || grad.device != entry.device || !has_shape(grad) ||
      !grad.has_memory()) {
    return false;
  }
  bool fast = entry.is_dense && has_layout(grad) && watched.grad.is_as_stored(grad);
  bool fits = true, all_else_fits = entry.is_dense, can_be_copied = true;
  for_each_state(entry.needed, [&](std::size_t k) {
    View state;
    fits = fits && watched.state[k].look(state) && has_shape(state) && is_supported_state(state.element) &&
           dtype_of(state.element) == entry.state_dtypes[k] && is_complex(state.element) == is_complex(entry.element) &&
           state.data == entry.data.state[k] && (!entry.is_dense || is_still_as_stored(entry.state_objects[k])) &&
           (!entry.sharded || watched.state[k].is(local_of(entry.state_objects[k])));
    all_else_fits = all_else_fits && fits && has_layout(state);
    if (!fits || !is_code(entry.state_dtypes[k])) return;
    can_be_copied = can_be_copied && is_contiguous(state);
    float* scales = nullptr;
    fits = look_at_scales(entry.scales[k], entry.numel, scales) && scales == entry.data.scales[k];
  });
  if (!fits) return false;
  fast = fast && all_else_fits;
  entry.grad_dtype = dtype_of(grad.element);
  if (fast) {
    entry.staged.reset();
    entry.pointers = entry.data;
    entry.pointers.g = grad.data;
    // A DTensor's part is another object in every step, and scales are looked at by themselves.
    watched.is_known = !entry.sharded && !entry.has_codes() && entry.numel > 0;
    if (watched.is_known) {
      watched.fields = Fields(entry.param_object);
      for_each_state(entry.needed, [&](std::size_t k) { watched.state_fields[k] = Fields(watched.state[k]); });
    }
  } else if (entry.has_codes() && all_else_fits) {
    stage_gradient(entry, watched.grad);
  } else if (can_be_copied) {
    stage(entry, watched.grad);
  } else {
    return false;
  }
  return true;
}

bool Parameters::Entry::has_codes() const {
  bool has = false;
  for_each_state(needed, [&](std::size_t k) { has |= is_code(state_dtypes[k]); });
  return has;
}

// By methods that torch has in C, between which Python handles no signal: a KeyboardInterrupt must not leave half a
// step.
static void copy_into(PyObject* tensor, PyObject* from) {
  // detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
  const Object there = Object::own(PyObject_CallMethod(tensor, "detach", nullptr));
  const Object source = Object::own(PyObject_CallMethod(from, "detach", nullptr));
  Object::own(PyObject_CallMethod(there.get(), "copy_", "O", source.get()));
}

// Returns where the copy is. `like` gives it its layout; without, it is contiguous.
static void* copy_of(PyObject* from, PyObject* like, Object& to) {
  const Object memory = Object::own(PyImport_ImportModule("fusedreg.memory"));
  to = Object::own(PyObject_CallMethod(memory.get(), "copy_of", "OO", from, like));
  View view;
  if (!look(to.get(), view)) throw std::runtime_error("a copy has no memory");
  return view.data;
}

void Parameters::stage(Entry& entry, const Gradient& grad) {
  entry.staged = std::make_unique<Staged>();
  entry.pointers = entry.data;
  entry.pointers.w = copy_of(entry.param(), Py_None, entry.staged->param);
  entry.pointers.g = copy_of(grad.object().get(), Py_None, entry.staged->grad);
  for_each_state(entry.needed, [&](std::size_t k) {
    PyObject* const state = entry.state_objects[k];
    entry.pointers.state[k] = copy_of(entry.sharded ? local_of(state) : state, Py_None, entry.staged->state[k]);
  });
}

void Parameters::stage_gradient(Entry& entry, const Gradient& grad) {
  entry.staged = std::make_unique<Staged>();
  entry.pointers = entry.data;
  entry.pointers.g = copy_of(grad.object().get(), entry.param(), entry.staged->grad);
}

void Parameters::unstage(Entry& entry) {
  copy_into(entry.param(), entry.staged->param.get());
  for_each_state(entry.needed, [&](std::size_t k) {
    PyObject* const state = entry.state_objects[k];
    copy_into(entry.sharded ? local_of(state) : state, entry.staged->state[k].get());
  });
  entry.staged.reset();
}

void Parameters::finish_update() {
  // Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest.
  Versions versions;
  // A copy back counts by itself, and a DTensor for its part.
  const auto is_copied = [](const Entry& entry) { return entry.is_copied(); };
  const bool all_at_once =
      !sharded_ && std::none_of(entries_.begin(), entries_.end(), is_copied) && versions.change_all(written_);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Watched& watched = watched_[i];
    watched.grad = Gradient();
    if (all_at_once) {
      entries_[i].staged.reset();
      continue;
    }
    if (watched.is_known) {  // by far the most common case
      versions.change(watched.param);
      for_each_state(watched.needed,
                     [&](std::size_t k) { versions.change(entries_[i].state_objects[k], watched.state[k]); });
      continue;
    }
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    for_each_state(entry.needed, [&](std::size_t k) {
      if (entry.scales[k].is_there()) versions.change(entry.scale_objects[k], entry.scales[k]);
    });
    if (entry.is_copied()) {
      unstage(entry);
      continue;
    }
    entry.staged.reset();
    versions.change(entry.param());
    for_each_state(entry.needed, [&](std::size_t k) {
      PyObject* const state = entry.state_objects[k];
      versions.change(entry.sharded ? local_of(state) : state, watched.state[k]);
    });
    if (!entry.sharded) continue;
    versions.change(entry.param_object);  // a DTensor counts for itself, too
    for_each_state(entry.needed, [&](std::size_t k) { versions.change(entry.state_objects[k]); });
  }
  versions.tell();
}

}  // namespace fusedreg
