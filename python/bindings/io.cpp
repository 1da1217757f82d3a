#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/io/aqlm.hpp"
#include "quantloom/io/awq.hpp"
#include "quantloom/io/compressed_tensors.hpp"
#include "quantloom/io/exl3.hpp"
#include "quantloom/io/gptq.hpp"
#include "quantloom/io/packed_file.hpp"

namespace quantloom::python {
namespace {

using Arrays = std::map<std::string, ArrayRef>;
using PackedPointer = std::shared_ptr<PackedTensor>;

void save(const std::string& path, const std::map<std::string, PackedPointer>& packed, const Arrays& plain,
          std::map<std::string, std::string> metadata) {
  PackedFile file;
  for (const auto& [name, tensor] : packed) file.packed.emplace(name, *tensor);
  file.plain = to_tensors(plain, "tensor");
  file.metadata = std::move(metadata);
  const py::gil_scoped_release release;
  save_packed(path, file);
}

py::tuple load(const std::string& path) {
  PackedFile file;
  {
    const py::gil_scoped_release release;
    file = load_packed(path);
  }
  py::dict packed;
  for (auto& [name, tensor] : file.packed) {
    packed[py::str(name)] = std::make_shared<PackedTensor>(std::move(tensor));
  }
  return py::make_tuple(packed, to_numpy(file.plain, false), file.metadata);
}

template <class Settings>
PackedPointer import_layout(PackedTensor (*read)(const std::map<std::string, Tensor>&, const Settings&),
                            const Arrays& arrays, const Settings& settings) {
  const auto tensors = to_tensors(arrays, "tensor");
  const py::gil_scoped_release release;
  return std::make_shared<PackedTensor>(read(tensors, settings));
}

GptqVersion to_version(int64_t version) {
  if (version != 1 && version != 2) throw InvalidArgument("version", text_of(version), "1 or 2");
  return version == 1 ? GptqVersion::v1 : GptqVersion::v2;
}

}  // namespace

void bind_io(py::module_& module) {
  module.def("save_packed", &save);
  module.def("load_packed", &load);
  module.def("write_file_atomically", [](const std::string& path, const py::bytes& bytes) {
    const auto view = static_cast<std::string_view>(bytes);
    const py::gil_scoped_release release;
    write_file_atomically(path, std::as_bytes(std::span(view.data(), view.size())));
  });
  module.def("to_gptq", [](const PackedTensor& packed, int64_t version) {
    std::map<std::string, Tensor> tensors;
    {
      const py::gil_scoped_release release;
      tensors = to_gptq(packed, to_version(version));
    }
    return to_numpy(tensors, false);  // planes may be shared with it
  });
  module.def("from_gptq", [](const Arrays& arrays, int64_t bits, int64_t group_size, bool symmetric,
                             int64_t version) {
    return import_layout(&from_gptq, arrays,
                         GptqSettings{to_int("bits", bits), group_size, symmetric, to_version(version)});
  });
  module.def("to_awq", [](const PackedTensor& packed) {
    std::map<std::string, Tensor> tensors;
    {
      const py::gil_scoped_release release;
      tensors = to_awq(packed);
    }
    return to_numpy(tensors, false);
  });
  module.def("from_awq", [](const Arrays& arrays, int64_t group_size) {
    const auto tensors = to_tensors(arrays, "tensor");
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(from_awq(tensors, group_size));
  });
  module.def("aqlm_refusal", [](const std::string& json, int64_t n, int64_t k) {
    return aqlm_refusal(*format_from_json(json), n, k);
  });
  module.def("to_aqlm", [](const PackedTensor& packed) {
    std::map<std::string, Tensor> tensors;
    {
      const py::gil_scoped_release release;
      tensors = to_aqlm(packed);
    }
    return to_numpy(tensors, false);  // the tables are shared with it
  });
  module.def("from_aqlm", [](const Arrays& arrays) {
    const auto tensors = to_tensors(arrays, "tensor");
    const py::gil_scoped_release release;
    return std::make_shared<PackedTensor>(from_aqlm(tensors));
  });
  module.def("to_compressed_tensors", [](const PackedTensor& packed) {
    std::map<std::string, Tensor> tensors;
    {
      const py::gil_scoped_release release;
      tensors = to_compressed_tensors(packed);
    }
    return to_numpy(tensors, false);  // planes may be shared with it
  });
  module.def("from_compressed_tensors",
             [](const Arrays& arrays, int64_t bits, int64_t group_size, bool symmetric) {
               return import_layout(&from_compressed_tensors, arrays,
                                    CompressedTensorsSettings{to_int("bits", bits), group_size, symmetric});
             });
  module.def("exl3_refusal", [](const std::string& json) { return exl3_refusal(*format_from_json(json)); });
  module.def("to_exl3", [](const PackedTensor& packed) {
    std::map<std::string, Tensor> tensors;
    {
      const py::gil_scoped_release release;
      tensors = to_exl3(packed);
    }
    return to_numpy(tensors, false);  // planes are shared with it
  });
  module.def("from_exl3", [](const Arrays& arrays, int64_t n, int64_t k) {
    return import_layout(&from_exl3, arrays, Exl3Settings{n, k});
  });
}

}  // namespace quantloom::python
