#include "io/file_system.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <system_error>
#include <utility>

#include "quantloom/error.hpp"

namespace quantloom::io {
namespace {

constexpr size_t kLargestWrite = size_t{1} << 30;
constexpr int kTemporaryNames = 1000;

std::string reason(int error) {
  return std::generic_category().message(error);
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// A file under a temporary name, removed again unless it was renamed.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& path, FileSystem& files) : files_(files), path_(path) {
    // Short and independent of the length of the file's own name.
    const std::string stem = folder_of(path) + "/.quantloom-" + std::to_string(::getpid()) + "-";
    for (int attempt = 0; attempt < kTemporaryNames && descriptor_ < 0; ++attempt) {
      name_ = stem + std::to_string(attempt) + ".tmp";
      do {
        descriptor_ = files_.open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      } while (descriptor_ < 0 && errno == EINTR);
      if (descriptor_ < 0 && errno != EEXIST) break;
    }
    if (descriptor_ < 0) fail("create a temporary file in its folder", errno);
    exists_ = true;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { remove(); }

  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = files_.write(descriptor_, bytes.data(), std::min(bytes.size(), kLargestWrite));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("write", errno);
      if (written == 0) fail("write", ENOSPC);
      bytes = bytes.subspan(static_cast<size_t>(written));
    }
  }

  void commit() {
    while (files_.fsync(descriptor_) < 0) {
      if (errno != EINTR) fail("sync", errno);
    }
    const int descriptor = std::exchange(descriptor_, -1);
    // After EINTR the descriptor is closed on Linux, and the data was synced before.
    if (files_.close(descriptor) < 0 && errno != EINTR) fail("close", errno);
    if (files_.rename(name_.c_str(), path_.c_str()) < 0) fail("rename the temporary file to it", errno);
    exists_ = false;
  }

 private:
  [[noreturn]] void fail(std::string_view what, int error) {
    remove();
    throw IoError(
        text_of(path_, ": cannot ", what, ": ", reason(error), exists_ ? "; " + name_ + " is left" : ""));
  }

  void remove() {
    if (descriptor_ >= 0) files_.close(std::exchange(descriptor_, -1));
    if (exists_ && files_.unlink(name_.c_str()) == 0) exists_ = false;
  }

  FileSystem& files_;
  std::string path_;
  std::string name_;
  int descriptor_ = -1;
  bool exists_ = false;
};

void sync_folder(const std::string& path, FileSystem& files) {
  const auto fail = [&](int error) {
    throw IoError(text_of(
        path, ": the file is written and in place, but its folder cannot be synced: ", reason(error)));
  };
  const int descriptor = files.open(folder_of(path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (descriptor < 0) fail(errno);
  int result = 0;
  do {
    result = files.fsync(descriptor);
  } while (result < 0 && errno == EINTR);
  const int error = errno;
  files.close(descriptor);
  if (result < 0) fail(error);
}

}  // namespace

int FileSystem::open(const char* path, int flags, mode_t mode) {
  return ::open(path, flags, mode);
}
ssize_t FileSystem::write(int descriptor, const void* data, size_t count) {
  return ::write(descriptor, data, count);
}
int FileSystem::fsync(int descriptor) {
  return ::fsync(descriptor);
}
int FileSystem::close(int descriptor) {
  return ::close(descriptor);
}
int FileSystem::rename(const char* from, const char* to) {
  return ::rename(from, to);
}
int FileSystem::unlink(const char* path) {
  return ::unlink(path);
}

void replace_file(const std::string& path, std::span<const std::span<const std::byte>> chunks,
                  FileSystem& files) {
  TemporaryFile file(path, files);
  for (const std::span<const std::byte> chunk : chunks) file.write(chunk);
  file.commit();
  sync_folder(path, files);
}

MappedFile map_file(const std::string& path) {
  const auto fail = [&](std::string_view what, std::string_view why) {
    throw IoError(text_of(path, ": cannot ", what, ": ", why));
  };
  // Without O_NONBLOCK a FIFO would block until somebody writes to it.
  int descriptor = -1;
  do {
    descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor < 0 && errno == EINTR);
  if (descriptor < 0) fail("open", reason(errno));
  struct stat status {};
  std::optional<int> error;
  if (::fstat(descriptor, &status) < 0) error = errno;
  if (error || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    fail("read", error ? reason(*error) : "not a regular file");
  }
  const auto size = static_cast<size_t>(status.st_size);
  if (size == 0) {
    ::close(descriptor);
    return {};
  }
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor, 0);
  const int map_error = errno;
  ::close(descriptor);
  if (memory == MAP_FAILED) fail("map", reason(map_error));
  return {
      {static_cast<const std::byte*>(memory), size},
      std::shared_ptr<const void>(memory, [size](const void* p) { ::munmap(const_cast<void*>(p), size); })};
}

}  // namespace quantloom::io
