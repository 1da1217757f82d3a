// The system calls that writing a file takes, replaceable so that tests can make any of them fail, and
// the two ways in which this library touches files: mapping one, and replacing one atomically.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace quantloom::io {

// Each function behaves as the POSIX call of its name: -1 and errno on failure.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual ssize_t write(int descriptor, const void* data, size_t count);
  virtual int fsync(int descriptor);
  virtual int close(int descriptor);
  virtual int rename(const char* from, const char* to);
  virtual int unlink(const char* path);
};

// Writes the chunks, one after the other, to a temporary file in the folder of `path`, syncs it, renames it
// to `path` and syncs the folder. Throws IoError naming the path and the reason; the previous file is then
// intact and the temporary file removed. Only if the very last step fails, the sync of the folder, is the new
// file already in place, complete; the message says so.
void replace_file(const std::string& path, std::span<const std::span<const std::byte>> chunks,
                  FileSystem& files);

struct MappedFile {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;  // unmaps
};

// Maps a regular file privately: writes to the memory never reach the file. Throws IoError.
MappedFile map_file(const std::string& path);

}  // namespace quantloom::io
