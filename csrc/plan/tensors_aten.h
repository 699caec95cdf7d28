// Tensors, as the C++ of one torch has them: for a build from source.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

namespace fusedreg {

inline Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kDouble:
      return Element::kFloat64;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    case at::kComplexFloat:
      return Element::kComplex64;
    case at::kComplexDouble:
      return Element::kComplex128;
    case at::kLong:
      return Element::kInt64;
    case at::kChar:
      return Element::kInt8;
    case at::kByte:
      return Element::kUInt8;
    default:
      return Element::kOther;
  }
}

// A gradient is only read: memory that it shares until somebody writes it stays shared.
inline bool look(const at::Tensor& tensor, View& view, bool is_written = true) {
  // A subclass that keeps its numbers elsewhere, zeros that are only known to be such.
  if (tensor.layout() != at::kStrided || tensor.unsafeGetTensorImpl()->is_python_dispatch() ||
      tensor._is_zerotensor()) {
    return false;
  }
  const at::IntArrayRef sizes = tensor.sizes();
  const c10::Device device = tensor.device();
  view = {is_written ? tensor.data_ptr() : const_cast<void*>(tensor.const_data_ptr()),
          sizes.data(),
          tensor.strides().data(),
          sizes.size(),
          element_of(tensor),
          static_cast<std::int64_t>(device.type()) << 32 | static_cast<std::uint8_t>(device.index())};
  return true;
}

inline bool is_tensor(PyObject* object) { return THPVariable_Check(object); }
inline bool look(PyObject* tensor, View& view) { return look(THPVariable_Unpack(tensor), view); }
inline bool is_inference(PyObject* tensor) { return THPVariable_Unpack(tensor).is_inference(); }
inline bool is_inference_mode() { return c10::InferenceMode::is_enabled(); }
inline bool is_observed() {
  return torch::profiler::impl::profilerEnabled() || c10::impl::TorchDispatchModeTLS::stack_len() > 0;
}
inline bool is_as_stored(const at::Tensor& tensor) { return !tensor.is_conj() && !tensor.is_neg(); }
inline bool is_as_stored(PyObject* tensor) { return is_as_stored(THPVariable_Unpack(tensor)); }

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(PyObject* object) : tensor_(THPVariable_Unpack(object)) {}

  bool is_there() const { return tensor_.defined(); }
  bool look(View& view) const { return fusedreg::look(tensor_, view); }
  bool is(PyObject* object) const { return THPVariable_Unpack(object).is_same(tensor_); }
  bool is_on_cpu() const { return tensor_.is_cpu(); }
  Element element() const { return element_of(tensor_); }
  const void* read() const { return tensor_.const_data_ptr(); }
  void* write() const { return tensor_.data_ptr(); }
  const void* own_memory() const { return tensor_.unsafeGetTensorImpl(); }

 protected:
  explicit Tensor(const at::Tensor& tensor) : tensor_(tensor) {}
  friend class Versions;
  at::Tensor tensor_;
};

// Where what torch knows of a parameter is: to be asked for ahead of time.
inline const void* own_memory(PyObject* tensor) { return THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

class Gradient : private Tensor {
 public:
  Gradient() = default;
  static Gradient of(PyObject* object) { return THPVariable_Check(object) ? Gradient(object) : Gradient(); }
  // Tensor::grad() looks for reasons to warn first
  static Gradient of_parameter(PyObject* param) {
    return Gradient(THPVariable_Unpack(param).unsafeGetTensorImpl()->grad());
  }

  using Tensor::is_there;
  bool look(View& view) const { return fusedreg::look(tensor_, view, false); }
  bool is_as_stored(const View&) const { return fusedreg::is_as_stored(tensor_); }
  Object object() const { return Object::own(THPVariable_Wrap(tensor_)); }

 private:
  using Tensor::Tensor;
};

class Versions {
 public:
  void change(PyObject* tensor) { bump(THPVariable_Unpack(tensor)); }
  void change(PyObject*, const Tensor& tensor) { bump(tensor.tensor_); }
  bool change_all(PyObject*) { return false; }  // one by one is as fast
  void tell() {}

 private:
  // One that was made in inference mode has no version.
  static void bump(const at::Tensor& tensor) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
};

inline void prepare_torch() {}

}  // namespace fusedreg
