// Fits of tables and codebooks on samples. quantloom/_fitting.py checks arguments and documents.
#include "fit.hpp"

#include <pybind11/stl.h>

#include "quantloom/fit/lloyd_max.hpp"
#include "quantloom/fit/scale_search.hpp"

namespace quantloom::python {
namespace {

std::span<const float> floats(const ArrayRef& array, const std::string& argument) {
  if (array.device() != Device::cpu) {
    throw TypeMismatch(argument, "memory of a CUDA device", "memory of the CPU");
  }
  if (array.dtype() != DType::f32) throw TypeMismatch(argument, name_of(array.dtype()), "float32");
  if (!array.contiguous()) throw InvalidArgument(argument, "an array with gaps", "a contiguous array");
  return {static_cast<const float*>(array.data()), static_cast<size_t>(array.element_count())};
}

std::vector<float> float_list(const ArrayRef& array, const std::string& argument) {
  const std::span<const float> values = floats(array, argument);
  return {values.begin(), values.end()};
}

// An empty span stands for no weights, which an empty array does not.
void require_count(std::span<const float> weights, int64_t count) {
  if (static_cast<int64_t>(weights.size()) != count) {
    throw InvalidArgument("weights", text_of(weights.size(), " of them"), text_of(count));
  }
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::shared_ptr<SortedValues> sort_values(const ArrayRef& values, const ArrayRef* weights, int64_t threads) {
  const std::span<const float> value_span = floats(values, "values");
  const std::span<const float> weight_span =
      weights == nullptr ? std::span<const float>() : floats(*weights, "weights");
  if (weights != nullptr) require_count(weight_span, static_cast<int64_t>(value_span.size()));
  const int team = to_int("threads", threads);
  const py::gil_scoped_release release;
  return std::make_shared<SortedValues>(value_span, weight_span, team);
}

LloydMaxOptions to_options(const std::string& start, const ArrayRef* centroids, double width,
                           double threshold, int64_t max_sweeps, uint64_t seed) {
  LloydMaxOptions options;
  options.start = table_start_from_name(start);
  if (centroids != nullptr) options.centroids = float_list(*centroids, "centroids");
  options.width = width;
  options.threshold = threshold;
  options.max_sweeps = max_sweeps;
  options.seed = seed;
  return options;
}

py::dict fit_table(const SortedValues& sample, int64_t count, const std::string& start,
                   const ArrayRef* centroids, double width, double threshold, int64_t max_sweeps,
                   uint64_t seed) {
  const LloydMaxOptions options = to_options(start, centroids, width, threshold, max_sweeps, seed);
  LloydMaxResult result;
  {
    const py::gil_scoped_release release;
    result = lloyd_max(sample, count, options);
  }
  py::dict fields;
  fields["centroids"] = to_array(result.centroids);
  fields["sweeps"] = result.sweeps;
  fields["changed"] = result.changed;
  fields["converged"] = result.converged;
  fields["squared_error"] = result.squared_error;
  return fields;
}

py::array_t<double> errors_of_tables(const SortedValues& sample, const std::vector<const ArrayRef*>& arrays,
                                     const ArrayRef& scale_array, int64_t threads) {
  std::vector<std::vector<float>> tables;
  for (const ArrayRef* array : arrays) tables.push_back(float_list(*array, "tables"));
  const std::span<const float> scales = floats(scale_array, "scales");
  const int team = to_int("threads", threads);
  std::vector<double> errors;
  {
    const py::gil_scoped_release release;
    errors = table_errors(sample, tables, scales, team);
  }
  return py::array_t<double>(
      {static_cast<py::ssize_t>(tables.size()), static_cast<py::ssize_t>(scales.size())}, errors.data());
}

py::array_t<int64_t> counts_of_table(const SortedValues& sample, const ArrayRef& table_array, double scale) {
  const std::vector<float> table = float_list(table_array, "table");
  std::vector<int64_t> counts;
  {
    const py::gil_scoped_release release;
    counts = table_counts(sample, table, static_cast<float>(scale));
  }
  return to_array(counts);
}

MatrixView<const float> vectors(const ArrayRef& array, const std::string& argument) {
  return array.matrix<const float>(argument, DType::f32);
}

py::array_t<int32_t> nearest(const ArrayRef& x, const ArrayRef& centroids, int64_t threads) {
  const MatrixView<const float> rows = vectors(x, "x");
  const MatrixView<const float> table = vectors(centroids, "centroids");
  const int team = to_int("threads", threads);
  py::array_t<int32_t> codes(static_cast<py::ssize_t>(rows.rows()));
  const std::span<int32_t> out(codes.mutable_data(), static_cast<size_t>(rows.rows()));
  {
    const py::gil_scoped_release release;
    nearest_neighbour(rows, table, out, team);
  }
  return codes;
}

py::dict fit_codebook(const ArrayRef& x, int64_t count, const ArrayRef* weights, const std::string& start,
                      const ArrayRef* centroids, double threshold, int64_t max_sweeps, bool reseed_empty,
                      uint64_t seed, int64_t threads) {
  const MatrixView<const float> rows = vectors(x, "x");
  const KMeansOptions options =
      to_kmeans_options(start, centroids, threshold, max_sweeps, reseed_empty, seed, threads);
  const std::span<const float> weight_span =
      weights == nullptr ? std::span<const float>() : floats(*weights, "weights");
  if (weights != nullptr) require_count(weight_span, rows.rows());
  KMeansResult result;
  {
    const py::gil_scoped_release release;
    result = kmeans(rows, count, options, weight_span);
  }
  py::dict fields;
  fields["centroids"] = to_array(result.centroids).attr("reshape")(count, rows.cols());
  fields["codes"] = to_array(result.codes);
  fields["sweeps"] = result.sweeps;
  fields["changed"] = result.changed;
  fields["converged"] = result.converged;
  fields["squared_error"] = result.squared_error;
  return fields;
}

}  // namespace

KMeansOptions to_kmeans_options(const std::string& start, const ArrayRef* centroids, double threshold,
                                int64_t max_sweeps, bool reseed_empty, uint64_t seed, int64_t threads) {
  KMeansOptions options;
  options.start = codebook_start_from_name(start);
  if (centroids != nullptr) options.centroids = vectors(*centroids, "centroids");
  options.threshold = threshold;
  options.max_sweeps = max_sweeps;
  options.reseed_empty = reseed_empty;
  options.seed = seed;
  options.threads = to_int("threads", threads);
  return options;
}

void bind_fit(py::module_& module) {
  py::class_<SortedValues, std::shared_ptr<SortedValues>>(module, "SortedValues")
      .def(py::init(&sort_values), py::arg("values"), py::arg("weights").none(true), py::arg("threads"))
      .def_property_readonly("count", &SortedValues::count)
      .def_property_readonly("weighted", &SortedValues::weighted)
      // Copies: the object's memory must not change.
      .def_property_readonly("values",
                             [](const SortedValues& sample) {
                               return py::array_t<float>(static_cast<py::ssize_t>(sample.count()),
                                                         sample.values().data());
                             })
      .def_property_readonly("moments", [](const SortedValues& sample) {
        const Moments total = sample.total();
        return py::make_tuple(total.weight, total.first, total.second);
      });
  module.def("lloyd_max", &fit_table, py::arg("sample"), py::arg("count"), py::arg("start"),
             py::arg("centroids").none(true), py::arg("width"), py::arg("threshold"), py::arg("max_sweeps"),
             py::arg("seed"));
  module.def("table_errors", &errors_of_tables, py::arg("sample"), py::arg("tables"), py::arg("scales"),
             py::arg("threads"));
  module.def("table_counts", &counts_of_table, py::arg("sample"), py::arg("table"), py::arg("scale"));
  module.def("nearest_neighbour", &nearest, py::arg("x"), py::arg("centroids"), py::arg("threads"));
  module.def("kmeans", &fit_codebook, py::arg("x"), py::arg("count"), py::arg("weights").none(true),
             py::arg("start"), py::arg("centroids").none(true), py::arg("threshold"), py::arg("max_sweeps"),
             py::arg("reseed_empty"), py::arg("seed"), py::arg("threads"));
}

}  // namespace quantloom::python
