// Trellis-coded rings on CUDA devices. Python makes the device of the arrays current, allocates the results
// and the workspace, and passes the stream.
#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/trellis_cuda.hpp"

namespace quantloom::python {
namespace {

constexpr int64_t kRing = 256;
constexpr int64_t kStates = 65536;

void* to_stream(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

void* device_array(const ArrayRef& array, const std::string& argument, DType dtype, int64_t count) {
  if (array.device() != Device::cuda) {
    throw TypeMismatch(argument, "memory of the CPU", "memory of a CUDA device");
  }
  if (array.dtype() != dtype) throw TypeMismatch(argument, name_of(array.dtype()), name_of(dtype));
  if (!array.contiguous()) throw InvalidArgument(argument, "an array with gaps", "a contiguous array");
  if (count >= 0 && array.element_count() != count) {
    throw InvalidArgument(argument, text_of(array.element_count(), " of them"), text_of(count));
  }
  return array.data();
}

// Rows of `columns` in an array of two dimensions.
int64_t rows_of(const ArrayRef& array, const std::string& argument, int64_t columns) {
  array.require_rank_2(argument);
  if (array.shape()[1] != columns) {
    throw InvalidArgument(argument, text_of("rows of ", array.shape()[1]), text_of("rows of ", columns));
  }
  return array.shape()[0];
}

TrellisShape shape_of(const CudaTrellisCodebook& codebook, int64_t half_bits) {
  TrellisShape shape;
  shape.half_bits = to_int("half_bits", half_bits);
  shape.weights_per_step = codebook.weights_per_step();
  return shape;
}

CudaTrellisCodebook named_codebook(const std::string& name, uintptr_t stream) {
  const TrellisCodebook codebook = trellis_codebook(name);
  const py::gil_scoped_release release;
  return CudaTrellisCodebook(codebook, to_stream(stream));
}

CudaTrellisCodebook table_codebook(const ArrayRef& weights, uintptr_t stream) {
  const FloatMatrix rows = weights.float_matrix("weights");
  if (rows.rows() != 1 || rows.cols() != kStates) {
    throw InvalidArgument("weights", text_of(rows.rows() * rows.cols(), " of them"), text_of(kStates));
  }
  std::vector<float> values(kStates);
  rows.read(0, 0, kStates, values.data());
  TrellisCodebook codebook;
  codebook.name = "table";
  codebook.code = TrellisCode::table;
  for (const float value : values) codebook.table.push_back(f16_from_float(value));
  const py::gil_scoped_release release;
  return CudaTrellisCodebook(codebook, to_stream(stream));
}

py::tuple workspace(const CudaTrellisCodebook& codebook, int64_t half_bits, const std::string& search,
                    int64_t count) {
  const TrellisWorkspace sizes =
      trellis_workspace_cuda(shape_of(codebook, half_bits), trellis_search_from_name(search), count);
  return py::make_tuple(sizes.fast_bytes, sizes.least_bytes);
}

void encode(const CudaTrellisCodebook& codebook, const ArrayRef& targets, int64_t half_bits,
            const std::string& search, const ArrayRef& words, const ArrayRef& squared_errors,
            const ArrayRef& workspace, uintptr_t stream) {
  CudaRings rings;
  rings.shape = shape_of(codebook, half_bits);
  rings.count = rows_of(targets, "targets", kRing);
  rings.targets = static_cast<const float*>(device_array(targets, "targets", DType::f32, -1));
  rings.words = static_cast<uint32_t*>(
      device_array(words, "words", DType::i32, checked_mul(rings.count, rings.shape.words())));
  rings.squared_errors =
      static_cast<float*>(device_array(squared_errors, "squared_errors", DType::f32, rings.count));
  void* const memory = device_array(workspace, "workspace", DType::u8, -1);
  const int64_t bytes = workspace.element_count();
  const TrellisSearch how = trellis_search_from_name(search);
  const py::gil_scoped_release release;
  encode_rings_cuda(codebook, rings, how, memory, bytes, to_stream(stream));
}

void decode(const CudaTrellisCodebook& codebook, const ArrayRef& words, int64_t half_bits,
            const ArrayRef& weights, uintptr_t stream) {
  const TrellisShape shape = shape_of(codebook, half_bits);
  const int64_t count = rows_of(words, "words", shape.words());
  const auto* const from = static_cast<const uint32_t*>(device_array(words, "words", DType::i32, -1));
  void* const to = device_array(weights, "weights", weights.dtype(), checked_mul(count, kRing));
  const DType dtype = weights.dtype();
  const py::gil_scoped_release release;
  decode_rings_cuda(codebook, from, count, shape, to, dtype, to_stream(stream));
}

void gather(const ArrayRef& matrix, double factor, const ArrayRef& targets, uintptr_t stream) {
  const CudaMatrix from = matrix.cuda_matrix("matrix");
  auto* const to =
      static_cast<float*>(device_array(targets, "targets", DType::f32, checked_mul(from.rows, from.cols)));
  const py::gil_scoped_release release;
  gather_tiles_cuda(from, static_cast<float>(factor), to, to_stream(stream));
}

void decode_tiles(const CudaTrellisCodebook& codebook, const ArrayRef& words, int64_t half_bits,
                  const ArrayRef& matrix, uintptr_t stream) {
  const CudaMatrix to = matrix.cuda_matrix("matrix");
  const TrellisShape shape = shape_of(codebook, half_bits);
  const auto* const from = static_cast<const uint32_t*>(
      device_array(words, "words", DType::i32, checked_mul(to.rows * to.cols / kRing, shape.words())));
  const py::gil_scoped_release release;
  decode_tiles_cuda(codebook, from, shape, to, to_stream(stream));
}

}  // namespace

void bind_cuda_trellis(py::module_& module) {
  py::class_<CudaTrellisCodebook>(module, "CudaTrellisCodebook")
      .def(py::init(&named_codebook), py::arg("name"), py::arg("stream"))
      .def_static("from_table", &table_codebook, py::arg("weights"), py::arg("stream"))
      .def_property_readonly("weights_per_step", &CudaTrellisCodebook::weights_per_step)
      .def_property_readonly("device", &CudaTrellisCodebook::device);
  module.def("trellis_workspace_cuda", &workspace, py::arg("codebook"), py::arg("half_bits"),
             py::arg("search"), py::arg("count"));
  module.def("encode_rings_cuda", &encode, py::arg("codebook"), py::arg("targets"), py::arg("half_bits"),
             py::arg("search"), py::arg("words"), py::arg("squared_errors"), py::arg("workspace"),
             py::arg("stream"));
  module.def("decode_rings_cuda", &decode, py::arg("codebook"), py::arg("words"), py::arg("half_bits"),
             py::arg("weights"), py::arg("stream"));
  module.def("gather_tiles_cuda", &gather, py::arg("matrix"), py::arg("factor"), py::arg("targets"),
             py::arg("stream"));
  module.def("decode_tiles_cuda", &decode_tiles, py::arg("codebook"), py::arg("words"), py::arg("half_bits"),
             py::arg("matrix"), py::arg("stream"));
}

}  // namespace quantloom::python
