// What a plan asks of torch's tensors: all that csrc knows of torch, but for its threads (cpu/threads.h). It is asked
// in one of two ways: of the C++ of the very torch that it is compiled with, or, in the wheel, of what every torch from
// 2.10 on answers alike.
#pragma once

#include "../maths/storage.h"
#include "python.h"

namespace fusedreg {

enum class Element : std::uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kComplex64,
  kComplex128,
  kInt64,
  kInt8,
  kUInt8,
  kOther
};

constexpr bool is_complex(Element element) { return element == Element::kComplex64 || element == Element::kComplex128; }

// Floating point and complex numbers.
constexpr bool is_supported(Element element) { return element < Element::kInt64; }

// And codes.
constexpr bool is_supported_state(Element element) {
  return is_supported(element) || element == Element::kInt8 || element == Element::kUInt8;
}

// Of the real numbers that an element is made of.
constexpr DType dtype_of(Element element) {
  switch (element) {
    case Element::kFloat64:
    case Element::kComplex128:
      return DType::kFloat64;
    case Element::kBFloat16:
      return DType::kBFloat16;
    case Element::kFloat16:
      return DType::kFloat16;
    case Element::kInt8:
      return DType::kInt8;
    case Element::kUInt8:
      return DType::kUInt8;
    default:
      return DType::kFloat32;
  }
}

// Sizes, and the order of a tensor's elements in memory.
struct Layout {
  std::vector<std::int64_t> sizes, strides;

  // The stride of a size of 1 says nothing: channels_last convolutions of 1x1 and their gradients come with different
  // ones.
  bool is(const std::int64_t* its_sizes, const std::int64_t* its_strides, std::size_t dim) const {
    if (dim != sizes.size()) return false;
    for (std::size_t i = 0; i < dim; ++i) {
      if (its_sizes[i] != sizes[i] || (its_strides[i] != strides[i] && sizes[i] > 1)) return false;
    }
    return true;
  }
  auto operator<=>(const Layout&) const = default;
};

// A tensor's memory as it is now. The sizes and strides are the tensor's own, and last as long as nobody changes it.
struct View {
  void* data = nullptr;
  const std::int64_t *sizes = nullptr, *strides = nullptr;
  std::size_t dim = 0;
  Element element = Element::kOther;
  std::int64_t device = 0;

  std::int64_t numel() const {
    std::int64_t numel = 1;
    for (std::size_t i = 0; i < dim; ++i) numel *= sizes[i];
    return numel;
  }
  bool has_memory() const { return data != nullptr || numel() == 0; }
};

}  // namespace fusedreg

// Both define
//
//   bool is_tensor(PyObject*)
//   bool look(PyObject* tensor, View&)     false: it has no strided memory of its own that one could look at
//   bool is_inference(PyObject* tensor)    whether it was made in InferenceMode
//   bool is_inference_mode()
//   bool is_observed()                     by a profiler, or a mode that sees torch's operations and none of ours
//   bool is_as_stored(PyObject* tensor)    neither conjugated nor negated when it is read
//   bool is_still_as_stored(tensor)        the same of one that was when the plan was made. The wheel does not ask: it
//                                          would in each step, and only `tensor.data = ` makes it so behind a plan
//
//   Tensor       holds a tensor; not a parameter, which others hold: torch.utils.swap_tensors must be able to exchange
//   it,
//                and Python's garbage collector to see who holds it
//   Gradient     likewise, for the time of a step
//   Fields       all that look() and is_as_stored() read of a tensor, when they had an answer: where the fields are as
//                they were, so is the answer, and to compare them is the quickest. In the wheel there are none
//   Place        where torch keeps what a step asks of a tensor: to be asked for ahead of time
//   place_of_gradient(PyObject* tensor)   likewise, where its gradient is found
//   Versions     tells autograd of in-place changes; change_all(tuple): of all at once, false where nothing is gained
#if defined(FUSEDREG_STABLE)
#include "tensors_stable.h"
#else
#include "tensors_aten.h"
#endif
