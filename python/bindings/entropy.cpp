#include "quantloom/formats/entropy.hpp"

#include <pybind11/stl.h>

#include <algorithm>

#include "arrays.hpp"
#include "quantloom/formats/entropy_cuda.hpp"

namespace quantloom::python {
namespace {

using Counts = std::optional<std::vector<uint64_t>>;

EntropyCoder to_coder(const std::string& name) {
  if (name == "rans") return EntropyCoder::rans;
  if (name == "huffman") return EntropyCoder::huffman;
  throw InvalidArgument("coder", name, "rans or huffman");
}

// Calls `use` with the codes of a contiguous array of uint8 or uint16.
template <class Use>
auto with_codes(const py::array& codes, const Use& use) {
  if ((codes.flags() & py::array::c_style) == 0) {
    throw InvalidArgument("codes", "an array with gaps", "a contiguous array (pass a copy)");
  }
  const auto count = static_cast<size_t>(codes.size());
  if (codes.dtype().is(py::dtype::of<uint8_t>())) {
    return use(std::span(static_cast<const uint8_t*>(codes.data()), count));
  }
  if (codes.dtype().is(py::dtype::of<uint16_t>())) {
    if (reinterpret_cast<uintptr_t>(codes.data()) % alignof(uint16_t) != 0) {
      throw InvalidArgument("codes", "memory that is not aligned to 2 bytes", "aligned memory");
    }
    return use(std::span(static_cast<const uint16_t*>(codes.data()), count));
  }
  throw TypeMismatch("codes", std::string(py::str(codes.dtype())), "uint8 or uint16");
}

py::array_t<uint8_t> to_array(std::vector<std::byte> bytes) {
  auto* kept = new std::vector<std::byte>(std::move(bytes));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<std::byte>*>(p); });
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(kept->size()),
                              reinterpret_cast<const uint8_t*>(kept->data()), owner);
}

py::array_t<uint8_t> encode(const py::array& codes, const Counts& frequencies, const std::string& coder,
                            int64_t table_bits, int64_t chunk, int64_t threads) {
  EntropyOptions options;
  options.coder = to_coder(coder);
  if (frequencies && frequencies->empty()) {
    throw InvalidArgument("frequencies", "no numbers", "one for each code, or None");
  }
  if (frequencies) options.frequencies = *frequencies;
  options.table_bits = to_int("table_bits", table_bits);
  options.chunk = chunk;
  options.threads = to_int("threads", threads);
  return to_array(with_codes(codes, [&](auto values) {
    const py::gil_scoped_release release;
    return entropy_encode(values, options);
  }));
}

// The bytes of anything with a contiguous buffer of bytes: NumPy's uint8, bytes, a memory map.
std::span<const std::byte> bytes_of(const py::buffer_info& info) {
  if (info.itemsize != 1 || info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw InvalidArgument("stream", "a buffer of another shape", "contiguous bytes");
  }
  return {static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size)};
}

py::array decode(const py::buffer& stream, int64_t first, std::optional<int64_t> count,
                 std::optional<int64_t> expected, int64_t threads) {
  const py::buffer_info info = stream.request();
  const EntropyStream parsed(bytes_of(info));
  if (expected && *expected != parsed.count()) {
    throw FileFormatError(text_of("entropy stream: ", parsed.count(), " codes, expected ", *expected));
  }
  if (first < 0 || first > parsed.count()) {
    throw InvalidArgument("first", text_of(first), text_of("0 to ", parsed.count()));
  }
  const int64_t wanted = count.value_or(parsed.count() - first);
  if (wanted < 0 || wanted > parsed.count() - first) {
    throw InvalidArgument("count", text_of(wanted), text_of("0 to ", parsed.count() - first));
  }
  const int team = to_int("threads", threads);
  const auto run = [&](auto out) -> py::array {
    using Code = typename decltype(out)::value_type;
    const std::span<Code> codes(out.mutable_data(), static_cast<size_t>(wanted));
    const py::gil_scoped_release release;
    parsed.decode(first, codes, team);
    return out;
  };
  if (parsed.alphabet() <= 256) return run(py::array_t<uint8_t>(wanted));
  return run(py::array_t<uint16_t>(wanted));
}

py::dict describe(const py::buffer& stream) {
  const py::buffer_info info = stream.request();
  const EntropyStream parsed(bytes_of(info));
  py::dict result;
  result["coder"] = parsed.coder() == EntropyCoder::rans ? "rans" : "huffman";
  result["table_bits"] = parsed.table_bits();
  result["escape"] = parsed.tables().escape;
  result["alphabet"] = parsed.alphabet();
  result["count"] = parsed.count();
  result["chunk"] = parsed.chunk();
  result["chunks"] = parsed.chunks();
  result["model"] =
      py::array_t<uint32_t>(static_cast<py::ssize_t>(parsed.model().size()), parsed.model().data());
  result["bytes"] = info.size;
  return result;
}

const ArrayRef& on_cuda(const ArrayRef& array, std::string_view argument) {
  if (array.device() != Device::cuda) {
    throw TypeMismatch(argument, "memory of the CPU", "memory of a CUDA device");
  }
  return array;
}

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

CudaEntropyStream to_cuda(const py::buffer& stream, uintptr_t cuda_stream) {
  const py::buffer_info info = stream.request();
  const std::span<const std::byte> bytes = bytes_of(info);
  const py::gil_scoped_release release;
  return CudaEntropyStream(EntropyStream(bytes), pointer(cuda_stream));
}

void decode_codes_cuda(const CudaEntropyStream& stream, int64_t first, const ArrayRef& out,
                       uintptr_t cuda_stream) {
  on_cuda(out, "out");
  if (out.dtype() != DType::u8 || !out.contiguous()) {
    throw TypeMismatch("out", name_of(out.dtype()), "a contiguous array of uint8");
  }
  const py::gil_scoped_release release;
  stream.decode(first, out.element_count(), static_cast<uint8_t*>(out.data()), pointer(cuda_stream));
}

// `table` [entries] of float32, `scales` a matrix, `out` rows from first_row on of the matrix [n, k].
void decode_values_cuda(const CudaEntropyStream& stream, int64_t n, const ArrayRef& table,
                        const ArrayRef& scales, int64_t rows_per_scale, int64_t columns_per_scale,
                        int64_t first_row, const ArrayRef& out, uintptr_t cuda_stream) {
  on_cuda(table, "table");
  on_cuda(scales, "scales").require_rank_2("scales");
  on_cuda(out, "out").require_rank_2("out");
  if (table.dtype() != DType::f32 || !table.contiguous() || table.shape().size() != 1) {
    throw TypeMismatch("table", name_of(table.dtype()), "a contiguous vector of float32");
  }
  EntropyValues values;
  values.n = n;
  values.k = out.shape()[1];
  values.table = static_cast<const float*>(table.data());
  values.entries = table.element_count();
  values.scales = scales.data();
  values.scale_dtype = scales.dtype();
  values.rows_per_scale = rows_per_scale;
  values.columns_per_scale = columns_per_scale;
  if (rows_per_scale <= 0 || columns_per_scale <= 0 || !scales.contiguous() ||
      scales.shape()[0] != ceil_div(n, rows_per_scale) ||
      scales.shape()[1] != ceil_div(values.k, columns_per_scale)) {
    throw InvalidArgument("scales", text_of("shape [", scales.shape()[0], ", ", scales.shape()[1], "]"),
                          text_of("a contiguous array, one for each block of ", rows_per_scale, " x ",
                                  columns_per_scale, " in [", n, ", ", values.k, "]"));
  }
  const py::gil_scoped_release release;
  stream.decode_values(values, first_row, out.shape()[0], out.data(), out.dtype(), out.row_stride(),
                       pointer(cuda_stream));
}

}  // namespace

void bind_entropy(py::module_& module) {
  py::class_<CudaEntropyStream>(module, "CudaEntropyStream")
      .def(py::init(&to_cuda), py::arg("stream"), py::arg("cuda_stream") = 0)
      .def_property_readonly("count", &CudaEntropyStream::count)
      .def_property_readonly("chunk", &CudaEntropyStream::chunk)
      .def_property_readonly("byte_count", &CudaEntropyStream::byte_count)
      .def("decode", &decode_codes_cuda, py::arg("first"), py::arg("out"), py::arg("cuda_stream"))
      .def("decode_values", &decode_values_cuda, py::arg("n"), py::arg("table"), py::arg("scales"),
           py::arg("rows_per_scale"), py::arg("columns_per_scale"), py::arg("first_row"), py::arg("out"),
           py::arg("cuda_stream"))
      .def("check", [](const CudaEntropyStream& stream, uintptr_t cuda_stream) {
        const py::gil_scoped_release release;
        stream.check(pointer(cuda_stream));
      });
  module.def("entropy_encode", &encode, py::arg("codes"), py::arg("frequencies") = py::none(),
             py::arg("coder") = "rans", py::arg("table_bits") = 0, py::arg("chunk") = 0,
             py::arg("threads") = 0);
  module.def("entropy_decode", &decode, py::arg("stream"), py::arg("first") = 0,
             py::arg("count") = py::none(), py::arg("expected") = py::none(), py::arg("threads") = 0);
  module.def("entropy_describe", &describe, py::arg("stream"));
  module.def("entropy_of", [](const std::vector<uint64_t>& counts) { return entropy_of(counts); });
  module.def(
      "count_codes",
      [](const py::array& codes, int64_t alphabet, int64_t threads) {
        const std::vector<uint64_t> counts = with_codes(codes, [&](auto values) {
          const py::gil_scoped_release release;
          return count_codes(values, alphabet, to_int("threads", threads));
        });
        return py::array_t<uint64_t>(static_cast<py::ssize_t>(counts.size()), counts.data());
      },
      py::arg("codes"), py::arg("alphabet"), py::arg("threads") = 0);
  module.def(
      "huffman_lengths",
      [](const std::vector<double>& weights, int64_t longest) {
        const std::vector<int> lengths = huffman_lengths(weights, to_int("longest", longest));
        return py::array_t<int>(static_cast<py::ssize_t>(lengths.size()), lengths.data());
      },
      py::arg("weights"), py::arg("longest") = 0);
  module.def(
      "quantize_frequencies",
      [](const std::vector<uint64_t>& counts, int64_t table_bits) {
        const std::vector<uint32_t> values = quantize_frequencies(counts, to_int("table_bits", table_bits));
        return py::array_t<uint32_t>(static_cast<py::ssize_t>(values.size()), values.data());
      },
      py::arg("counts"), py::arg("table_bits"));
}

}  // namespace quantloom::python
