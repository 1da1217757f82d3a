#include "quantloom/dtype.hpp"

#include <array>
#include <string>

#include "quantloom/error.hpp"

namespace quantloom {
namespace {

struct DTypeRow {
  DType dtype;
  int64_t size;
  std::string_view name;
  std::string_view safetensors_name;
};

constexpr std::array<DTypeRow, 13> kDTypes = {{
    {DType::f64, 8, "float64", "F64"},
    {DType::f32, 4, "float32", "F32"},
    {DType::f16, 2, "float16", "F16"},
    {DType::bf16, 2, "bfloat16", "BF16"},
    {DType::i64, 8, "int64", "I64"},
    {DType::i32, 4, "int32", "I32"},
    {DType::i16, 2, "int16", "I16"},
    {DType::i8, 1, "int8", "I8"},
    {DType::u64, 8, "uint64", "U64"},
    {DType::u32, 4, "uint32", "U32"},
    {DType::u16, 2, "uint16", "U16"},
    {DType::u8, 1, "uint8", "U8"},
    {DType::boolean, 1, "bool", "BOOL"},
}};

const DTypeRow& row_of(DType dtype) {
  for (const DTypeRow& row : kDTypes) {
    if (row.dtype == dtype) return row;
  }
  throw TypeMismatch("dtype", text_of("value ", static_cast<int>(dtype)), "a value of DType");
}

}  // namespace

int64_t size_of(DType dtype) {
  return row_of(dtype).size;
}
std::string_view name_of(DType dtype) {
  return row_of(dtype).name;
}
std::string_view safetensors_name_of(DType dtype) {
  return row_of(dtype).safetensors_name;
}

DType dtype_from_name(std::string_view name) {
  for (const DTypeRow& row : kDTypes) {
    if (row.name == name) return row.dtype;
  }
  throw TypeMismatch("dtype", name, "a NumPy name such as float32, bfloat16 or int32");
}

}  // namespace quantloom
