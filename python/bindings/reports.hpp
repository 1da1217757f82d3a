// What roundings on every device tell Python.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <tuple>

#include "quantloom/rounding/channel_scales.hpp"
#include "quantloom/rounding/rounding.hpp"

namespace quantloom::python {

namespace py = pybind11;

// steps, smallest, norm, output_error
using Search = std::optional<std::tuple<int64_t, double, double, bool>>;

// percent, bits, threshold
using Budget = std::optional<std::tuple<std::optional<double>, std::optional<double>, std::optional<double>>>;

std::optional<ScaleSearch> to_search(const Search& search);
std::optional<OutlierSearch> to_outlier_search(const Budget& budget);
py::dict to_python(const RoundingReport& report);
// codes, exponent, loss, losses
py::dict to_python(const ChannelScales& found);

}  // namespace quantloom::python
