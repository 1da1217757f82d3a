// Failing system calls while a file is written: the old file stays, no temporary file stays, the message
// names the path and the reason.
#include "io/file_system.hpp"

#include <fcntl.h>

#include <cerrno>
#include <system_error>

#include "io/file_bytes.hpp"
#include "io/packed_file.hpp"
#include "io/random_packed.hpp"
#include "io/safetensors_writer.hpp"

namespace quantloom {
namespace {

using test::as_bytes;
using test::TemporaryFolder;

// Fails call number `failing` (from 0; none if negative) with `error`.
class FaultyFileSystem : public io::FileSystem {
 public:
  FaultyFileSystem(int failing, int error) : failing_(failing), error_(error) {}

  int open(const char* path, int flags, mode_t mode) override {
    if (fails("open")) return -1;
    return FileSystem::open(path, flags, mode);
  }
  ssize_t write(int descriptor, const void* data, size_t count) override {
    if (fails("write")) return -1;
    return FileSystem::write(descriptor, data, largest_write > 0 ? std::min(count, largest_write) : count);
  }
  int fsync(int descriptor) override {
    if (fails("fsync")) return -1;
    return FileSystem::fsync(descriptor);
  }
  int close(int descriptor) override {
    const bool failed = fails("close");
    const int result = FileSystem::close(descriptor);  // the descriptor is gone also after a failure
    if (failed) errno = error_;
    return failed ? -1 : result;
  }
  int rename(const char* from, const char* to) override {
    if (fails("rename")) return -1;
    renamed = true;
    return FileSystem::rename(from, to);
  }
  int unlink(const char* path) override {
    if (unlink_fails) {
      errno = EACCES;
      return -1;
    }
    return FileSystem::unlink(path);
  }

  size_t largest_write = 0;
  bool unlink_fails = false;
  bool renamed = false;
  std::string failed_call;

 private:
  bool fails(const char* call) {
    if (calls_++ != failing_) return false;
    failed_call = call;
    errno = error_;
    return true;
  }

  int failing_;
  int error_;
  int calls_ = 0;
};

int open_descriptors() {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    count += entry.exists() ? 1 : 0;
  return count;
}

// Runs `save` with the N-th call failing, for every N until none fails any more.
void test_every_failure(const std::function<void(const std::string& path, io::FileSystem& files)>& save,
                        int error) {
  const TemporaryFolder folder;
  const std::string path = folder.file("target");
  io::FileSystem system;
  save(folder.file("wanted"), system);
  const std::string wanted = test::read_file(folder.file("wanted"));
  std::filesystem::remove(folder.file("wanted"));
  const int descriptors = open_descriptors();
  int failures = 0;
  for (int failing = 0;; ++failing) {
    ASSERT_LT(failing, 1000);
    test::write_file(path, "old");
    FaultyFileSystem files(failing, error);
    std::string message;
    try {
      save(path, files);
    } catch (const IoError& caught) {
      message = caught.what();
      ++failures;
    }
    SCOPED_TRACE(text_of("call ", failing, ", ", files.failed_call, ": ", message));
    const std::string content = test::read_file(path);
    if (message.empty()) {
      EXPECT_EQ(content, wanted);
    } else {
      EXPECT_NE(message.find(path), std::string::npos);
      EXPECT_NE(message.find(std::generic_category().message(error)), std::string::npos);
      EXPECT_EQ(content, files.renamed ? wanted : "old");
      EXPECT_EQ(files.renamed, message.find("in place") != std::string::npos);
    }
    EXPECT_EQ(folder.entry_count(), 1);
    EXPECT_EQ(open_descriptors(), descriptors);
    if (files.failed_call.empty()) break;
  }
  EXPECT_GE(failures, error == EINTR ? 1 : 5);  // a rename that is interrupted is a failure
}

TEST(FileSystem, EveryFailureOfEveryCallSafetensors) {
  const std::map<std::string, Tensor> tensors = {{"a", test::random_tensor(DType::f32, {100}, 1)},
                                                 {"b", test::random_tensor(DType::u8, {7}, 2)}};
  for (const int error : {EIO, ENOSPC, EACCES, EINTR, EDQUOT}) {
    test_every_failure(
        [&](const std::string& path, io::FileSystem& files) {
          io::write_safetensors(path, tensors, {{"k", "v"}}, files);
        },
        error);
  }
}

TEST(FileSystem, EveryFailureOfEveryCallPackedFile) {
  PackedFile file;
  file.packed["w"] = test::random_uniform(std::make_shared<const Uniform>(4, 8), 8, 64, 1);
  for (const int error : {EIO, ENOSPC, EINTR}) {
    test_every_failure(
        [&](const std::string& path, io::FileSystem& files) { io::save_packed(path, file, files); }, error);
  }
}

TEST(FileSystem, ShortWritesAreContinued) {
  const TemporaryFolder folder;
  const std::string text(1000, 'x');
  const std::array chunks{as_bytes(text), as_bytes(text)};
  for (const size_t largest : {1, 7, 999, 1000}) {
    FaultyFileSystem files(-1, 0);
    files.largest_write = largest;
    io::replace_file(folder.file("f"), chunks, files);
    EXPECT_EQ(test::read_file(folder.file("f")), text + text);
  }
}

TEST(FileSystem, SaysWhichTemporaryFileItCouldNotRemove) {
  const TemporaryFolder folder;
  FaultyFileSystem files(1, EIO);
  files.unlink_fails = true;
  const std::array chunks{as_bytes("x")};
  const std::string message =
      test::message_of<IoError>([&] { io::replace_file(folder.file("f"), chunks, files); });
  EXPECT_NE(message.find(".tmp is left"), std::string::npos) << message;
}

TEST(FileSystem, TemporaryNamesInUseAreSkipped) {
  const TemporaryFolder folder;
  for (int i = 0; i < 3; ++i) {
    test::write_file(folder.file(text_of(".quantloom-", ::getpid(), "-", i, ".tmp")), "someone else's");
  }
  write_file_atomically(folder.file("f"), as_bytes("x"));
  EXPECT_EQ(folder.entry_count(), 4);
  EXPECT_EQ(test::read_file(folder.file(text_of(".quantloom-", ::getpid(), "-1.tmp"))), "someone else's");
}

}  // namespace
}  // namespace quantloom
