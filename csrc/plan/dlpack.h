// What the wheel uses of DLPack's C interface, version 1 (https://dmlc.github.io/dlpack): how a tensor's memory is
// described, and the table of functions that a tensor's Python type has in its attribute __dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace fusedreg::dlpack {

constexpr std::uint32_t kMajorVersion = 1;

enum Code : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5 };

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Device {
  std::int32_t type, index;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t dim;
  DataType dtype;
  std::int64_t *sizes, *strides;  // the tensor's own
  std::uint64_t byte_offset;
};

struct ExchangeHeader {
  std::uint32_t major, minor;
  ExchangeHeader* earlier;  // of an earlier major version, or null
};

struct Exchange {
  ExchangeHeader header;
  void *allocate, *export_owned, *import_owned;  // functions that we have no use for
  int (*look)(void* object, Tensor* seen);  // 0, or a Python exception is set; null where there is no such function
  void* stream;
};

static_assert(sizeof(Tensor) == 48 && sizeof(ExchangeHeader) == 16 && sizeof(Exchange) == 56);

}  // namespace fusedreg::dlpack
