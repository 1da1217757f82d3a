// The streaming read floor: the bandwidth at which each thread reads its own linear stream, to be measured in
// the same rounds as a kernel whose share of it is reported.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace quantloom::bench {

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class ReadProbe {
 public:
  // Reads in bursts of `burst` bytes, split evenly over `threads` linear streams, that rotate over `bytes` of
  // memory: on huge pages where the system grants them, as prepared weights are.
  ReadProbe(int64_t bytes, int64_t burst, int threads)
      : threads_(threads), words_(burst / 8 / threads / 64 * 64), bursts_(bytes / (words_ * 8 * threads)) {
    const int64_t page = int64_t{2} << 20;
    const auto size = static_cast<size_t>((bursts_ * burst_bytes() + page - 1) / page * page);
    data_.reset(static_cast<uint64_t*>(std::aligned_alloc(static_cast<size_t>(page), size)));
#ifdef __linux__
    (void)madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
    std::memset(data_.get(), 1, size);
  }

  int64_t burst_bytes() const {
    return words_ * 8 * threads_;
  }

  // Reads the next burst; returns bytes per second.
  double read() {
    const uint64_t* from = data_.get() + next_++ % bursts_ * words_ * threads_;
    const double start = seconds_now();
#pragma omp parallel for num_threads(threads_) schedule(static, 1) if (threads_ > 1)
    for (int t = 0; t < threads_; ++t) sink_ += sum_of(from + t * words_, words_);
    return static_cast<double>(burst_bytes()) / (seconds_now() - start);
  }

 private:
  struct Free {
    void operator()(uint64_t* p) const { std::free(p); }
  };

#if defined(__GNUC__) && defined(__x86_64__)
  __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
  static uint64_t
  sum_of(const uint64_t* p, int64_t count) {
    uint64_t sum[64] = {};
    for (int64_t i = 0; i + 64 <= count; i += 64) {
      for (int j = 0; j < 64; ++j) sum[j] ^= p[i + j];
    }
    uint64_t all = 0;
    for (const uint64_t part : sum) all ^= part;
    return all;
  }

  void read_stream(int t) {
    sink_ += sum_of(data_.get() + t * words_, words_);
  }

  int threads_;
  int64_t words_;  // of one stream in one burst
  int64_t bursts_;
  int64_t next_ = 0;
  std::unique_ptr<uint64_t, Free> data_;
  std::atomic<uint64_t> sink_ = 0;  // keeps the reads alive
};

}  // namespace quantloom::bench
