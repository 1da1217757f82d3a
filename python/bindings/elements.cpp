// Element-wise rounding and packed codes. quantloom/formats/_numerics.py checks arguments and documents.
#include "quantloom/formats/elements.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"

namespace quantloom::python {
namespace {

// A variant by itself would be converted from its alternatives.
struct ElementSet {
  Elements elements;
};

template <class T>
std::span<T> memory(const ArrayRef& array, DType expected, const std::string& argument) {
  if (array.device() != Device::cpu) {
    throw TypeMismatch(argument, "memory of a CUDA device", "memory of the CPU");
  }
  if (array.dtype() != expected) throw TypeMismatch(argument, name_of(array.dtype()), name_of(expected));
  if (!array.contiguous()) throw InvalidArgument(argument, "an array with gaps", "a contiguous array");
  return {static_cast<T*>(array.data()), static_cast<size_t>(array.element_count())};
}

// Codes are unsigned; torch computes with int32, which has the same bytes.
std::span<uint32_t> code_memory(const ArrayRef& array) {
  const std::span<int32_t> codes = memory<int32_t>(array, DType::i32, "codes");
  return {reinterpret_cast<uint32_t*>(codes.data()), codes.size()};
}

std::span<const float> scale_memory(const ArrayRef* scales) {
  return scales == nullptr ? std::span<const float>() : memory<const float>(*scales, DType::f32, "scales");
}

void round_values(const ElementSet& set, const ArrayRef& x, const ArrayRef* scales, int64_t row_block,
                  int64_t col_block, double factor, const ArrayRef* values, const ArrayRef* codes,
                  int64_t threads) {
  const FloatMatrix matrix = x.float_matrix("x");
  RoundedElements out;
  if (values != nullptr) {
    if (values->dtype() != x.dtype() || values->shape() != x.shape() || !values->contiguous()) {
      throw InvalidArgument("values", "another shape or dtype", "a contiguous array like x");
    }
    out.values = values->data();
  }
  if (codes != nullptr) {
    if (codes->shape() != x.shape()) throw InvalidArgument("codes", "another shape", "the shape of x");
    out.codes = code_memory(*codes).data();
  }
  const std::span<const float> scale_span = scale_memory(scales);
  const int team = to_int("threads", threads);
  const py::gil_scoped_release release;
  round_elements(set.elements, matrix, {scale_span, {row_block, col_block}, static_cast<float>(factor)}, out,
                 team);
}

void decode_values(const ElementSet& set, const ArrayRef& codes, const ArrayRef* scales, int64_t row_block,
                   int64_t col_block, double factor, const ArrayRef& out, int64_t threads) {
  const FloatMatrix matrix = out.float_matrix("out");
  if (!out.contiguous()) throw InvalidArgument("out", "an array with gaps", "a contiguous array");
  const std::span<const uint32_t> code_span = code_memory(codes);
  const std::span<const float> scale_span = scale_memory(scales);
  const int team = to_int("threads", threads);
  const py::gil_scoped_release release;
  decode_elements(set.elements, code_span, {scale_span, {row_block, col_block}, static_cast<float>(factor)},
                  out.data(), out.dtype(), matrix.rows(), matrix.cols(), team);
}

void encode_values(const ElementSet& set, const ArrayRef& x, const ArrayRef* scales, int64_t row_block,
                   int64_t col_block, double factor, const ArrayRef& bytes, int64_t threads) {
  const FloatMatrix matrix = x.float_matrix("x");
  const std::span<uint8_t> target = memory<uint8_t>(bytes, DType::u8, "bytes");
  const std::span<const float> scale_span = scale_memory(scales);
  const int team = to_int("threads", threads);
  const py::gil_scoped_release release;
  encode_elements(set.elements, matrix, {scale_span, {row_block, col_block}, static_cast<float>(factor)},
                  target, team);
}

void decode_packed_values(const ElementSet& set, const ArrayRef& bytes, const ArrayRef* scales,
                          int64_t row_block, int64_t col_block, double factor, const ArrayRef& out,
                          int64_t threads) {
  const FloatMatrix matrix = out.float_matrix("out");
  if (!out.contiguous()) throw InvalidArgument("out", "an array with gaps", "a contiguous array");
  const std::span<const uint8_t> source = memory<const uint8_t>(bytes, DType::u8, "bytes");
  const std::span<const float> scale_span = scale_memory(scales);
  const int team = to_int("threads", threads);
  const py::gil_scoped_release release;
  decode_packed_elements(set.elements, source,
                         {scale_span, {row_block, col_block}, static_cast<float>(factor)}, out.data(),
                         out.dtype(), matrix.rows(), matrix.cols(), team);
}

void statistics_of(const ArrayRef& x, int64_t row_block, int64_t col_block, const std::string& statistic,
                   const ArrayRef& out, int64_t threads) {
  const FloatMatrix matrix = x.float_matrix("x");
  const std::span<float> target = memory<float>(out, DType::f32, "out");
  const BlockGrid grid{row_block, col_block};
  const BlockStatistic kind = block_statistic_from_name(statistic);
  const int team = to_int("threads", threads);
  const py::gil_scoped_release release;
  const std::vector<float> result = block_statistics(matrix, grid, kind, team);
  if (result.size() != target.size()) {
    throw InvalidArgument("out", text_of(target.size(), " values"), text_of(result.size()));
  }
  std::copy(result.begin(), result.end(), target.begin());
}

}  // namespace

void bind_elements(py::module_& module) {
  py::class_<ElementSet>(module, "Elements")
      .def_static("table", [](const std::vector<float>& values) { return ElementSet{TableElements(values)}; })
      .def_static("floats",
                  [](int64_t exponent_bits, int64_t mantissa_bits, const std::string& rounding, bool sign) {
                    return ElementSet{FloatElements(to_int("exponent_bits", exponent_bits),
                                                    to_int("mantissa_bits", mantissa_bits),
                                                    float_rounding_from_name(rounding), sign)};
                  })
      .def_static("integers",
                  [](int64_t count, bool symmetric) { return ElementSet{IntElements(count, symmetric)}; })
      .def_static("powers", [](int64_t count) { return ElementSet{PowerElements(count)}; })
      .def_property_readonly("count", [](const ElementSet& set) { return code_count(set.elements); });
  module.def("round_elements", &round_values, py::arg("elements"), py::arg("x"), py::arg("scales").none(true),
             py::arg("row_block"), py::arg("col_block"), py::arg("factor"), py::arg("values").none(true),
             py::arg("codes").none(true), py::arg("threads"));
  module.def("decode_elements", &decode_values, py::arg("elements"), py::arg("codes"),
             py::arg("scales").none(true), py::arg("row_block"), py::arg("col_block"), py::arg("factor"),
             py::arg("out"), py::arg("threads"));
  module.def("encode_elements", &encode_values, py::arg("elements"), py::arg("x"),
             py::arg("scales").none(true), py::arg("row_block"), py::arg("col_block"), py::arg("factor"),
             py::arg("bytes"), py::arg("threads"));
  module.def("decode_packed_elements", &decode_packed_values, py::arg("elements"), py::arg("bytes"),
             py::arg("scales").none(true), py::arg("row_block"), py::arg("col_block"), py::arg("factor"),
             py::arg("out"), py::arg("threads"));
  module.def("block_statistics", &statistics_of, py::arg("x"), py::arg("row_block"), py::arg("col_block"),
             py::arg("statistic"), py::arg("out"), py::arg("threads"));
  module.def(
      "has_nan",
      [](const ArrayRef& x, int64_t threads) {
        const FloatMatrix matrix = x.float_matrix("x");
        const int team = to_int("threads", threads);
        const py::gil_scoped_release release;
        return has_nan(matrix, team);
      },
      py::arg("x"), py::arg("threads"));
  module.def("packed_code_bytes", &packed_code_bytes, py::arg("codes"), py::arg("count"));
  module.def(
      "pack_codes",
      [](const ArrayRef& codes, uint64_t count, const ArrayRef& out, int64_t threads) {
        const std::span<const uint32_t> code_span = code_memory(codes);
        const std::span<uint8_t> target = memory<uint8_t>(out, DType::u8, "out");
        const int team = to_int("threads", threads);
        const py::gil_scoped_release release;
        pack_codes(code_span, count, target, team);
      },
      py::arg("codes"), py::arg("count"), py::arg("out"), py::arg("threads"));
  module.def(
      "unpack_codes",
      [](const ArrayRef& bytes, uint64_t count, const ArrayRef& codes, int64_t threads) {
        const std::span<const uint8_t> source = memory<const uint8_t>(bytes, DType::u8, "codes");
        const std::span<uint32_t> target = code_memory(codes);
        const int team = to_int("threads", threads);
        const py::gil_scoped_release release;
        unpack_codes(source, count, target, team);
      },
      py::arg("bytes"), py::arg("count"), py::arg("codes"), py::arg("threads"));
}

}  // namespace quantloom::python
