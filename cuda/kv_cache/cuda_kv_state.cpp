#include "kv_cache/cuda_kv_state.hpp"

#include <algorithm>
#include <functional>

#include "common/device_buffer.hpp"
#include "kv_cache/kv_checks.hpp"
#include "kv_cache/kv_codes.hpp"
#include "kv_cache/kv_rows.hpp"
#include "kv_cache/page_table.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom::kv_cache {

SequenceRows::SequenceRows(int64_t count, int64_t pages, cudaStream_t stream)
    : memory_(checked_mul(count, checked_add(checked_mul(pages, sizeof(std::byte*)),
                                             2 * sizeof(int64_t) + sizeof(uint32_t)))),
      count_(count),
      pages_(pages) {
  if (memory_.bytes() == 0) return;
  check_cuda(cudaMemsetAsync(memory_.data(), 0, static_cast<size_t>(memory_.bytes()), stream),
             "fill of device memory");
}

}  // namespace quantloom::kv_cache

namespace quantloom {

using kv_cache::DeviceMemory;

namespace {

constexpr int64_t kFewestPages = 16;  // of a row of the table
// Keys of this many tokens of each sequence change their basis in memory that is there.
constexpr int64_t kFewTokens = 8;

std::shared_ptr<const KVTables> required(const KVFormat& format, const KVLayout& layout, const KVShape& shape,
                                         int64_t capacity, std::shared_ptr<const KVTables> tables) {
  kv_cache::require_cache(format, layout, shape, capacity, tables.get());
  if (checked_mul(shape.sequences, shape.kv_heads) > INT32_MAX) {
    throw InvalidArgument("sequences", text_of(shape.sequences), "fewer than 2^31 with their KV heads");
  }
  if (checked_add(format.first, format.window) > INT32_MAX) {
    throw InvalidArgument("window", text_of(format.window), "fewer than 2^31 exact tokens");
  }
  return tables;
}

void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
             "copy on the device");
}

}  // namespace

CudaKVCache::State::State(KVFormat format, KVShape shape, int64_t capacity,
                          std::shared_ptr<const KVTables> tables, cudaStream_t stream)
    : format(format),
      shape(shape),
      layout(kv_layout(format, shape.head_dim)),
      tables(required(format, layout, shape, capacity, std::move(tables))),
      pages(format, layout, shape.sequences),
      table_memory(format, layout, this->tables.get()) {
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  faults = DeviceMemory(sizeof(kv_cache::KVFaults));
  check_cuda(cudaMemsetAsync(faults.data(), 0xff, sizeof(kv_cache::KVFaults), stream),
             "fill of device memory");
  make_exact(shape.sequences, stream);
  make_rows(shape.sequences, std::max(pages.pages_of(capacity), kFewestPages), stream);
  if (format.hadamard || (this->tables != nullptr && this->tables->rotation != nullptr)) {
    changed_keys = DeviceMemory(checked_mul(checked_mul(shape.sequences * shape.kv_heads, kFewTokens),
                                            shape.head_dim * size_of(shape.dtype)));
  }
  add_slab(checked_mul(shape.sequences, pages.pages_of(capacity)));
  // From here on any stream may use the memory.
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

void CudaKVCache::State::require_device() const {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "current CUDA device");
  if (current != device) {
    throw InvalidArgument("device", text_of("the current CUDA device ", current),
                          text_of(device, ", where this cache was made"));
  }
}

void CudaKVCache::State::require_no_faults() {
  if (raised.load() == 0) return;
  check_cuda(cudaDeviceSynchronize(), "work of the device");
  kv_cache::KVFaults found{};
  check_cuda(cudaMemcpy(&found, faults.data(), sizeof found, cudaMemcpyDeviceToHost), "copy from the device");
  check_cuda(cudaMemset(faults.data(), 0xff, sizeof found), "fill of device memory");
  check_cuda(cudaDeviceSynchronize(), "work of the device");
  raised.store(0);
  if (found.value == kv_cache::kNoFault) {
    throw InvalidArgument("append",
                          text_of("a replay of a captured graph for sequence ", found.room, " without room"),
                          "reserve() for its tokens, after whatever took pages or moved them");
  }
  const auto pair = static_cast<int64_t>(found.value >> 33);
  const auto token = static_cast<int64_t>(found.value >> 1 & 0xffffffffU);
  throw NumericError(text_of((found.value & 1) != 0 ? "values" : "keys",
                             ": got some that are not finite or too large for sequence ",
                             pair / shape.kv_heads, ", head ", pair % shape.kv_heads, ", token ", token,
                             " of the sequence, expected finite values up to ", kv_cache::kLargestValue));
}

void CudaKVCache::State::require_sequence(int64_t sequence) const {
  if (sequence >= 0 && sequence < shape.sequences) return;
  throw InvalidArgument("sequence", text_of(sequence), text_of("0 to ", shape.sequences - 1));
}

void CudaKVCache::State::require_room(std::span<const int64_t> lengths) const {
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (lengths[s] <= room[s]) continue;
    throw InvalidArgument("append", text_of("token ", lengths[s] - 1, " of sequence ", s, " in a capture"),
                          text_of("tokens below ", room[s], "; reserve() makes room"));
  }
}

void CudaKVCache::State::require_ready() {
  require_device();
  require_no_faults();
  if (!stale) return;
  check_cuda(cudaDeviceSynchronize(), "work of the device");
  require_no_faults();
  std::vector<int64_t> now(static_cast<size_t>(shape.sequences));
  check_cuda(cudaMemcpy(now.data(), rows.lengths(), now.size() * sizeof(int64_t), cudaMemcpyDeviceToHost),
             "copy from the device");
  for (int64_t s = 0; s < shape.sequences; ++s) pages.set_length(s, now[static_cast<size_t>(s)]);
}

kv_cache::KVView CudaKVCache::State::view() const {
  kv_cache::KVView view;
  view.layout = layout;
  view.dtype = shape.dtype;
  view.sequences = static_cast<int>(shape.sequences);
  view.kv_heads = static_cast<int>(shape.kv_heads);
  view.first = static_cast<int>(format.first);
  view.window = static_cast<int>(format.window);
  view.table_pages = rows.pages();
  view.pages = rows.table();
  view.lengths = rows.lengths();
  view.exact_keys = exact[0].data();
  view.exact_values = exact[1].data();
  table_memory.describe(view);
  return view;
}

std::vector<kv_cache::KVSpan> CudaKVCache::State::spans(int64_t tokens,
                                                        std::span<const int64_t> starts) const {
  std::vector<kv_cache::KVSpan> spans;
  const int64_t run = starts.empty() ? shape.sequences : kv_cache::kSequencesPerLaunch;
  for (int64_t s = 0; s < shape.sequences; s += run) {
    kv_cache::KVSpan span;
    span.tokens = tokens;
    span.sequence = static_cast<int>(s);
    span.sequences = static_cast<int>(std::min(run, shape.sequences - s));
    span.started = !starts.empty();
    for (int64_t i = 0; i < span.sequences && span.started; ++i) {
      span.starts[i] = starts[static_cast<size_t>(s + i)];
    }
    spans.push_back(span);
  }
  return spans;
}

void CudaKVCache::State::own_pages(std::span<const int64_t> wanted, cudaStream_t stream) {
  // The usual case, whose time depends on nothing but how many sequences there are.
  if (std::equal(wanted.begin(), wanted.end(), room.begin(), std::less_equal<>())) return;
  int64_t most = 0;
  for (const int64_t length : wanted) {
    if (length > INT32_MAX) throw InvalidArgument("tokens", text_of(length), "fewer than 2^31 of a sequence");
    most = std::max(most, pages.pages_of(length));
  }
  if (most > rows.pages()) make_rows(rows.count(), std::max(most, 2 * rows.pages()), stream);
  add_slab(pages.missing_pages(wanted));
  std::vector<kv_cache::KVEntry> entries;
  for (const KVPages::Change& change : pages.own(wanted)) {
    entries.push_back({rows.table() + change.sequence * rows.pages() + change.page, page_data(change.to),
                       change.from < 0 ? nullptr : page_data(change.from)});
  }
  kv_cache::launch_entries(entries, page_bytes(), stream);
  update_room(stream);
}

void CudaKVCache::State::update_room(cudaStream_t stream) {
  const int64_t positions = table_memory.rotated() ? tables->rotation->positions() : INT32_MAX;
  std::vector<kv_cache::KVNumber> numbers;
  for (int64_t s = 0; s < rows.count(); ++s) {
    int64_t& known = room[static_cast<size_t>(s)];
    // A graph may know sequences that are no more.
    const int64_t now = s < shape.sequences ? std::min(pages.room(s), positions) : -1;
    if (now != known) numbers.push_back({rows.rooms() + s, now});
    known = now;
  }
  kv_cache::launch_numbers(numbers, stream);
}

void CudaKVCache::State::make_rows(int64_t sequences, int64_t table_pages, cudaStream_t stream) {
  kv_cache::SequenceRows made(sequences, table_pages, stream);
  if (rows.count() > 0) {
    check_cuda(cudaMemcpy2DAsync(made.table(), static_cast<size_t>(made.pages()) * sizeof(std::byte*),
                                 rows.table(), static_cast<size_t>(rows.pages()) * sizeof(std::byte*),
                                 static_cast<size_t>(rows.pages()) * sizeof(std::byte*),
                                 static_cast<size_t>(rows.count()), cudaMemcpyDeviceToDevice, stream),
               "copy of the table of pages");
    copy(made.lengths(), rows.lengths(), rows.count() * static_cast<int64_t>(sizeof(int64_t)), stream);
    // Graphs that know the memory before find no room in it.
    check_cuda(
        cudaMemsetAsync(rows.rooms(), 0xff, static_cast<size_t>(rows.count()) * sizeof(int64_t), stream),
        "fill of device memory");
    check_cuda(cudaStreamSynchronize(stream), "work of the stream");
    retire(rows.take());
    stale = false;
  }
  rows = std::move(made);
  room.assign(static_cast<size_t>(rows.count()), 0);
  update_room(stream);
}

void CudaKVCache::State::make_exact(int64_t sequences, cudaStream_t stream) {
  for (DeviceMemory& memory : exact) {
    DeviceMemory made(checked_mul(sequences, exact_bytes()));
    if (made.bytes() > 0) {
      check_cuda(cudaMemsetAsync(made.data(), 0, static_cast<size_t>(made.bytes()), stream),
                 "fill of device memory");
    }
    copy(made.data(), memory.data(), memory.bytes(), stream);
    check_cuda(cudaStreamSynchronize(stream), "work of the stream");
    retire(std::move(memory));
    memory = std::move(made);
  }
}

void CudaKVCache::State::reorder(std::span<const int64_t> sources, cudaStream_t stream) {
  const int64_t count = std::ssize(sources);
  if (checked_mul(count, shape.kv_heads) > INT32_MAX) {
    throw InvalidArgument("sources", text_of(count), "fewer than 2^31 with their KV heads");
  }
  if (count > rows.count()) {
    make_exact(count, stream);
    make_rows(count, rows.pages(), stream);
  }
  const auto gather = [&](void* memory, int64_t row_bytes) {
    const int64_t bytes = checked_mul(shape.sequences, row_bytes);
    const cuda::DeviceBuffer<std::byte> before(bytes, stream);
    copy(before.data(), memory, bytes, stream);
    kv_cache::launch_gather(before.data(), static_cast<std::byte*>(memory), row_bytes, sources, stream);
  };
  for (const DeviceMemory& memory : exact) gather(memory.data(), exact_bytes());
  gather(rows.table(), rows.pages() * static_cast<int64_t>(sizeof(std::byte*)));
  gather(rows.lengths(), sizeof(int64_t));
  // Where attention counts depends on how many sequences there are.
  if (count != shape.sequences && workspace.bytes() > 0) {
    check_cuda(cudaMemsetAsync(workspace.data(), 0, static_cast<size_t>(workspace.bytes()), stream),
               "fill of device memory");
  }
  pages.reorder(sources);
  shape.sequences = count;
  update_room(stream);
}

void CudaKVCache::State::copy_tokens(const State& from, cudaStream_t stream) {
  for (const DeviceMemory& slab : from.slabs) {
    slabs.emplace_back(slab.bytes());
    copy(slabs.back().data(), slab.data(), slab.bytes(), stream);
  }
  pages = from.pages;
  make_rows(shape.sequences, from.rows.pages(), stream);
  copy(rows.lengths(), from.rows.lengths(), shape.sequences * static_cast<int64_t>(sizeof(int64_t)), stream);
  std::vector<kv_cache::KVEntry> entries;
  for (int64_t s = 0; s < shape.sequences; ++s) {
    for (int64_t page = 0; page < pages.page_count(s); ++page) {
      std::byte* at = page_data(pages.page(s, page));
      entries.push_back({rows.table() + s * rows.pages() + page, at, at});
    }
  }
  kv_cache::launch_entries(entries, page_bytes(), stream);
  for (size_t side = 0; side < exact.size(); ++side) {
    copy(exact[side].data(), from.exact[side].data(), shape.sequences * exact_bytes(), stream);
  }
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

void CudaKVCache::State::add_slab(int64_t count) {
  if (count == 0) return;
  DeviceMemory slab(checked_add(checked_mul(count, page_bytes()), kv_cache::kRecordPadding));
  slabs.reserve(slabs.size() + 1);
  pages.add_slab(count);
  slabs.push_back(std::move(slab));
}

std::byte* CudaKVCache::State::page_data(int32_t page) const {
  const KVPages::Place place = pages.place(page);
  return slabs[static_cast<size_t>(place.slab)].data() + place.index * page_bytes();
}

std::byte* CudaKVCache::State::grown(DeviceMemory& memory, int64_t bytes, bool capturing,
                                     const char* argument) {
  if (bytes <= memory.bytes()) return memory.data();
  if (capturing) {
    throw InvalidArgument(argument, "a larger shape than in any call before the stream was captured",
                          "one call with it before the capture, which cannot take memory");
  }
  DeviceMemory made(bytes);
  check_cuda(cudaMemset(made.data(), 0, static_cast<size_t>(bytes)), "fill of device memory");
  check_cuda(cudaDeviceSynchronize(), "work of the device");
  retire(std::move(memory));
  memory = std::move(made);
  return memory.data();
}

void CudaKVCache::State::retire(DeviceMemory memory) {
  if (captured) retired.push_back(std::move(memory));
}

int64_t CudaKVCache::State::reserved_bytes() const {
  int64_t bytes = table_memory.bytes() + rows.bytes() + changed_keys.bytes() + changed_queries.bytes() +
                  workspace.bytes() + faults.bytes();
  for (const DeviceMemory& slab : slabs) bytes += slab.bytes();
  for (const DeviceMemory& memory : exact) bytes += memory.bytes();
  for (const DeviceMemory& memory : retired) bytes += memory.bytes();
  return bytes;
}

int64_t CudaKVCache::State::exact_bytes() const {
  return checked_mul(checked_mul(shape.kv_heads, format.first + format.window),
                     shape.head_dim * size_of(shape.dtype));
}

}  // namespace quantloom
