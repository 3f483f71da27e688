// Segment sums on the GPU: the table of parameters, the launch, and the norms over all blocks.
#include "segments.cuh"

namespace lrtt::cuda {
namespace {

// A kernel without norms needs half the registers, so twice as many loads are under way.
template <bool in_registers, bool norms>
__global__ void __launch_bounds__(kThreads) segment_blocks(const Call call) {
  if (call.redo) {
    bool other = false;
    for (int s = threadIdx.x; s < call.steps; s += kThreads) other |= call.weights[s] != 1.0;
    if (!__syncthreads_or(other)) return;
  }
  const int64_t number = blockIdx.x;
  const DeviceSegments& p = find_job(call.table, call.count, number, &DeviceSegments::first_block);
  const int64_t base = (number - p.first_block) * kSegmentBlock + kFour * int64_t(threadIdx.x);
  if (in_registers) {
    one_pass<norms>(call, p.job, base, number);
  } else {
    p.job.is_double ? two_passes<double>(call, p.job, base, number) : two_passes<float>(call, p.job, base, number);
  }
}

__global__ void __launch_bounds__(kSegmentFinalLanes) finish_norms(const Call call, double* stats) {
  __shared__ double lane[kSegmentFinalLanes];
  const int64_t row = int64_t(blockIdx.x) * call.blocks;
  double sum = 0.0;
  bool bad = false;
  for (int64_t b = threadIdx.x; b < call.blocks; b += kSegmentFinalLanes) {
    sum += call.square[row + b];
    bad |= call.bad[row + b] != 0;
  }
  lane[threadIdx.x] = sum;
  const int any = __syncthreads_or(bad);
  for (int half = kSegmentFinalLanes / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) lane[threadIdx.x] += lane[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    stats[2 * blockIdx.x] = lane[0];
    stats[2 * blockIdx.x + 1] = any ? 1.0 : 0.0;
  }
}

struct Layout {
  DeviceSegments* table;
  SegmentStep* program;
  const void** pointers;
  double* square;
  int* bad;
  size_t outs = 0;
  int64_t blocks = 0;
  size_t bytes;
};

Layout lay_out(const SegmentCall& call, void* workspace) {
  Layout l;
  for (const SegmentStep& step : call.program) l.outs += step.emit != 0;
  for (const SegmentJob& job : call.jobs) l.blocks += blocks_of(job.size, kSegmentBlock);
  Arena arena(workspace);
  const size_t steps = call.program.size(), partials = call.stats ? steps * size_t(l.blocks) : 0;
  l.table = arena.take<DeviceSegments>(call.jobs.size());
  l.program = arena.take<SegmentStep>(steps);
  l.pointers = arena.take<const void*>(call.jobs.size() * (steps + l.outs));
  l.square = arena.take<double>(partials);
  l.bad = arena.take<int>(partials);
  l.bytes = arena.used();
  return l;
}

bool fits_registers(const std::vector<SegmentStep>& program) {
  int depth = 0, most = 0;
  for (const SegmentStep& step : program) {
    most = ++depth > most ? depth : most;
    depth -= step.adds + step.emit;
  }
  return program.size() <= kLoads && most <= kDepth;
}

int aligned(const SegmentJob& job, size_t slots, size_t outs) {
  uintptr_t bits = 0;
  for (size_t i = 0; i < slots; ++i) bits |= reinterpret_cast<uintptr_t>(job.slots[i]);
  for (size_t i = 0; i < outs; ++i) bits |= reinterpret_cast<uintptr_t>(job.out[i]);
  return bits % 16 == 0;
}

}  // namespace

size_t workspace_bytes(const SegmentCall& call) { return lay_out(call, nullptr).bytes; }

void segment_sum(const SegmentCall& call, void* workspace, Stream handle) {
  const cudaStream_t stream = native(handle);
  const Layout l = lay_out(call, workspace);
  const size_t steps = call.program.size();
  std::vector<DeviceSegments> table;
  std::vector<const void*> pointers;
  int64_t blocks = 0;
  bool in_registers = fits_registers(call.program);
  for (const SegmentJob& job : call.jobs) {
    in_registers &= !job.is_double;
    const void** at = l.pointers + pointers.size();
    pointers.insert(pointers.end(), job.slots, job.slots + steps);
    pointers.insert(pointers.end(), job.out, job.out + l.outs);
    table.push_back({{at, (void* const*)(at + steps), job.size, job.is_double, aligned(job, steps, l.outs)}, blocks});
    blocks += blocks_of(job.size, kSegmentBlock);
  }
  if (blocks == 0) {
    if (call.stats) check(cudaMemsetAsync(call.stats, 0, 2 * steps * sizeof(double), stream), "segment sum");
    return;
  }
  store_table(table, l.table, stream);
  store_table(call.program, l.program, stream);
  store_table(pointers, l.pointers, stream);
  const Call device{l.table,
                    int(table.size()),
                    int(steps),
                    l.program,
                    call.weights,
                    call.scale,
                    call.stats ? l.square : nullptr,
                    l.bad,
                    blocks,
                    call.redo};
  const auto kernel = !in_registers ? segment_blocks<false, true>
                      : call.stats  ? segment_blocks<true, true>
                                    : segment_blocks<true, false>;
  kernel<<<unsigned(blocks), kThreads, 0, stream>>>(device);
  if (call.stats) finish_norms<<<unsigned(steps), kSegmentFinalLanes, 0, stream>>>(device, call.stats);
  check(cudaGetLastError(), "segment sum");
}

}  // namespace lrtt::cuda
