// Tensors, as every torch from 2.10 on knows them: for the wheel. A Python object's memory comes from DLPack's exchange
// interface, that of a tensor that is held from torch's stable C interface; what neither tells, Python is asked.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "dlpack.h"

namespace fusedreg {

// What is looked up once, when the module is imported.
struct Found {
  int (*look)(void* tensor, dlpack::Tensor* seen) = nullptr;
  getter grad = nullptr;
  void* grad_closure = nullptr;
  PyCFunction is_conj = nullptr, is_neg = nullptr;
  PyObject *tensor_type = nullptr, *parameter_type = nullptr, *is_plain = nullptr, *handle_of = nullptr,
           *is_inference_mode = nullptr, *increment_version = nullptr, *profiler_enabled = nullptr,
           *dispatch_modes = nullptr;
  std::int32_t cpu = 0, elements[static_cast<int>(Element::kOther)] = {};
};

inline Found found;

inline void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch cannot say what a tensor is");
}

inline bool is_tensor(PyObject* object) {
  const int answer = PyObject_IsInstance(object, found.tensor_type);
  if (answer < 0) throw PythonError();
  return answer == 1;
}

inline Element element_of(dlpack::DataType type) {
  const auto is = [&](dlpack::Code code, int bits) { return type.code == code && type.bits == bits; };
  if (type.lanes != 1) return Element::kOther;
  if (is(dlpack::kFloat, 32)) return Element::kFloat32;
  if (is(dlpack::kFloat, 64)) return Element::kFloat64;
  if (is(dlpack::kBfloat, 16)) return Element::kBFloat16;
  if (is(dlpack::kFloat, 16)) return Element::kFloat16;
  if (is(dlpack::kComplex, 64)) return Element::kComplex64;
  if (is(dlpack::kComplex, 128)) return Element::kComplex128;
  if (is(dlpack::kInt, 64)) return Element::kInt64;
  if (is(dlpack::kInt, 8)) return Element::kInt8;
  if (is(dlpack::kUInt, 8)) return Element::kUInt8;
  return Element::kOther;
}

inline bool look(PyObject* tensor, View& view) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != found.tensor_type && type != found.parameter_type &&  // by far the most common ones
      !to_bool(Object::own(PyObject_CallFunctionObjArgs(found.is_plain, tensor, nullptr)).get())) {
    return false;
  }
  dlpack::Tensor seen;
  if (found.look(tensor, &seen) != 0) {  // it has another layout, or no memory
    PyErr_Clear();
    return false;
  }
  view = {static_cast<char*>(seen.data) + seen.byte_offset,
          seen.sizes,
          seen.strides,
          static_cast<std::size_t>(seen.dim),
          element_of(seen.dtype),
          static_cast<std::int64_t>(seen.device.type) << 32 | static_cast<std::uint8_t>(seen.device.index)};
  return true;
}

inline bool is_inference(PyObject* tensor) {
  return to_bool(Object::own(PyObject_CallMethod(tensor, "is_inference", nullptr)).get());
}

inline bool is_inference_mode() {
  return to_bool(Object::own(PyObject_CallFunctionObjArgs(found.is_inference_mode, nullptr)).get());
}

inline bool is_observed() {
  const auto is_on = [](PyObject* asked) { return to_bool(Object::own(PyObject_CallNoArgs(asked)).get()); };
  return is_on(found.profiler_enabled) || is_on(found.dispatch_modes);
}

inline bool is_as_stored(PyObject* tensor) {
  return !to_bool(Object::own(found.is_neg(tensor, nullptr)).get()) &&
         !to_bool(Object::own(found.is_conj(tensor, nullptr)).get());
}
inline bool is_still_as_stored(PyObject*) { return true; }

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(PyObject* object) : object_(object) {
    const Object capsule = Object::own(PyObject_CallFunctionObjArgs(found.handle_of, object, nullptr));
    handle_ = static_cast<AtenTensorHandle>(PyCapsule_GetPointer(capsule.get(), PyCapsule_GetName(capsule.get())));
    if (handle_ == nullptr) throw PythonError();
  }
  Tensor(Tensor&& other) noexcept : object_(other.object_), handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(object_, other.object_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  bool is_there() const { return handle_ != nullptr; }
  bool look(View& view) const {
    std::int64_t *sizes = nullptr, *strides = nullptr, dim = 0;
    view.data = write();
    check(aoti_torch_get_sizes(handle_, &sizes));
    check(aoti_torch_get_strides(handle_, &strides));
    check(aoti_torch_get_dim(handle_, &dim));
    view.sizes = sizes;
    view.strides = strides;
    view.dim = static_cast<std::size_t>(dim);
    view.element = element();
    return true;
  }
  bool is(PyObject* object) const { return object == object_; }
  bool is_on_cpu() const {
    std::int32_t type = 0;
    check(aoti_torch_get_device_type(handle_, &type));
    return type == found.cpu;
  }
  Element element() const {
    std::int32_t dtype = 0;
    check(aoti_torch_get_dtype(handle_, &dtype));
    int element = 0;
    while (element < static_cast<int>(Element::kOther) && found.elements[element] != dtype) ++element;
    return static_cast<Element>(element);
  }
  bool is_double() const { return element() == Element::kFloat64; }
  const void* read() const { return write(); }
  void* write() const {
    void* data = nullptr;
    check(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }

 private:
  friend class Place;
  PyObject* object_ = nullptr;
  AtenTensorHandle handle_ = nullptr;
};

class Gradient {
 public:
  Gradient() = default;
  static Gradient of(PyObject* object) { return Gradient(is_tensor(object) ? Object::share(object) : Object()); }
  static Gradient of_parameter(PyObject* param) {
    Object grad = Object::own(found.grad(param, found.grad_closure));
    return Gradient(grad.get() == Py_None ? Object() : std::move(grad));
  }

  bool is_there() const { return static_cast<bool>(object_); }
  bool look(View& view) const { return fusedreg::look(object_.get(), view); }
  bool is_as_stored(const View& view) const {
    // Each answer takes as long as a small tensor's step, and only complex numbers are conjugated.
    return !to_bool(Object::own(found.is_neg(object_.get(), nullptr)).get()) &&
           !(is_complex(view.element) && to_bool(Object::own(found.is_conj(object_.get(), nullptr)).get()));
  }
  Object object() const { return Object::share(object_.get()); }

 private:
  friend class Place;
  explicit Gradient(Object object) : object_(std::move(object)) {}
  Object object_;
};

class Place {
 public:
  Place() = default;
  explicit Place(PyObject* tensor) : place_(tensor) {}
  explicit Place(const Tensor& tensor) : place_(tensor.handle_) {}
  explicit Place(const Gradient& grad) : place_(grad.object_.get()) {}

  void prefetch() const { __builtin_prefetch(place_); }

 private:
  const void* place_ = nullptr;
};

inline const void* place_of_gradient(PyObject* param) { return param; }

class Fields {
 public:
  Fields() = default;
  template <class T>
  explicit Fields(const T&) {}
  template <class T>
  bool are_of(const T&, const Layout&) const {
    return false;
  }
  const void* find(const Gradient&, const Layout&) const { return nullptr; }
};

class Versions {
 public:
  void change(PyObject* tensor) { changed_.push_back(tensor); }
  void change(PyObject* object, const Tensor&) { changed_.push_back(object); }
  bool change_all(PyObject* tensors) {
    Object::own(PyObject_CallFunctionObjArgs(found.increment_version, tensors, nullptr));
    return true;
  }
  void tell() {
    if (changed_.empty()) return;
    const Object tensors = Object::own(PyTuple_New(static_cast<Py_ssize_t>(changed_.size())));
    for (std::size_t i = 0; i < changed_.size(); ++i) {
      Py_INCREF(changed_[i]);
      if (PyTuple_SetItem(tensors.get(), static_cast<Py_ssize_t>(i), changed_[i]) != 0) throw PythonError();
    }
    changed_.clear();
    Object::own(PyObject_CallFunctionObjArgs(found.increment_version, tensors.get(), nullptr));
  }

 private:
  std::vector<PyObject*> changed_;
};

inline void prepare_torch() {
  const Object module = Object::own(PyImport_ImportModule("torch"));
  const Object nn = attribute(module.get(), "nn"), c = attribute(module.get(), "_C"),
               base = attribute(c.get(), "TensorBase");
  const Object aoti = attribute(c.get(), "_aoti"),
               empty = Object::own(PyObject_CallMethod(module.get(), "empty", "i", 0));
  found.tensor_type = attribute(module.get(), "Tensor").release();
  found.parameter_type = attribute(nn.get(), "Parameter").release();
  found.is_inference_mode = attribute(module.get(), "is_inference_mode_enabled").release();
  found.increment_version = attribute(c.get(), "_increment_version").release();
  found.dispatch_modes = attribute(c.get(), "_len_torch_dispatch_stack").release();
  found.profiler_enabled = attribute(attribute(module.get(), "autograd").get(), "_profiler_enabled").release();
  found.handle_of = attribute(aoti.get(), "unsafe_alloc_void_ptr_from_tensor").release();
  const Object memory = Object::own(PyImport_ImportModule("fusedreg.memory"));
  found.is_plain = attribute(memory.get(), "is_plain").release();

  const Object exchange = attribute(found.tensor_type, "__dlpack_c_exchange_api__");
  const auto* header =
      static_cast<const dlpack::ExchangeHeader*>(PyCapsule_GetPointer(exchange.get(), "dlpack_exchange_api"));
  check_error();
  while (header != nullptr && header->major != dlpack::kMajorVersion) header = header->earlier;
  if (header != nullptr) found.look = reinterpret_cast<const dlpack::Exchange*>(header)->look;

  // Called directly, without a look-up by name each time.
  const auto* property =
      static_cast<const PyGetSetDef*>(PyType_GetSlot(reinterpret_cast<PyTypeObject*>(base.get()), Py_tp_getset));
  while (property != nullptr && property->name != nullptr && std::strcmp(property->name, "grad") != 0) ++property;
  if (property != nullptr && property->name != nullptr) {
    found.grad = property->get;
    found.grad_closure = property->closure;
  }
  const auto method = [&](const char* name) {
    const Object bound = attribute(empty.get(), name);
    const int flags = PyCFunction_GetFlags(bound.get());
    return flags == METH_NOARGS ? PyCFunction_GetFunction(bound.get()) : nullptr;
  };
  found.is_conj = method("is_conj");
  found.is_neg = method("is_neg");
  if (found.look == nullptr || found.grad == nullptr || found.is_conj == nullptr || found.is_neg == nullptr) {
    throw std::runtime_error("this torch does not tell of its tensors as torch 2.10 to 2.15 do");
  }

  found.cpu = aoti_torch_device_type_cpu();
  const std::int32_t elements[] = {
      aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),   aoti_torch_dtype_bfloat16(),
      aoti_torch_dtype_float16(), aoti_torch_dtype_complex64(), aoti_torch_dtype_complex128(),
      aoti_torch_dtype_int64(),   aoti_torch_dtype_int8(),      aoti_torch_dtype_uint8()};
  std::copy(std::begin(elements), std::end(elements), found.elements);
}

}  // namespace fusedreg
