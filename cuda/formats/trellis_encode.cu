// Rings of trellis codes on the device: the passes of an encoding.
#include <algorithm>
#include <vector>

#include "common/device.hpp"
#include "common/device_buffer.hpp"
#include "common/device_pointer.hpp"
#include "formats/trellis_checks.hpp"
#include "formats/trellis_passes.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/trellis_cuda.hpp"

namespace quantloom {
namespace {

using cuda::first_pass;
using cuda::kRingPositions;
using cuda::SearchTask;
using cuda::second_pass;
using cuda::TracebackResult;

constexpr int64_t kRingsPerProcessor = 16;  // in a batch: then the ways back are short beside the searches
constexpr int64_t kAlignment = 256;
constexpr int64_t kRingBytes = 2 * sizeof(uint16_t) + sizeof(int32_t);  // edges and list, of a ring

// Bytes of the workspace for each group of rings.
int64_t group_bytes(const TrellisShape& shape, TrellisSearch search) {
  const SearchTask first = first_pass(shape, search);
  const int64_t words = std::max(first.history_words(), second_pass(shape).history_words());
  return words * static_cast<int64_t>(sizeof(uint32_t)) + kRingBytes * first.group();
}

// Alignment of the history, the counter of open rings, and alignment of the arrays of rings.
constexpr int64_t kFixedBytes = 3 * kAlignment;

// Where the parts of a workspace begin, for `rings` rings at once.
struct Parts {
  uint32_t* history;
  int32_t* open_size;
  int32_t* open;
  uint16_t* ends;
  uint16_t* pins;
};

Parts divide(void* workspace, int64_t history_bytes, int64_t rings) {
  const auto begin = reinterpret_cast<uintptr_t>(workspace);
  auto* at = static_cast<std::byte*>(workspace) + (kAlignment - begin % kAlignment) % kAlignment;
  Parts parts{};
  parts.history = reinterpret_cast<uint32_t*>(at);
  at += history_bytes;
  parts.open_size = reinterpret_cast<int32_t*>(at);
  at += kAlignment;
  parts.open = reinterpret_cast<int32_t*>(at);
  parts.ends = reinterpret_cast<uint16_t*>(parts.open + rings);
  parts.pins = parts.ends + rings;
  return parts;
}

// Encodes rings that fit the workspace.
void encode_batch(const CudaTrellisCodebook& codebook, const CudaRings& rings, TrellisSearch search,
                  void* workspace, const DeviceFacts& device, cudaStream_t stream) {
  SearchTask first = first_pass(rings.shape, search);
  SearchTask second = second_pass(rings.shape);
  const int64_t words = std::max(first.history_words(), second.history_words());
  const int64_t groups = ceil_div(rings.count, first.group());
  const Parts parts = divide(workspace, words * 4 * groups, groups * first.group());
  for (SearchTask* task : {&first, &second}) {
    task->targets = rings.targets;
    task->table = codebook.weights();
    task->count = static_cast<int>(rings.count);
    task->history = parts.history;
    cuda::plan_search(*task, device.processors, device.shared_memory);
    // Measured: with 4 bits every step is copied, which is faster by the threads that have the costs.
    task->bulk = task->plain() && (task->bits() == 2 || task->bits() == 3) && device.code >= 90;
  }
  first.ends = parts.ends;
  second.pins = parts.pins;

  TracebackResult result;
  result.words = rings.words;
  result.errors = rings.squared_errors;
  result.states = rings.states;
  TracebackResult of_first = result;
  if (search == TrellisSearch::best) {
    check_cuda(cudaMemsetAsync(parts.open_size, 0, sizeof(int32_t), stream), "fill of the workspace");
    of_first.open = parts.open;
    of_first.open_size = parts.open_size;
    of_first.open_pins = parts.pins;
    second.list = parts.open;
    second.list_size = parts.open_size;
  } else {
    of_first = {};
    of_first.seams = parts.pins;
  }
  cuda::search_rings(first, device.processors, stream);
  cuda::trace_back(first, of_first, stream);
  cuda::search_rings(second, device.processors, stream);
  cuda::trace_back(second, result, stream);
}

}  // namespace

struct CudaTrellisCodebook::State {
  cuda::DeviceBuffer<uint16_t> weights;
  int weights_per_step = 1;
  int device = 0;
};

CudaTrellisCodebook::CudaTrellisCodebook(const TrellisCodebook& codebook, void* stream) {
  if (codebook.window != 16) {
    throw InvalidArgument("codebook", text_of("a window of ", codebook.window), "16");
  }
  const std::vector<float> values = codebook.values();
  std::vector<uint16_t> halves;
  halves.reserve(values.size());
  for (const float value : values) halves.push_back(f16_from_float(value));
  auto state = std::make_shared<State>();
  check_cuda(cudaGetDevice(&state->device), "current CUDA device");
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<int64_t>(halves.size());
  state->weights_per_step = codebook.weights_per_step;
  state->weights = cuda::DeviceBuffer<uint16_t>(count, queue);
  state->weights.upload(halves.data(), count);
  check_cuda(cudaStreamSynchronize(queue), "work of the stream");
  state_ = std::move(state);
}

const uint16_t* CudaTrellisCodebook::weights() const {
  return state_->weights.data();
}

int CudaTrellisCodebook::weights_per_step() const {
  return state_->weights_per_step;
}

int CudaTrellisCodebook::device() const {
  return state_->device;
}

TrellisWorkspace trellis_workspace_cuda(const TrellisShape& shape, TrellisSearch search, int64_t count) {
  cuda::require_ring_shape(shape);
  cuda::require_ring_count(count);
  const int64_t at_once = std::min(count, current_device().processors * kRingsPerProcessor);
  const int64_t each = group_bytes(shape, search);
  TrellisWorkspace result;
  result.least_bytes = count == 0 ? 0 : each + kFixedBytes;
  result.fast_bytes = count == 0 ? 0 : ceil_div(at_once, second_pass(shape).group()) * each + kFixedBytes;
  return result;
}

void encode_rings_cuda(const CudaTrellisCodebook& codebook, const CudaRings& rings, TrellisSearch search,
                       void* workspace, int64_t workspace_bytes, void* stream) {
  cuda::require_ring_shape(rings.shape);
  cuda::require_ring_count(rings.count);
  cuda::require_codebook(codebook, rings.shape);
  if (rings.count == 0) return;
  cuda::require_device_memory(rings.targets, "targets");
  cuda::require_device_memory(rings.words, "words");
  if (rings.squared_errors != nullptr) cuda::require_device_memory(rings.squared_errors, "squared_errors");
  if (rings.states != nullptr) cuda::require_device_memory(rings.states, "states");
  const int64_t each = group_bytes(rings.shape, search);
  if (workspace_bytes < each + kFixedBytes) {
    throw InvalidArgument("workspace", text_of(workspace_bytes, " bytes"),
                          text_of("at least ", each + kFixedBytes));
  }
  cuda::require_device_memory(workspace, "workspace");
  if (reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    throw InvalidArgument("workspace", "an address that is not a multiple of 16", "an aligned address");
  }

  const DeviceFacts device = current_device();
  const int64_t shared = std::max(cuda::search_memory(first_pass(rings.shape, search)),
                                  cuda::search_memory(second_pass(rings.shape)));
  if (shared > device.shared_memory) {
    throw Unsupported(text_of("encode_rings_cuda: the search needs ", shared,
                              " bytes of shared memory, the device has ", device.shared_memory));
  }
  int64_t groups = (workspace_bytes - kFixedBytes) / each;
  // Full rounds over the processors, where there is more than one.
  if (groups > device.processors) groups -= groups % device.processors;
  const int64_t batch = groups * second_pass(rings.shape).group();
  for (int64_t begin = 0; begin < rings.count; begin += batch) {
    CudaRings part = rings;
    part.count = std::min(batch, rings.count - begin);
    part.targets += begin * kRingPositions;
    part.words += begin * rings.shape.words();
    if (part.squared_errors != nullptr) part.squared_errors += begin;
    if (part.states != nullptr) part.states += begin * rings.shape.steps();
    encode_batch(codebook, part, search, workspace, device, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace quantloom
