// Python's objects, through the limited C API alone: what is compiled with it runs on every CPython from 3.10 on.
#pragma once

#if defined(FUSEDREG_STABLE)
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fusedreg {

// Thrown where a Python exception is set.
struct PythonError {};

// Owns a reference, or is empty.
class Object {
 public:
  Object() = default;
  // Throws where `made` is null, as what makes an object returns it on an error.
  static Object own(PyObject* made) {
    if (made == nullptr) throw PythonError();
    Object object;
    object.object_ = made;
    return object;
  }
  static Object share(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    Object object;
    object.object_ = borrowed;
    return object;
  }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

inline PyObject* checked(PyObject* borrowed) {
  if (borrowed == nullptr) throw PythonError();
  return borrowed;
}

inline void check_error() {
  if (PyErr_Occurred() != nullptr) throw PythonError();
}

inline Object attribute(PyObject* object, const char* name) {
  return Object::own(PyObject_GetAttrString(object, name));
}

inline std::size_t length(PyObject* list) {
  const Py_ssize_t length = PyList_Size(list);
  if (length < 0) throw PythonError();
  return static_cast<std::size_t>(length);
}

inline std::size_t tuple_length(PyObject* tuple) {
  const Py_ssize_t length = PyTuple_Size(tuple);
  if (length < 0) throw PythonError();
  return static_cast<std::size_t>(length);
}

// Borrowed, as all items are that these two return.
inline PyObject* item(PyObject* list, std::size_t i) {
  return checked(PyList_GetItem(list, static_cast<Py_ssize_t>(i)));
}
inline PyObject* tuple_item(PyObject* tuple, std::size_t i) {
  return checked(PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i)));
}

inline double to_double(PyObject* object) {
  const double number = PyFloat_AsDouble(object);
  if (number == -1) check_error();
  return number;
}

inline std::int64_t to_int(PyObject* object) {
  const std::int64_t number = PyLong_AsLongLong(object);
  if (number == -1) check_error();
  return number;
}

inline std::uint64_t to_unsigned(PyObject* object) {
  const std::uint64_t number = PyLong_AsUnsignedLongLong(object);
  if (number == ~std::uint64_t{0}) check_error();
  return number;
}

inline bool to_bool(PyObject* object) {
  const int answer = PyObject_IsTrue(object);
  if (answer < 0) throw PythonError();
  return answer == 1;
}

inline std::string to_string(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw PythonError();
  return {text, static_cast<std::size_t>(size)};
}

template <class Convert>
auto to_vector(PyObject* sequence, const Convert& convert) {
  std::vector<decltype(convert(sequence))> converted;
  if (PySequence_Size(sequence) == 0) return converted;
  const Object items = PyList_Check(sequence) ? Object::share(sequence) : Object::own(PySequence_List(sequence));
  converted.reserve(length(items.get()));
  for (std::size_t i = 0; i < length(items.get()); ++i) converted.push_back(convert(item(items.get(), i)));
  return converted;
}

inline Object to_python(bool answer) { return Object::own(PyBool_FromLong(answer)); }
inline Object to_python(double number) { return Object::own(PyFloat_FromDouble(number)); }
inline Object to_python(unsigned number) { return Object::own(PyLong_FromUnsignedLong(number)); }
inline Object to_python(std::int64_t number) { return Object::own(PyLong_FromLongLong(number)); }
inline Object to_python(std::uint64_t number) { return Object::own(PyLong_FromUnsignedLongLong(number)); }
inline Object to_python(const std::string& text) {
  return Object::own(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}
template <class Item>
Object to_python(const std::vector<Item>& items) {
  Object list = Object::own(PyList_New(0));
  for (const Item& item : items) {
    if (PyList_Append(list.get(), to_python(item).get()) != 0) throw PythonError();
  }
  return list;
}

inline Object bytes(const void* data, std::size_t size) {
  return Object::own(PyBytes_FromStringAndSize(static_cast<const char*>(data), static_cast<Py_ssize_t>(size)));
}

// Other threads may run Python as long as it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

}  // namespace fusedreg
