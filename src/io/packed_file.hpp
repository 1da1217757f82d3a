// save_packed() over a replaceable file system.
#pragma once

#include "io/file_system.hpp"
#include "quantloom/io/packed_file.hpp"

namespace quantloom::io {

void save_packed(const std::string& path, const PackedFile& file, FileSystem& files);

}  // namespace quantloom::io
