#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "additive/code_sweep.hpp"
#include "additive/code_walk.cuh"
#include "additive/every_element.cuh"
#include "additive/split_products.hpp"
#include "common/math_handles.hpp"
#include "fit/centroid_sums.hpp"
#include "rounding/additive_problem.hpp"

namespace quantloom::cuda {
namespace {

constexpr int64_t kPanelColumns = 512;

// Codes [count][blocks][books] in the order of the search, from or to those of the matrix.
template <bool kBack>
__global__ void __launch_bounds__(kThreads)
    order_codes_kernel(uint16_t* matrix, uint16_t* ordered, const int32_t* rows, const int32_t* order,
                       int64_t count, int64_t blocks, int64_t books) {
  for (int64_t at = first_thread(); at < count * blocks * books; at += thread_count()) {
    const int64_t row = at / (blocks * books);
    const int64_t from =
        ((rows == nullptr ? row : rows[row]) * blocks + order[at / books % blocks]) * books + at % books;
    if constexpr (kBack) {
      matrix[from] = ordered[at];
    } else {
      ordered[at] = matrix[from];
    }
  }
}

// errors [beam][count][out_group][columns] of the start, the same for all hypotheses.
template <class Real>
__global__ void __launch_bounds__(kThreads) start_errors_kernel(WalkTask<Real> task) {
  const int dim = task.out_group * task.in_group;
  const int64_t size = task.count * task.out_group * task.columns;
  for (int64_t at = first_thread(); at < size; at += thread_count()) {
    const int64_t column = at % task.columns;
    const int64_t a = at / task.columns % task.out_group;
    const int64_t row = at / task.columns / task.out_group;
    const int64_t group = task.rows == nullptr ? row : task.rows[row];
    const int64_t block = column / task.in_group;
    const int64_t natural = task.block_order[block];
    Real sum = 0;
    for (int book = 0; book < task.codebooks; ++book) {
      const int64_t code = task.start[(row * task.blocks + block) * task.codebooks + book];
      sum += task.tables[(book * task.entries + code) * dim + a * task.in_group + column % task.in_group];
    }
    const Real factor = task.scales[group * task.scale_count + natural * task.in_group / task.scale_columns];
    const auto wanted = static_cast<Real>(task.weights[(group * task.out_group + a) * task.columns +
                                                       natural * task.in_group + column % task.in_group]);
    for (int b = 0; b < task.beam; ++b) store_error(task, b * size + at, wanted - factor * sum);
  }
}

// What hypotheses have before the run, from those that they come from: of rows of `length` values the first
// `width`. A block for each row of [beam][count][rows].
template <class T>
__global__ void __launch_bounds__(kThreads)
    inherit_kernel(const T* from, T* to, const int32_t* origins, int64_t count, int rows, int64_t length,
                   int64_t width) {
  const int64_t row = blockIdx.x;
  const int64_t state = row / rows;
  const T* const own = from + ((origins[state] * count + state % count) * rows + row % rows) * length;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) to[row * length + i] = own[i];
}

// elements [codebooks][dim][padded] and halves [codebooks][padded][words] of tables.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    lay_tables_kernel(const float* tables, int64_t books, int64_t entries, int64_t dim, int64_t padded,
                      Real* elements, __half* halves, int64_t half_dim) {
  for (int64_t at = first_thread(); at < books * padded * half_dim; at += thread_count()) {
    const int64_t i = at % half_dim;
    const int64_t entry = at / half_dim % padded;
    const int64_t book = at / half_dim / padded;
    const float value = i < dim && entry < entries ? tables[(book * entries + entry) * dim + i] : 0.0F;
    if (i < dim) elements[(book * dim + i) * padded + entry] = static_cast<Real>(value);
    halves[at] = __float2half_rn(value);
  }
}

template <class T>
DeviceBuffer<T> uploaded(const std::vector<T>& values, cudaStream_t stream) {
  DeviceBuffer<T> buffer(static_cast<int64_t>(values.size()), stream);
  buffer.upload(values.data(), static_cast<int64_t>(values.size()));
  return buffer;
}

template <class Real>
void sweep(const AdditiveProblem& problem, AdditiveArrays& arrays, const CodeSearchOptions& options,
           std::span<const int64_t> row_groups) {
  const Additive& format = problem.format;
  const cudaStream_t stream = problem.stream;
  const int64_t books = format.codebooks;
  const int64_t entries = format.entries();
  const int64_t dim = format.dim();
  const int64_t padded = checked_pad(entries, kEntryTile);
  const int64_t half_dim = dim <= 8 ? 8 : 16;
  constexpr bool kSplit = std::is_same_v<Real, float>;

  WalkTask<Real> task{};
  task.beam = options.beam;
  task.live = 1;
  task.count = row_groups.empty() ? problem.row_groups : std::ssize(row_groups);
  task.out_group = static_cast<int>(format.out_group);
  task.in_group = static_cast<int>(format.in_group);
  task.codebooks = format.codebooks;
  task.entries = entries;
  task.padded = padded;
  task.blocks = problem.blocks;
  task.columns = problem.columns;
  task.scale_count = problem.scale_count;
  task.scale_columns = problem.scale_columns;
  task.weights = problem.weights();
  const int64_t rows = checked_mul(task.beam * task.out_group, task.count);
  if (std::max(rows, problem.columns) > std::numeric_limits<int>::max()) {
    throw InvalidArgument("w", text_of(problem.n, " rows"), "fewer than 2^31 of all hypotheses");
  }

  const VisitOrder order = visit_order(problem.blocks, format.codebooks, options.shuffled, options.seed);
  const DeviceBuffer<int32_t> block_order = uploaded(order.blocks, stream);
  const DeviceBuffer<int32_t> table_order = uploaded(order.tables, stream);
  const std::vector<int32_t> selected(row_groups.begin(), row_groups.end());
  const DeviceBuffer<int32_t> selection = uploaded(selected, stream);
  task.block_order = block_order.data();
  task.table_order = table_order.data();
  task.rows = selected.empty() ? nullptr : selection.data();

  const DeviceBuffer<Real> h(checked_mul(problem.columns, problem.columns), stream);
  problem.hessian(block_order.data(), h.data());
  task.h = h.data();
  const DeviceBuffer<float> h_parts(kSplit ? 2 * h.count() : 0, stream);
  if constexpr (kSplit) split(h.data(), h_parts.data(), h_parts.data() + h.count(), h.count(), stream);
  const DeviceBuffer<Real> tables(arrays.tables.count(), stream);
  convert(arrays.tables.data(), tables.data(), arrays.tables.count(), 1.0, stream);
  const DeviceBuffer<Real> scales(arrays.scales.count(), stream);
  convert(arrays.scales.data(), scales.data(), arrays.scales.count(), 1 / problem.weight_unit(), stream);
  const DeviceBuffer<Real> elements(checked_mul(books * dim, padded), stream);
  const DeviceBuffer<__half> halves(checked_mul(books * half_dim, padded), stream);
  lay_tables_kernel<<<blocks_for(books * padded * half_dim), kThreads, 0, stream>>>(
      arrays.tables.data(), books, entries, dim, padded, elements.data(), halves.data(), half_dim);
  check_cuda(cudaGetLastError(), "launch of lay_tables");
  task.tables = tables.data();
  task.scales = scales.data();
  task.elements = elements.data();
  task.halves = reinterpret_cast<const uint32_t*>(halves.data());
  std::vector<Real> penalties;
  if (!options.code_penalties.empty()) {
    penalties.assign(static_cast<size_t>(books * padded), Real{0});
    for (int64_t i = 0; i < books * entries; ++i) {
      penalties[static_cast<size_t>(i / entries * padded + i % entries)] = static_cast<Real>(
          static_cast<double>(options.code_penalties[static_cast<size_t>(i)]) / problem.loss_unit());
    }
  }
  const DeviceBuffer<Real> penalty_buffer = uploaded(penalties, stream);
  task.penalties = penalties.empty() ? nullptr : penalty_buffer.data();
  // Largest magnitude of the tables, for the units of scores by tiles.
  const Scoring scoring = scoring_of(task);
  const float reach = scoring == Scoring::tiles
                          ? checked_largest({arrays.tables.data(), DType::f32, books * entries, dim, dim},
                                            "codebook", true, stream)
                          : 0.0F;

  const int64_t run_blocks = widest_run(task);
  const int64_t width = run_blocks * task.in_group;
  // Runs whose products with the errors are brought up to date at once, where errors have one hypothesis:
  // wide products make better use of the device.
  const int64_t panel_runs = kSplit && task.beam == 1 ? std::max<int64_t>(kPanelColumns / width, 1) : 1;
  const int64_t panel_blocks = panel_runs * run_blocks;
  const int64_t code_count = checked_mul(task.count, problem.blocks * books);
  const int sides = task.beam > 1 ? 2 : 1;
  const int64_t error_count = checked_mul(rows, problem.columns);
  // Of each side, and of float32 of each part.
  const DeviceBuffer<Real> errors(checked_mul((kSplit ? 2 : 1) * sides, error_count), stream);
  const auto set_errors = [&](int side) {
    task.errors = errors.data() + side * error_count;
    task.errors_low = kSplit ? task.errors + sides * error_count : nullptr;
  };
  const DeviceBuffer<uint16_t> codes(checked_mul(sides * task.beam, code_count), stream);
  const DeviceBuffer<uint16_t> start(code_count, stream);
  const DeviceBuffer<Real> products(checked_mul(rows, panel_runs * width), stream);
  const DeviceBuffer<Real> error_changes(panel_runs > 1 ? checked_mul(rows, width) : 0, stream);
  task.error_changes = panel_runs > 1 ? error_changes.data() : nullptr;
  const DeviceBuffer<Real> norms(checked_mul(run_blocks * books, padded), stream);
  const DeviceBuffer<Real> units(run_blocks, stream);
  DeviceBuffer<double> losses(task.beam * task.count, stream);
  const DeviceBuffer<int32_t> origins(task.beam * task.count, stream);
  losses.fill_bytes(0);
  task.start = start.data();
  task.norms = norms.data();
  task.units = units.data();
  task.losses = losses.data();
  task.origins = origins.data();
  order_codes_kernel<false><<<blocks_for(code_count), kThreads, 0, stream>>>(
      arrays.codes.data(), start.data(), task.rows, task.block_order, task.count, problem.blocks, books);
  check_cuda(cudaGetLastError(), "launch of order_codes");
  for (int side = 0; side < sides; ++side) {
    set_errors(side);
    start_errors_kernel<<<blocks_for(error_count / task.beam), kThreads, 0, stream>>>(task);
    check_cuda(cudaGetLastError(), "launch of start_errors");
  }

  const BlasScope blas(stream);
  int side = 0;
  for (int64_t first = 0; first < problem.blocks; first += run_blocks) {
    task.first_block = first;
    task.run_blocks = static_cast<int>(std::min(run_blocks, problem.blocks - first));
    const int64_t column = first * task.in_group;
    const auto run_width = static_cast<int>(task.run_blocks * task.in_group);
    weigh_entries(task, norms.data(), units.data(), reach, stream);
    const Real* const own = errors.data() + side * error_count;
    const int live_rows = static_cast<int>(task.live * task.count * task.out_group);
    const auto columns = static_cast<int>(problem.columns);
    const int64_t panel = first / panel_blocks * panel_blocks;
    const auto panel_width = static_cast<int>(std::min(panel_blocks, problem.blocks - panel) * task.in_group);
    task.product_stride = panel_width;
    task.products = products.data() + (first - panel) * task.in_group;
    if constexpr (kSplit) {
      const float* const high = h_parts.data() + column;
      if (first == panel) {
        cuda::multiply(blas, live_rows, panel_width, columns, {own, own + sides * error_count, columns},
                       {high, high + h.count(), columns}, products.data(), panel_width);
      }
    } else {
      // Column-major, (E H)^T = H E^T, for the columns of the run.
      const double one = 1;
      const double zero = 0;
      check_cublas(
          cublas().dgemm(blas.handle(), kOpN, kOpN, run_width, live_rows, columns, &one, h.data() + column,
                         columns, own, columns, &zero, products.data(), run_width),
          "products of errors");
    }
    const int next = sides - 1 - side;
    set_errors(next);
    task.codes = codes.data() + next * task.beam * code_count;
    walk_run(task, scoring, stream);
    const auto left =
        static_cast<int>((panel - first - task.run_blocks) * task.in_group + panel_width);  // of the panel
    if constexpr (kSplit) {
      if (panel_runs > 1 && left > 0) {
        // The errors' changes in this run, times H, in the runs to come.
        const float one = 1;
        float* const later = products.data() + (panel_width - left);
        check_cublas(cublas().sgemm(blas.handle(), kOpN, kOpN, left, live_rows, run_width, &one,
                                    h.data() + column * problem.columns + column + run_width, columns,
                                    error_changes.data(), run_width, &one, later, panel_width),
                     "products of changes");
      }
    }
    if (task.beam > 1 && first > 0) {
      for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
        inherit_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
            own + part * sides * error_count, part == 0 ? task.errors : task.errors_low, origins.data(),
            task.count, task.out_group, problem.columns, column);
      }
      inherit_kernel<<<static_cast<unsigned>(task.beam * task.count), kThreads, 0, stream>>>(
          codes.data() + side * task.beam * code_count, task.codes, origins.data(), task.count, 1,
          problem.blocks * books, first * books);
      check_cuda(cudaGetLastError(), "launch of inherit");
    }
    side = next;
    task.live = task.beam;
  }
  order_codes_kernel<true><<<blocks_for(code_count), kThreads, 0, stream>>>(
      arrays.codes.data(), codes.data() + side * task.beam * code_count, task.rows, task.block_order,
      task.count, problem.blocks, books);
  check_cuda(cudaGetLastError(), "launch of order_codes");
  check_cuda(cudaStreamSynchronize(stream), "work of the stream");
}

}  // namespace

void sweep_codes(const AdditiveProblem& problem, AdditiveArrays& arrays, const CodeSearchOptions& options,
                 std::span<const int64_t> row_groups) {
  if (problem.row_groups == 0 || problem.blocks == 0) return;
  if (options.float64) {
    sweep<double>(problem, arrays, options, row_groups);
  } else {
    sweep<float>(problem, arrays, options, row_groups);
  }
}

}  // namespace quantloom::cuda
