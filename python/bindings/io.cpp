#include <pybind11/stl.h>

#include "arrays.hpp"
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

}  // namespace

void bind_io(py::module_& module) {
  module.def("save_packed", &save);
  module.def("load_packed", &load);
  module.def("write_file_atomically", [](const std::string& path, const py::bytes& bytes) {
    const auto view = static_cast<std::string_view>(bytes);
    const py::gil_scoped_release release;
    write_file_atomically(path, std::as_bytes(std::span(view.data(), view.size())));
  });
}

}  // namespace quantloom::python
