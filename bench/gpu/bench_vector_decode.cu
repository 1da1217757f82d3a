// Rows decoded from additive codes and codebooks of vectors.
#include "gpu/decode_times.cuh"

namespace quantloom {
namespace {

nlohmann::json run(bool quick) {
  nlohmann::json report = bench::decode_report("vectors");
  const bench::Stream stream;
  for (const char* spec : {"additive:2x8:g8", "additive:1x8:g8", "additive:4x8:g8", "additive:1x8:g4",
                           "additive:1x16:g8", "additive:1x16:g16", "vector_codebook:256x4:g128"}) {
    report["rows"].push_back(bench::measure_decode(stream, spec, 12288, 49152, DType::f16));
    report["rows"].push_back(bench::measure_decode(stream, spec, 4096, 4096, DType::f16));
    if (quick) continue;
    report["rows"].push_back(bench::measure_decode(stream, spec, 14336, 4096, DType::f16));
    report["rows"].push_back(bench::measure_decode(stream, spec, 4096, 14336, DType::f32));
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_vector_decode", argc, argv, quantloom::run);
}
