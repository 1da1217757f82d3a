// The choices that the launches of cuda/transforms/hadamard_dense_stream.cuh make for whole rows of float16:
// how many warps share the columns of a block, and how many blocks are copied ahead. Beside each, the speed
// of a copy of the same tensor in the same run.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "transforms/hadamard_dense_stream_launch.cuh"

namespace quantloom {
namespace {

constexpr int kReplays = 15;
constexpr int64_t kRows = 16384;

class Choices {
 public:
  Choices(const bench::Stream& stream, nlohmann::json& report) : stream_(stream), report_(report) {}

  // All that a size has.
  template <int kHalves, int kPower, int... kGroups>
  void measure(int64_t order, std::integer_sequence<int, kGroups...> /*groups*/) {
    const int64_t n = order << kPower;
    const int64_t bytes = kRows * n * 2;
    const int copies = bench::copies_past_cache(2 * bytes);
    std::vector<std::shared_ptr<std::byte>> from;
    std::vector<std::shared_ptr<std::byte>> to;
    for (int i = 0; i < copies; ++i) {
      from.push_back(bench::device_memory(bytes));
      to.push_back(bench::device_memory(bytes));
      bench::fill_values(from.back().get(), DType::f16, kRows * n, -1, 1, 0, static_cast<uint64_t>(i),
                         stream_.get());
    }
    const bench::Timing copy = bench::time_launches(stream_, copies, kReplays, [&](int i) {
      const auto at = static_cast<size_t>(i % copies);
      check_cuda(cudaMemcpyAsync(to[at].get(), from[at].get(), static_cast<size_t>(bytes),
                                 cudaMemcpyDeviceToDevice, stream_.get()),
                 "copy");
    });
    const DeviceFacts device = current_device();
    const auto one = [&]<int kChosen>(std::integral_constant<int, kChosen> /*groups*/, int stages) {
      using S = cuda::DenseStream<__half, kHalves, kPower, kChosen>;
      if (S::bytes(static_cast<int>(order), stages) > device.shared_memory) return;
      const bench::Timing timing = bench::time_launches(stream_, copies, kReplays, [&](int i) {
        const auto at = static_cast<size_t>(i % copies);
        cuda::HadamardArguments a;
        a.x = from[at].get();
        a.out = to[at].get();
        a.x_stride = a.out_stride = n;
        a.units = kRows;
        a.factor = static_cast<float>(1 / std::sqrt(static_cast<double>(n)));
        a.vectors = true;
        cuda::launch_dense_stream_kernel<__half, kHalves, kPower, kChosen>(order, a, device, stream_.get(),
                                                                           stages);
      });
      const double percent = 100 * copy.seconds / timing.seconds;
      std::printf(
          "%6lld = %3lld * 2^%-2d  %d groups, %d warps, %d ahead %9.2f us: %5.1f%% of a copy%s\n",
          static_cast<long long>(n), static_cast<long long>(order), kPower, S::kGroups, S::kThreads / 32,
          stages, timing.seconds * 1e6, percent,
          S::kGroups == cuda::DenseStream<__half, kHalves, kPower>::kGroups ? " (default groups)" : "");
      std::fflush(stdout);
      report_.push_back({{"n", n},
                         {"groups", S::kGroups},
                         {"stages", stages},
                         {"seconds", timing.seconds},
                         {"copy_seconds", copy.seconds},
                         {"percent_of_copy", percent}});
    };
    for (const int stages : {1, 2}) (one(std::integral_constant<int, kGroups>(), stages), ...);
  }

 private:
  const bench::Stream& stream_;
  nlohmann::json& report_;
};

nlohmann::json run(bool /*quick*/) {
  nlohmann::json report = {{"rows", nlohmann::json::array()}};
  const bench::Stream stream;
  Choices choices(stream, report["rows"]);
  using One = std::integer_sequence<int, 1>;
  using Two = std::integer_sequence<int, 1, 2>;
  using Four = std::integer_sequence<int, 1, 2, 4>;
  choices.measure<4, 7>(28, Two());
  choices.measure<3, 8>(20, Two());
  choices.measure<4, 8>(28, Two());
  choices.measure<3, 9>(20, Two());
  choices.measure<4, 9>(28, Two());
  choices.measure<2, 10>(12, One());
  choices.measure<4, 10>(28, std::integer_sequence<int, 2>());
  choices.measure<8, 8>(36, Four());
  choices.measure<22, 6>(172, Four());
  choices.measure<14, 7>(108, Four());
  choices.measure<22, 7>(148, Four());
  choices.measure<14, 8>(108, Two());
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_hadamard_choices", argc, argv, quantloom::run);
}
