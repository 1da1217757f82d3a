// Rings of trellises. quantloom/trellis.py checks arguments and documents.
#include "quantloom/formats/trellis.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/random.hpp"

namespace quantloom::python {
namespace {

TrellisShape to_shape(const TrellisCodebook& codebook, int64_t half_bits, int64_t length) {
  return {codebook.window, to_int("half_bits", half_bits), codebook.weights_per_step,
          to_int("length", length)};
}

TrellisCodebook to_codebook(const std::string& name, int64_t window) {
  return trellis_codebook(name, to_int("window", window));
}

}  // namespace

void bind_trellis(py::module_& module) {
  module.def("trellis_codebook_names", &trellis_codebook_names);
  module.def("trellis_codebook", [](const std::string& name, int64_t window) {
    const TrellisCodebook codebook = to_codebook(name, window);
    const std::vector<float> values = codebook.values();
    return py::make_tuple(
        codebook.name, codebook.rms(),
        py::array_t<float>({static_cast<py::ssize_t>(values.size()) / codebook.weights_per_step,
                            static_cast<py::ssize_t>(codebook.weights_per_step)},
                           values.data()));
  });
  module.def("trellis_words", [](const std::string& name, int64_t window, int64_t half_bits, int64_t length) {
    const TrellisShape shape = to_shape(to_codebook(name, window), half_bits, length);
    return py::make_tuple(shape.steps(), shape.words());
  });
  module.def("trellis_encode", [](const std::string& name, int64_t window, int64_t half_bits,
                                  const ArrayRef& targets, const ArrayRef& states, const std::string& search,
                                  int64_t threads) {
    const auto from = targets.matrix<const float>("targets", DType::f32);
    const auto to = states.matrix<uint32_t>("states", DType::u32);
    const TrellisEncodeOptions options{trellis_search_from_name(search), to_int("threads", threads)};
    const py::gil_scoped_release release;
    const TrellisCodebook codebook = to_codebook(name, window);
    encode_rings(codebook, to_shape(codebook, half_bits, from.cols()), from, to, options);
  });
  module.def("trellis_decode", [](const std::string& name, int64_t window, int64_t half_bits,
                                  const ArrayRef& states, const ArrayRef& weights, int64_t threads) {
    const auto from = states.matrix<const uint32_t>("states", DType::u32);
    const auto to = weights.matrix<float>("weights", DType::f32);
    const int team = to_int("threads", threads);
    const py::gil_scoped_release release;
    const TrellisCodebook codebook = to_codebook(name, window);
    decode_rings(codebook, to_shape(codebook, half_bits, to.cols()), from, to, team);
  });
  module.def("trellis_pack", [](const std::string& name, int64_t window, int64_t half_bits, int64_t length,
                                const ArrayRef& states, const ArrayRef& words) {
    const auto from = states.matrix<const uint32_t>("states", DType::u32);
    const auto to = words.matrix<uint32_t>("words", DType::u32);
    pack_rings(to_shape(to_codebook(name, window), half_bits, length), from, to);
  });
  module.def("trellis_unpack", [](const std::string& name, int64_t window, int64_t half_bits, int64_t length,
                                  const ArrayRef& words, const ArrayRef& states) {
    const auto from = words.matrix<const uint32_t>("words", DType::u32);
    const auto to = states.matrix<uint32_t>("states", DType::u32);
    unpack_rings(to_shape(to_codebook(name, window), half_bits, length), from, to);
  });
  module.def(
      "trellis_distortion", [](const std::string& name, int64_t window, int64_t half_bits, double ratio,
                               int64_t rings, uint64_t seed, const std::string& search, int64_t threads) {
        const TrellisEncodeOptions options{trellis_search_from_name(search), to_int("threads", threads)};
        const py::gil_scoped_release release;
        return trellis_distortion(to_codebook(name, window), to_int("half_bits", half_bits), ratio, rings,
                                  seed, options);
      });
  // The numbers that trellis_distortion() codes, as float32 before they are scaled.
  module.def("trellis_source", [](uint64_t seed, const ArrayRef& numbers) {
    const auto to = numbers.matrix<float>("numbers", DType::f32);
    const py::gil_scoped_release release;
    const CounterRandom random(seed);
    for (int64_t r = 0; r < to.rows(); ++r) {
      for (int64_t c = 0; c < to.cols(); ++c) {
        to(r, c) = static_cast<float>(random.normal(static_cast<uint64_t>(r * to.cols() + c)));
      }
    }
  });
  module.def("trellis_best_ratio", [](int64_t half_bits, const std::string& codebook) {
    return trellis_best_ratio(to_int("half_bits", half_bits), trellis_codebook(codebook).code);
  });
  module.def("trellis_json", [](double bits, const std::string& codebook, int64_t rotation, int64_t window) {
    return Trellis(bits, codebook, rotation, to_int("window", window)).to_json();
  });
}

}  // namespace quantloom::python
