#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/formats/coded_matrix.hpp"
#include "quantloom/kernels/coded_product.hpp"

namespace quantloom::python {
namespace {

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

CodedOptions to_options(int64_t table_bits, int64_t splits, double overhead, int64_t threads) {
  CodedOptions options;
  options.table_bits = to_int("table_bits", table_bits);
  options.splits = to_int("splits", splits);
  options.overhead = overhead;
  options.threads = to_int("threads", threads);
  return options;
}

// codes: uint8 [n, k], contiguous; values: float32 [entries].
std::shared_ptr<CodedTensor> from_codes(const ArrayRef& codes, const std::vector<float>& values,
                                        const ArrayRef& scales, int64_t rows_per_scale,
                                        int64_t columns_per_scale, int64_t table_bits, int64_t splits,
                                        double overhead, int64_t threads) {
  const auto matrix = codes.matrix<const uint8_t>("codes", DType::u8);
  if (!codes.contiguous()) throw InvalidArgument("codes", "an array with gaps", "a contiguous array");
  const FloatMatrix scale_matrix = scales.float_matrix("scales");
  const CodedOptions options = to_options(table_bits, splits, overhead, threads);
  const py::gil_scoped_release release;
  const std::span span(matrix.data(), static_cast<size_t>(matrix.rows() * matrix.cols()));
  return std::make_shared<CodedTensor>(CodedMatrix(span, matrix.rows(), matrix.cols(), options), values,
                                       scale_matrix, rows_per_scale, columns_per_scale);
}

std::vector<uint32_t> words_of(const ArrayRef& array, const char* argument) {
  if (array.device() != Device::cpu || array.dtype() != DType::u32 || !array.contiguous() ||
      array.shape().size() != 1) {
    throw TypeMismatch(argument, name_of(array.dtype()), "a contiguous vector of uint32");
  }
  const auto* data = static_cast<const uint32_t*>(array.data());
  return {data, data + array.element_count()};
}

std::shared_ptr<CodedTensor> from_parts(int64_t n, int64_t k, int64_t splits, const ArrayRef& symbols,
                                        const ArrayRef& begins, const ArrayRef& words,
                                        const std::vector<float>& values, const ArrayRef& scales,
                                        int64_t rows_per_scale, int64_t columns_per_scale) {
  auto symbol_words = words_of(symbols, "symbols");
  auto begin_words = words_of(begins, "begins");
  auto coded_words = words_of(words, "words");
  const FloatMatrix scale_matrix = scales.float_matrix("scales");
  const int count = to_int("splits", splits);
  const py::gil_scoped_release release;
  return std::make_shared<CodedTensor>(
      CodedMatrix::from_parts(n, k, count, std::move(symbol_words), std::move(begin_words),
                              std::move(coded_words)),
      values, scale_matrix, rows_per_scale, columns_per_scale);
}

py::array_t<uint32_t> to_array(const std::vector<uint32_t>& words) {
  return py::array_t<uint32_t>(static_cast<py::ssize_t>(words.size()), words.data());
}

// What from_parts() takes, scales as float32: each value of the others is one of float32.
py::dict parts_of(const CodedTensor& tensor) {
  py::dict parts;
  const CodedMatrix& codes = tensor.codes();
  parts["n"] = tensor.n();
  parts["k"] = tensor.k();
  parts["splits"] = codes.splits();
  parts["symbols"] = to_array(codes.symbols());
  parts["begins"] = to_array(codes.begins());
  parts["words"] = to_array(codes.words());
  parts["values"] = std::vector<float>(tensor.values().begin(), tensor.values().end());
  const FloatMatrix scales = tensor.scales();
  py::array_t<float> array({scales.rows(), scales.cols()});
  for (int64_t row = 0; row < scales.rows(); ++row) {
    scales.read(row, 0, scales.cols(), array.mutable_data() + row * scales.cols());
  }
  parts["scales"] = array;
  parts["scale_dtype"] = std::string(name_of(scales.dtype()));
  parts["rows_per_scale"] = tensor.rows_per_scale();
  parts["columns_per_scale"] = tensor.columns_per_scale();
  return parts;
}

CudaMatmulArguments to_arguments(uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y, int64_t y_stride,
                                 int64_t m, const std::string& dtype, uintptr_t workspace,
                                 int64_t workspace_bytes, uintptr_t stream) {
  return {
      pointer(x),         x_stride,        pointer(bias),  pointer(y), y_stride, m, dtype_from_name(dtype),
      pointer(workspace), workspace_bytes, pointer(stream)};
}

}  // namespace

void bind_coded(py::module_& module) {
  py::class_<CodedTensor, std::shared_ptr<CodedTensor>>(module, "CodedTensor")
      .def_property_readonly("n", &CodedTensor::n)
      .def_property_readonly("k", &CodedTensor::k)
      .def_property_readonly("byte_count", &CodedTensor::byte_count)
      .def_property_readonly("splits", [](const CodedTensor& t) { return t.codes().splits(); })
      .def_property_readonly("table_bits", [](const CodedTensor& t) { return t.codes().table_bits(); })
      .def("parts", &parts_of)
      .def("dequantize",
           [](const CodedTensor& t, const ArrayRef& out, int64_t threads) {
             const auto matrix = out.matrix<float>("out", DType::f32);
             const int team = to_int("threads", threads);
             const py::gil_scoped_release release;
             t.dequantize(0, matrix, team);
           })
      .def("matmul", [](const CodedTensor& t, const ArrayRef& x, const ArrayRef& y, int64_t threads) {
        const FloatMatrix tokens = x.float_matrix("x");
        const auto out = y.matrix<float>("y", DType::f32);
        const int team = to_int("threads", threads);
        const py::gil_scoped_release release;
        matmul(tokens, t, out, team);
      });
  module.def("coded_from_codes", &from_codes, py::arg("codes"), py::arg("values"), py::arg("scales"),
             py::arg("rows_per_scale"), py::arg("columns_per_scale"), py::arg("table_bits") = 0,
             py::arg("splits") = 0, py::arg("overhead") = 0.01, py::arg("threads") = 0);
  module.def("coded_from_parts", &from_parts, py::arg("n"), py::arg("k"), py::arg("splits"),
             py::arg("symbols"), py::arg("begins"), py::arg("words"), py::arg("values"), py::arg("scales"),
             py::arg("rows_per_scale"), py::arg("columns_per_scale"));
  module.def(
      "coded_from_packed",
      [](const PackedTensor& packed, int64_t table_bits, int64_t splits, double overhead, int64_t threads) {
        const CodedOptions options = to_options(table_bits, splits, overhead, threads);
        const py::gil_scoped_release release;
        return std::make_shared<CodedTensor>(code_packed(packed, options));
      },
      py::arg("packed"), py::arg("table_bits") = 0, py::arg("splits") = 0, py::arg("overhead") = 0.01,
      py::arg("threads") = 0);

  py::class_<CudaCodedTensor, std::shared_ptr<CudaCodedTensor>>(module, "CudaCodedTensor")
      .def(py::init([](const CodedTensor& tensor, uintptr_t stream) {
             const py::gil_scoped_release release;
             return std::make_shared<CudaCodedTensor>(tensor, pointer(stream));
           }),
           py::arg("tensor"), py::arg("stream"))
      .def_property_readonly("byte_count", &CudaCodedTensor::byte_count)
      .def("kernel",
           [](const CudaCodedTensor& t, int64_t m, const std::string& dtype,
              const CudaMatmulOptions& options) { return t.kernel(m, dtype_from_name(dtype), options); })
      .def("workspace",
           [](const CudaCodedTensor& t, int64_t m, const std::string& dtype,
              const CudaMatmulOptions& options) { return t.workspace(m, dtype_from_name(dtype), options); })
      // The same arguments as PreparedPlanes.matmul.
      .def("matmul",
           [](const CudaCodedTensor& t, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y,
              int64_t y_stride, int64_t m, const std::string& dtype, uintptr_t workspace,
              int64_t workspace_bytes, uintptr_t stream, const CudaMatmulOptions& options) {
             const CudaMatmulArguments arguments =
                 to_arguments(x, x_stride, bias, y, y_stride, m, dtype, workspace, workspace_bytes, stream);
             const py::gil_scoped_release release;
             t.matmul(arguments, options);
           })
      .def("dequantize", [](const CudaCodedTensor& t, int64_t first_row, int64_t rows, uintptr_t out,
                            const std::string& dtype, int64_t stride, uintptr_t stream) {
        const DType type = dtype_from_name(dtype);
        const py::gil_scoped_release release;
        t.dequantize(first_row, rows, pointer(out), type, stride, pointer(stream));
      });
}

}  // namespace quantloom::python
