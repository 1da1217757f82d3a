// write_safetensors() over a replaceable file system.
#pragma once

#include "io/file_system.hpp"
#include "quantloom/io/safetensors.hpp"

namespace quantloom::io {

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata, FileSystem& files);

}  // namespace quantloom::io
