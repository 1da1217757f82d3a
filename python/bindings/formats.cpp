#include <pybind11/stl.h>

#include <optional>
#include <variant>

#include "arrays.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/formats/vector_codebook.hpp"

namespace quantloom::python {
namespace {

std::shared_ptr<PackedTensor> make_packed(const std::string& json, int64_t n, int64_t k,
                                          const std::map<std::string, ArrayRef>& planes) {
  auto packed = std::make_shared<PackedTensor>();
  packed->format = format_from_json(json);
  packed->n = n;
  packed->k = k;
  packed->planes = to_tensors(planes, "plane");
  const py::gil_scoped_release release;
  validate(*packed);
  return packed;
}

py::list planes_of(const std::string& json, int64_t n, int64_t k) {
  py::list result;
  for (const PlaneSpec& spec : format_from_json(json)->planes(n, k)) {
    py::dict plane;
    plane["name"] = spec.name;
    plane["dtype"] = name_of(spec.dtype);
    plane["shape"] = py::tuple(py::cast(spec.shape));
    plane["optional"] = spec.optional;
    result.append(plane);
  }
  return result;
}

py::list table() {
  py::list result;
  for (const FormatEntry& entry : format_table()) {
    py::dict row;
    row["name"] = entry.name;
    row["summary"] = entry.summary;
    row["examples"] = entry.examples;
    result.append(row);
  }
  return result;
}

}  // namespace

void bind_formats(py::module_& module) {
  module.def("format_from_spec", [](const std::string& spec) { return format_from_spec(spec)->to_json(); });
  module.def("format_canonical", [](const std::string& json) { return format_from_json(json)->to_json(); });
  module.def("format_spec", [](const std::string& json) { return format_from_json(json)->spec(); });
  module.def("format_planes", &planes_of);
  module.def("format_table", &table);
  module.def(
      "uniform_json", [](int64_t bits, int64_t group_size, bool symmetric, const std::string& scale_dtype) {
        return Uniform(to_int("bits", bits), group_size, symmetric, dtype_from_name(scale_dtype)).to_json();
      });

  module.def("bcq_json", [](int64_t bits, int64_t group_size, bool offset, const std::string& scale_dtype,
                            int64_t rounds, bool greedy) {
    return Bcq(to_int("bits", bits), group_size, offset, dtype_from_name(scale_dtype),
               to_int("rounds", rounds), greedy)
        .to_json();
  });
  module.def("to_bcq", [](const PackedTensor& packed, const std::optional<std::string>& scale_dtype) {
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(
        to_bcq(packed, scale_dtype ? std::optional(dtype_from_name(*scale_dtype)) : std::nullopt));
  });

  // `table`: a name of codebook_tables() or values; `bits`: 0 for as few as the table needs.
  module.def("codebook_json", [](const std::variant<std::string, std::vector<float>>& table, int64_t bits,
                                 int64_t group_size, const std::string& scale_dtype) {
    const DType dtype = dtype_from_name(scale_dtype);
    const auto width = bits == 0 ? std::nullopt : std::optional<int>(to_int("bits", bits));
    if (const auto* name = std::get_if<std::string>(&table)) {
      return Codebook(*name, group_size, dtype, width).to_json();
    }
    return Codebook(std::get<std::vector<float>>(table), group_size, dtype, width).to_json();
  });
  module.def("codebook_values", [](const std::string& json) {
    const auto format = std::dynamic_pointer_cast<const Codebook>(format_from_json(json));
    if (format == nullptr) throw InvalidArgument("format", "another format", "a codebook");
    return format->table;
  });

  // `table`: codebooks * entries * dim values, or none.
  module.def("vector_codebook_json", [](int64_t entries, int64_t dim, int64_t group_size, int64_t codebooks,
                                        const std::string& scale_dtype, const std::vector<float>& table) {
    const DType dtype = dtype_from_name(scale_dtype);
    return VectorCodebook(entries, dim, group_size, dtype, codebooks, table).to_json();
  });

  module.def("outliers_json", [](const std::string& dense, std::optional<double> percent, int64_t count) {
    auto format = format_from_json(dense);
    return percent ? Outliers(std::move(format), *percent).to_json()
                   : Outliers(std::move(format), count).to_json();
  });

  module.def("sdr_json", [](int64_t bits, int64_t group_size, const std::string& scale_dtype) {
    return Sdr(to_int("bits", bits), group_size, dtype_from_name(scale_dtype)).to_json();
  });
  module.def("sdr_average_bits", [](const std::string& json, int64_t k) {
    const auto format = std::dynamic_pointer_cast<const Sdr>(format_from_json(json));
    if (format == nullptr) throw InvalidArgument("format", "another format", "sdr");
    return format->average_bits(k);
  });
  module.def("sdr_to_uniform", [](const PackedTensor& packed, bool by_groups) {
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(sdr_to_uniform(packed, by_groups));
  });

  module.def("spqr_json",
             [](int64_t bits, int64_t group_size, int64_t scale_bits, int64_t zero_bits, int64_t block) {
               return Spqr(to_int("bits", bits), group_size, to_int("scale_bits", scale_bits),
                           to_int("zero_bits", zero_bits), block)
                   .to_json();
             });
  module.def("spqr_average_bits", [](const std::string& json, double outlier_rate) {
    const auto format = std::dynamic_pointer_cast<const Spqr>(format_from_json(json));
    if (format == nullptr) throw InvalidArgument("format", "another format", "spqr");
    return spqr_average_bits(*format, outlier_rate);
  });

  py::class_<PackedTensor, std::shared_ptr<PackedTensor>>(module, "Packed")
      .def(py::init(&make_packed), py::arg("format_json"), py::arg("n"), py::arg("k"), py::arg("planes"))
      .def_readonly("n", &PackedTensor::n)
      .def_readonly("k", &PackedTensor::k)
      .def_property_readonly("format_json", [](const PackedTensor& p) { return p.format->to_json(); })
      .def_property_readonly("size_in_bits", &PackedTensor::size_in_bits)
      .def(
          "planes", [](const PackedTensor& p, bool writeable) { return to_numpy(p.planes, writeable); },
          py::arg("writeable") = true);
  module.def(
      "dequantize",
      [](const PackedTensor& packed, const ArrayRef& out, int64_t threads) {
        const auto view = out.matrix<float>("out", DType::f32);
        const py::gil_scoped_release release;
        dequantize(packed, view, to_int("threads", threads));
      },
      py::arg("packed"), py::arg("out"), py::arg("threads"));
}

}  // namespace quantloom::python
