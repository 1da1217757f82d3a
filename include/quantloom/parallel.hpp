// Parallel loops over independent pieces of work. Results never depend on the number of threads:
// a caller cuts the work into pieces of a size that does not depend on it either.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>

namespace quantloom {

// The number of threads that `threads` asks for: itself if positive, OpenMP's default if 0. Throws
// InvalidArgument if negative. Never changes OpenMP's settings.
int resolve_threads(int threads);

// Calls body(i) for i in [0, count), in any order and concurrently. The exception of the lowest i that
// threw is rethrown after all pieces ended.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

}  // namespace quantloom
