#include "quantloom/parallel.hpp"

#include <algorithm>
#include <mutex>

#include "quantloom/error.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace quantloom {

int resolve_threads(int threads) {
  if (threads < 0) throw InvalidArgument("threads", text_of(threads), "0 (the default) or more");
#ifdef _OPENMP
  return threads > 0 ? threads : omp_get_max_threads();
#else
  return 1;
#endif
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  const int team = static_cast<int>(std::min<int64_t>(resolve_threads(threads), count));
  if (team <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::exception_ptr error;
  int64_t error_index = count;
  std::mutex error_mutex;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
      const std::scoped_lock lock(error_mutex);
      if (i < error_index) {
        error_index = i;
        error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace quantloom
