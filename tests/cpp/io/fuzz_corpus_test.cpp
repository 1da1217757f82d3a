// The corpus of the fuzzers, run in the normal build.
#include "fuzz/targets.hpp"
#include "io/file_bytes.hpp"

namespace quantloom {
namespace {

void replay(const std::string& target, void (*run)(std::span<const std::byte>)) {
  int count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(QUANTLOOM_TESTS_DIR "/fuzz/corpus/" + target)) {
    SCOPED_TRACE(entry.path());
    const std::string input = test::read_file(entry.path());
    // A copy of just that size, so that a sanitizer sees any read behind it.
    const std::vector<std::byte> bytes(test::as_bytes(input).begin(), test::as_bytes(input).end());
    run(bytes);
    ++count;
  }
  EXPECT_GE(count, 10);
}

TEST(FuzzCorpus, Safetensors) {
  replay("safetensors", fuzz::safetensors);
}
TEST(FuzzCorpus, PackedFile) {
  replay("packed_file", fuzz::packed_file);
}
TEST(FuzzCorpus, Formats) {
  replay("formats", fuzz::formats);
}
TEST(FuzzCorpus, Layouts) {
  replay("layouts", fuzz::layouts);
}
TEST(FuzzCorpus, Entropy) {
  replay("entropy", fuzz::entropy);
}

}  // namespace
}  // namespace quantloom
