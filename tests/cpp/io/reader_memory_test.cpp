// A hostile header must not make the reader take more than four times its size, and 16 MiB: measured by a
// child process that may not map more.
#include <sys/resource.h>
#include <sys/wait.h>

#include <functional>
#include <new>
#include <tuple>

#include "io/file_bytes.hpp"
#include "quantloom/io/packed_file.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define QUANTLOOM_HAS_SHADOW_MEMORY 1
#endif

namespace quantloom {
namespace {

int64_t mapped_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t pages = 0;
  statm >> pages;
  return pages * ::sysconf(_SC_PAGESIZE);
}

enum Outcome { kRead = 10, kRefused = 11, kOutOfMemory = 12, kOther = 13 };

// Opens the bytes in a child process with a limit of `allowance` bytes above what it has mapped.
Outcome open_within(const std::string& bytes, int64_t allowance) {
  const pid_t child = ::fork();
  if (child == 0) {
    const auto limit = static_cast<rlim_t>(mapped_bytes() + allowance);
    const rlimit limits{limit, limit};
    if (::setrlimit(RLIMIT_AS, &limits) != 0) ::_exit(kOther);
    try {
      PackedFileReader::parse(test::as_bytes(bytes), "hostile");
      ::_exit(kRead);
    } catch (const FileFormatError&) {
      ::_exit(kRefused);
    } catch (const std::bad_alloc&) {
      ::_exit(kOutOfMemory);
    } catch (...) {
      ::_exit(kOther);
    }
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << status;
  return static_cast<Outcome>(WEXITSTATUS(status));
}

std::string repeated(const std::string& begin, const std::function<std::string(int)>& item, int count,
                     const std::string& end) {
  std::string text = begin;
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ',';
    text += item(i);
  }
  return text + end;
}

std::string in_description(const std::string& description) {
  std::string escaped;
  for (const char c : description) {
    if (c == '"') escaped += '\\';
    escaped += c;
  }
  return "{\"__metadata__\":{\"quantloom\":\"" + escaped + "\"}}";
}

TEST(ReaderMemory, IsBoundedByTheHeader) {
#ifdef QUANTLOOM_HAS_SHADOW_MEMORY
  GTEST_SKIP() << "sanitizers map shadow memory";
#endif
  constexpr int kMany = 1 << 17;
  constexpr size_t kLong = 20 << 20;
  const auto tensor = [](int i) {
    return text_of("\"", i, "\":{\"dtype\":\"U8\",\"shape\":[0,1,1,1,1,1,1,1],\"data_offsets\":[0,0]}");
  };
  const auto entry = [](int i) { return text_of("\"", i, "\":\"\""); };
  const std::vector<std::tuple<std::string, std::string, Outcome>> cases = {
      {"as many tensors as allowed", repeated("{", tensor, kMany, "}"), kRead},
      {"one tensor more", repeated("{", tensor, kMany + 1, "}"), kRefused},
      {"as much metadata as allowed", repeated("{\"__metadata__\":{", entry, 1 << 16, "}}"), kRead},
      {"metadata without end", repeated("{\"__metadata__\":{", entry, 1 << 20, "}}"), kRefused},
      {"a long name", "{\"" + std::string(kLong, 'n') + "\":{}}", kRefused},
      {"a long metadata value", "{\"__metadata__\":{\"k\":\"" + std::string(kLong, 'v') + "\"}}", kRead},
      {"a long number", "{\"t\":{\"shape\":[" + std::string(kLong, '1') + "]}}", kRefused},
      {"deep arrays", "{\"t\":" + std::string(kLong, '['), kRefused},
      {"a long shape",
       repeated(
           "{\"t\":{\"shape\":[", [](int) { return "1"; }, 1 << 20, "]}}"),
       kRefused},
      {"deep description", in_description("{\"version\":1,\"x\":" + std::string(kLong, '[')), kRefused},
      {"many checksums",
       in_description(repeated(
           "{\"version\":1,\"checksums\":{",
           [](int i) { return text_of("\"", i, "\":\"0000000000000000\""); }, 1 << 18, "}}")),
       kRefused},
      {"many format values",
       in_description(repeated(
           "{\"version\":1,\"packed\":{\"a\":{\"format\":{\"x\":[", [](int) { return "0"; }, 1 << 20,
           "]}}}}")),
       kRefused},
  };
  for (const auto& [name, header, expected] : cases) {
    const std::string bytes = test::file_bytes(header);
    EXPECT_EQ(open_within(bytes, 4 * std::ssize(header) + (16 << 20)), expected) << name;
  }
}

}  // namespace
}  // namespace quantloom
