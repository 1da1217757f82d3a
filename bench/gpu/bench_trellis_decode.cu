// Rows decoded from trellises.
#include "gpu/decode_times.cuh"

namespace quantloom {
namespace {

nlohmann::json run(bool quick) {
  nlohmann::json report = bench::decode_report("trellises");
  const bench::Stream stream;
  for (const char* spec :
       {"trellis:2:mul1", "trellis:3:mul1", "trellis:4:mul1", "trellis:4:3inst", "trellis:4:octagon",
        "trellis:4:mul1:plain", "trellis:8:mul1", "trellis:2.5:mul1", "trellis:4:1mad", "trellis:2:hyb",
        "trellis:2:rptc", "trellis:2:mul1:l20", "trellis:2.5:mul1:plain"}) {
    report["rows"].push_back(bench::measure_decode(stream, spec, 28672, 8192, DType::f16));
    if (quick) continue;
    report["rows"].push_back(bench::measure_decode(stream, spec, 4096, 4096, DType::f16));
    report["rows"].push_back(bench::measure_decode(stream, spec, 28672, 8192, DType::f32));
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_trellis_decode", argc, argv, quantloom::run);
}
