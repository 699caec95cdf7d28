// Tensors, as the C++ of one torch has them: for a build from source.
#pragma once

// They have parameters that they do not use.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/profiler/api.h>
#pragma GCC diagnostic pop

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

inline c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// As data_ptr() and const_data_ptr() have it, which ask in three calls whether there is a storage.
[[gnu::always_inline]] inline const void* read_memory_of(const at::Tensor& tensor) {
  const c10::StorageImpl* const storage = storage_of(tensor);
  const void* const begin = storage == nullptr || tensor.numel() == 0 ? nullptr : storage->data();
  if (begin == nullptr) return tensor.const_data_ptr();
  return static_cast<const char*>(begin) + tensor.storage_offset() * tensor.element_size();
}

[[gnu::always_inline]] inline void* memory_of(const at::Tensor& tensor) {
  c10::StorageImpl* const storage = storage_of(tensor);
  void* const begin = storage == nullptr || tensor.numel() == 0 ? nullptr : storage->mutable_data();
  if (begin == nullptr) return tensor.data_ptr();
  return static_cast<char*>(begin) + tensor.storage_offset() * tensor.element_size();
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
  view = {is_written ? memory_of(tensor) : const_cast<void*>(read_memory_of(tensor)),
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
inline bool is_still_as_stored(PyObject* tensor) { return is_as_stored(tensor); }

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(PyObject* object) : tensor_(THPVariable_Unpack(object)) {}

  bool is_there() const { return tensor_.defined(); }
  bool look(View& view) const { return fusedreg::look(tensor_, view); }
  bool is(PyObject* object) const { return THPVariable_Unpack(object).is_same(tensor_); }
  bool is_on_cpu() const { return tensor_.is_cpu(); }
  Element element() const { return element_of(tensor_); }
  bool is_double() const { return tensor_.dtype() == caffe2::TypeMeta::Make<double>(); }
  const void* read() const { return read_memory_of(tensor_); }
  void* write() const { return memory_of(tensor_); }

 protected:
  explicit Tensor(const at::Tensor& tensor) : tensor_(tensor) {}
  friend class Fields;
  friend class Place;
  friend class Versions;
  at::Tensor tensor_;
};

class Gradient : private Tensor {
 public:
  Gradient() = default;
  static Gradient of(PyObject* object) { return THPVariable_Check(object) ? Gradient(object) : Gradient(); }
  // Tensor::grad() looks for reasons to warn first, and TensorImpl::grad() makes two calls
  static Gradient of_parameter(PyObject* param) {
    const c10::AutogradMetaInterface* const meta = THPVariable_Unpack(param).unsafeGetTensorImpl()->autograd_meta();
    if (meta == nullptr) return Gradient();
    return Gradient(static_cast<const torch::autograd::AutogradMeta*>(meta)->grad_);
  }

  using Tensor::is_there;
  bool look(View& view) const { return fusedreg::look(tensor_, view, false); }
  bool is_as_stored(const View&) const { return fusedreg::is_as_stored(tensor_); }
  Object object() const { return Object::own(THPVariable_Wrap(tensor_)); }

 private:
  friend class Fields;
  friend class Place;
  using Tensor::Tensor;
};

// Nothing is read there: what is out of date does no harm.
class Place {
 public:
  Place() = default;
  explicit Place(PyObject* tensor) : Place(THPVariable_Unpack(tensor)) {}
  explicit Place(const Tensor& tensor) : Place(tensor.tensor_) {}
  explicit Place(const Gradient& grad) : Place(grad.tensor_) {}

  void prefetch() const {
    for (std::size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(impl_ + at);
    __builtin_prefetch(storage_ + 32);
  }

 private:
  explicit Place(const at::Tensor& tensor)
      : impl_(reinterpret_cast<const char*>(tensor.unsafeGetTensorImpl())),
        storage_(reinterpret_cast<const char*>(storage_of(tensor))) {}

  const char *impl_ = nullptr, *storage_ = nullptr;
};

class Fields {
 public:
  Fields() = default;
  explicit Fields(PyObject* tensor) : Fields(THPVariable_Unpack(tensor)) {}
  explicit Fields(const Tensor& tensor) : Fields(tensor.tensor_) {}

  bool are_of(PyObject* tensor, const Layout& layout) const { return are_of(THPVariable_Unpack(tensor), layout); }
  bool are_of(const Tensor& tensor, const Layout& layout) const { return are_of(tensor.tensor_, layout); }
  const void* find(const Gradient& grad, const Layout& layout) const {
    if (!is_alike(grad.tensor_, layout) || grad.tensor_.device() != device_) return nullptr;
    return read_memory_of(grad.tensor_);
  }

 private:
  explicit Fields(const at::Tensor& tensor)
      : keys_(tensor.key_set()),
        dtype_(tensor.dtype()),
        device_(tensor.device()),
        offset_(tensor.storage_offset()),
        memory_(storage_of(tensor)->mutable_data()) {}

  // Whether it is strided, has numbers of its own, and is conjugated or negated, is all in its keys.
  bool is_alike(const at::Tensor& tensor, const Layout& layout) const {
    const c10::impl::SizesAndStrides& own = tensor.unsafeGetTensorImpl()->sizes_and_strides();
    return tensor.key_set() == keys_ && tensor.dtype() == dtype_ &&
           layout.is(own.sizes_data(), own.strides_data(), own.size());
  }
  bool are_of(const at::Tensor& tensor, const Layout& layout) const {
    c10::StorageImpl* const storage = storage_of(tensor);
    return is_alike(tensor, layout) && tensor.storage_offset() == offset_ && storage != nullptr &&
           storage->mutable_data() == memory_;
  }

  c10::DispatchKeySet keys_;  // of no tensor, where they were never taken
  caffe2::TypeMeta dtype_;
  c10::Device device_{c10::kCPU};
  std::int64_t offset_ = 0;
  const void* memory_ = nullptr;
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

inline const void* place_of_gradient(PyObject* param) {
  const auto* const meta = THPVariable_Unpack(param).unsafeGetTensorImpl()->autograd_meta();
  return meta == nullptr ? nullptr : &static_cast<const torch::autograd::AutogradMeta*>(meta)->grad_;
}

inline void prepare_torch() {}

}  // namespace fusedreg
