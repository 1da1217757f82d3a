#include <algorithm>
#include <bit>
#include <limits>
#include <string>

#include "common/device.hpp"
#include "common/device_pointer.hpp"
#include "formats/entropy.cuh"
#include "formats/entropy_sinks.cuh"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/entropy_cuda.hpp"

namespace quantloom {
namespace {

using cuda::EntropyView;

// Few warps in a block, so that a stream of few chunks still reaches every multiprocessor.
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerProcessor = 16;
constexpr int64_t kAlphabet = 256;
constexpr int64_t kWarpBytes = 2 * (cuda::kRingWords + entropy::kTailWords);
constexpr int64_t kSinkBytes = 256 * sizeof(float);
constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr int kNoChunk = std::numeric_limits<int>::max();

// Shared memory: the tables, the values of codes, then rings and tail words of each warp.
template <class Lanes, class Sink>
__global__ void __launch_bounds__(kThreads)
    decode_chunks(const EntropyView view, Sink sink, int64_t first_chunk, int64_t end_chunk) {
  extern __shared__ uint4 shared_quads[];
  for (int i = static_cast<int>(threadIdx.x); i < view.table_quads; i += kThreads) {
    shared_quads[i] = view.tables[i];
  }
  unsigned char* shared = reinterpret_cast<unsigned char*>(shared_quads);
  unsigned char* behind_tables = shared + 16 * view.table_quads;
  sink.prepare(reinterpret_cast<float*>(behind_tables));
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  auto* ring = reinterpret_cast<uint16_t*>(behind_tables + kSinkBytes + warp * kWarpBytes);
  __syncthreads();

  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t chunk = first_chunk + static_cast<int64_t>(blockIdx.x) * kWarps + warp; chunk < end_chunk;
       chunk += warps) {
    __syncwarp();
    cuda::decode_chunk<Lanes>(view, sink, chunk, shared, ring, lane);
  }
}

struct HostTables {
  std::vector<std::byte> bytes;
  int64_t slots_offset = 0;
};

template <class T>
void append(HostTables& tables, std::span<const T> values) {
  const auto raw = std::as_bytes(values);
  tables.bytes.insert(tables.bytes.end(), raw.begin(), raw.end());
  tables.bytes.resize(static_cast<size_t>(checked_pad(std::ssize(tables.bytes), 16)));
}

HostTables host_tables(const EntropyStream& stream) {
  HostTables result;
  const EntropyTables& tables = stream.tables();
  if (stream.coder() == EntropyCoder::huffman) {
    // Lengths are at most 16, codes below 256: both fit one word.
    const std::vector<uint16_t> narrow(tables.prefixes.begin(), tables.prefixes.end());
    append<uint16_t>(result, narrow);
  } else if (!tables.fused.empty()) {
    append<uint32_t>(result, tables.fused);
  } else {
    const std::vector<uint8_t> narrow(tables.slots.begin(), tables.slots.end());
    append<uint8_t>(result, narrow);
    result.slots_offset = std::ssize(result.bytes);
    append<uint32_t>(result, tables.parameters);
  }
  return result;
}

}  // namespace

struct CudaEntropyStream::State {
  EntropyView view;
  int64_t chunks = 0;
  int64_t bytes = 0;
  int64_t shared = 0;
  int device = 0;
  int processors = 0;
  bool huffman = false;
  bool fused = false;
  std::shared_ptr<std::byte> memory;

  void require_current() const {
    int current = 0;
    check_cuda(cudaGetDevice(&current), "current CUDA device");
    if (current != device) {
      throw InvalidArgument("CudaEntropyStream", text_of("the current CUDA device ", current),
                            text_of("device ", device, ", which holds the stream"));
    }
  }

  template <class Lanes, class Sink>
  void launch(const Sink& sink, int64_t first_chunk, int64_t end_chunk, void* cuda_stream) const {
    auto* const kernel = decode_chunks<Lanes, Sink>;
    if (shared > kSharedWithoutAsking) {
      check_cuda(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of decode_chunks");
    }
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kThreads);
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(
        ceil_div(end_chunk - first_chunk, kWarps), int64_t{processors} * kBlocksPerProcessor)));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(cuda_stream);
    check_cuda(cudaLaunchKernelEx(&config, kernel, view, sink, first_chunk, end_chunk),
               "launch of decode_chunks");
  }

  template <class Sink>
  void run(const Sink& sink, void* cuda_stream) const {
    const int64_t first_chunk = sink.first / view.chunk;
    const int64_t end_chunk = ceil_div(sink.last, view.chunk);
    if (huffman) {
      launch<cuda::HuffmanLanes>(sink, first_chunk, end_chunk, cuda_stream);
    } else if (fused) {
      launch<cuda::RansLanes<cuda::FusedTable>>(sink, first_chunk, end_chunk, cuda_stream);
    } else {
      launch<cuda::RansLanes<cuda::SlotTable>>(sink, first_chunk, end_chunk, cuda_stream);
    }
  }
};

CudaEntropyStream::CudaEntropyStream(const EntropyStream& stream, void* cuda_stream) {
  if (stream.alphabet() > kAlphabet) {
    throw Unsupported(text_of("CudaEntropyStream: an alphabet of ", stream.alphabet(),
                              " symbols, but kernels decode at most ", kAlphabet));
  }
  auto state = std::make_shared<State>();
  const HostTables tables = host_tables(stream);
  check_cuda(cudaGetDevice(&state->device), "current CUDA device");
  state->processors = device_attribute(cudaDevAttrMultiProcessorCount, state->device);
  state->shared = std::ssize(tables.bytes) + kSinkBytes + kWarps * kWarpBytes;
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, state->device);
  if (state->shared > most) {
    throw Unsupported(text_of("CudaEntropyStream: tables of ", state->shared, " bytes, but a block has ",
                              most, "; encode with fewer table_bits"));
  }
  state->chunks = stream.chunks();
  state->huffman = stream.coder() == EntropyCoder::huffman;
  state->fused = !stream.tables().fused.empty();

  // Tables, offsets, words, and the number of the bad chunk.
  const std::span<const std::byte> bytes = stream.bytes();
  const std::span<const std::byte> words = bytes.subspan(static_cast<size_t>(stream.payload_offset()));
  const int64_t ends_at = std::ssize(tables.bytes);
  const int64_t words_at = checked_pad(checked_add(ends_at, checked_mul(stream.chunks(), 4)), 16);
  const int64_t pairs = std::max<int64_t>(1, ceil_div(std::ssize(words), 4));
  const int64_t bad_at = checked_add(words_at, checked_mul(pairs, 4));
  state->bytes = checked_add(bad_at, 4);
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(state->bytes)),
             text_of("device memory, ", state->bytes, " bytes"));
  state->memory = {static_cast<std::byte*>(memory), [](std::byte* p) { static_cast<void>(cudaFree(p)); }};
  std::byte* const base = state->memory.get();
  const auto on = static_cast<cudaStream_t>(cuda_stream);
  const auto upload = [&](int64_t at, const void* from, int64_t size) {
    if (size == 0) return;
    check_cuda(cudaMemcpyAsync(base + at, from, static_cast<size_t>(size), cudaMemcpyHostToDevice, on),
               "copy of an entropy stream to the device");
  };
  check_cuda(cudaMemsetAsync(base + words_at, 0, static_cast<size_t>(pairs * 4), on),
             "fill of device memory");
  upload(0, tables.bytes.data(), std::ssize(tables.bytes));
  upload(ends_at, bytes.data() + stream.offsets_offset(), 4 * stream.chunks());
  upload(words_at, words.data(), std::ssize(words));
  upload(bad_at, &kNoChunk, 4);
  check_cuda(cudaStreamSynchronize(on), "copy of an entropy stream to the device");

  EntropyView& view = state->view;
  view.pairs = reinterpret_cast<const uint32_t*>(base + words_at);
  view.last_pair = pairs - 1;
  view.ends = reinterpret_cast<const uint32_t*>(base + ends_at);
  view.count = stream.count();
  view.chunk = stream.chunk();
  view.tables = reinterpret_cast<const uint4*>(base);
  view.table_quads = static_cast<int>(std::ssize(tables.bytes) / 16);
  view.slots_offset = static_cast<int>(tables.slots_offset);
  view.bits = stream.table_bits();
  if (stream.tables().escape >= 0) view.escape = static_cast<uint32_t>(stream.tables().escape);
  view.escape_bits = stream.tables().escape_bits;
  view.alphabet = static_cast<uint32_t>(stream.alphabet());
  view.bad_chunk = reinterpret_cast<int*>(base + bad_at);
  state_ = std::move(state);
}

int64_t CudaEntropyStream::count() const {
  return state_->view.count;
}
int64_t CudaEntropyStream::chunk() const {
  return state_->view.chunk;
}
int64_t CudaEntropyStream::byte_count() const {
  return state_->bytes;
}

void CudaEntropyStream::decode(int64_t first, int64_t count, uint8_t* codes, void* cuda_stream) const {
  if (first < 0 || count < 0 || first > state_->view.count || count > state_->view.count - first) {
    throw InvalidArgument("codes", text_of("codes ", first, " to ", first, " + ", count),
                          text_of("a range within ", state_->view.count, " codes"));
  }
  state_->require_current();
  if (count == 0) return;
  if (codes == nullptr)
    throw InvalidArgument("codes", "a null pointer", text_of("memory for ", count, " codes"));
  cuda::require_device_memory(codes, "codes");
  cuda::CodeSink sink;
  sink.out = codes;
  sink.first = first;
  sink.last = first + count;
  sink.vector = (reinterpret_cast<uintptr_t>(codes) - static_cast<uintptr_t>(first)) % 4 == 0;
  state_->run(sink, cuda_stream);
}

namespace {

template <class Out>
cuda::ValueSink<Out> make_sink(const EntropyValues& values, int64_t first_row, int64_t rows, void* out,
                               int64_t stride) {
  cuda::ValueSink<Out> sink;
  sink.out = static_cast<Out*>(out);
  sink.first = first_row * values.k;
  sink.last = sink.first + rows * values.k;
  sink.first_row = first_row;
  sink.stride = stride;
  sink.k = static_cast<uint32_t>(values.k);
  sink.table = values.table;
  sink.entries = static_cast<uint32_t>(std::min(values.entries, kAlphabet));
  sink.scales = values.scales;
  sink.scale_dtype = values.scale_dtype;
  sink.scales_per_row = ceil_div(values.k, values.columns_per_scale);
  // Blocks beyond the matrix are as good as blocks of its size.
  const int64_t columns = std::min(values.columns_per_scale, values.k);
  sink.rows_per_scale = static_cast<uint32_t>(std::min(values.rows_per_scale, values.n));
  sink.columns_per_scale = static_cast<uint32_t>(columns);
  if (std::has_single_bit(static_cast<uint64_t>(columns))) {
    sink.column_shift = std::countr_zero(static_cast<uint64_t>(columns));
  }
  sink.vector = values.k % 4 == 0 && columns % 4 == 0 && (rows == 1 || stride % 4 == 0) &&
                reinterpret_cast<uintptr_t>(out) % (4 * sizeof(Out)) == 0;
  return sink;
}

void require_positive(const char* argument, int64_t value) {
  if (value <= 0) throw InvalidArgument(argument, text_of(value), "at least 1");
}

}  // namespace

void CudaEntropyStream::decode_values(const EntropyValues& values, int64_t first_row, int64_t rows, void* out,
                                      DType out_dtype, int64_t stride, void* cuda_stream) const {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (values.n < 0 || values.k < 0 || values.n > kMost || values.k > kMost ||
      values.n * values.k != state_->view.count) {
    throw InvalidArgument("values", text_of("shape [", values.n, ", ", values.k, "]"),
                          text_of("a matrix of ", state_->view.count, " codes, sizes below 2^31"));
  }
  if (first_row < 0 || rows < 0 || first_row > values.n || rows > values.n - first_row) {
    throw InvalidArgument("rows", text_of("rows ", first_row, " to ", first_row, " + ", rows),
                          text_of("a range within ", values.n, " rows"));
  }
  if (!is_float16_or_32(out_dtype)) {
    throw TypeMismatch("out_dtype", name_of(out_dtype), "float32, float16 or bfloat16");
  }
  if (!is_float16_or_32(values.scale_dtype)) {
    throw TypeMismatch("values.scale_dtype", name_of(values.scale_dtype), "float32, float16 or bfloat16");
  }
  require_positive("values.rows_per_scale", values.rows_per_scale);
  require_positive("values.columns_per_scale", values.columns_per_scale);
  if (stride < values.k) throw InvalidArgument("stride", text_of(stride), text_of("at least k = ", values.k));
  checked_mul(checked_mul(rows, stride), size_of(out_dtype));
  if (values.entries < state_->view.alphabet) {
    throw InvalidArgument("values.entries", text_of(values.entries),
                          text_of("a value for each of ", state_->view.alphabet, " codes"));
  }
  state_->require_current();
  if (rows == 0 || values.k == 0) return;
  const std::pair<const void*, const char*> pointers[] = {
      {values.table, "values.table"}, {values.scales, "values.scales"}, {out, "out"}};
  for (const auto& [pointer, name] : pointers) {
    if (pointer == nullptr) throw InvalidArgument(name, "a null pointer", "device memory");
    cuda::require_device_memory(pointer, name);
  }
  if (reinterpret_cast<uintptr_t>(out) % static_cast<uintptr_t>(size_of(out_dtype)) != 0) {
    throw InvalidArgument("out", "an address that is not a multiple of the element size",
                          "an aligned address");
  }
  switch (out_dtype) {
    case DType::f16:
      return state_->run(make_sink<__half>(values, first_row, rows, out, stride), cuda_stream);
    case DType::bf16:
      return state_->run(make_sink<__nv_bfloat16>(values, first_row, rows, out, stride), cuda_stream);
    default:
      return state_->run(make_sink<float>(values, first_row, rows, out, stride), cuda_stream);
  }
}

void CudaEntropyStream::check(void* cuda_stream) const {
  state_->require_current();
  int bad = kNoChunk;
  const auto on = static_cast<cudaStream_t>(cuda_stream);
  check_cuda(cudaMemcpyAsync(&bad, state_->view.bad_chunk, sizeof(bad), cudaMemcpyDeviceToHost, on),
             "copy from the device");
  check_cuda(cudaStreamSynchronize(on), "work of the stream");
  if (bad != kNoChunk) {
    throw FileFormatError(text_of("entropy stream: chunk ", bad, " holds words that no encoder writes"));
  }
}

}  // namespace quantloom
