// A plain float32 search of trellis-coded rings, for tests: each minimum over all predecessors, each choice
// kept.
#pragma once

#include <cstdint>
#include <vector>

namespace quantloom::testing {

// The states [count, 256] of rings near targets [count, 256], by two passes: one with `side` steps to each
// side of the seam, then one around the ring. `table`: the weights of the 65536 states.
std::vector<uint16_t> reference_rings(const std::vector<float>& table, const std::vector<float>& targets,
                                      int bits, int side);

}  // namespace quantloom::testing
