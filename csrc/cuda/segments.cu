// Segment sums on the GPU. The slots travel through memory once: a block takes the norms of its elements, then adds
// them along the tree while they are still in the caches.
#include "common.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = kSegmentLanes, kItems = kSegmentBlock / kSegmentLanes;
constexpr int kLoads = 12;  // slots in flight for one element

struct DeviceSegments {
  SegmentJob job;  // slots and out point into scratch memory
  int64_t first_block;
};

struct Call {
  const DeviceSegments* table;
  int count, steps;
  const SegmentStep* program;
  const double *weights, *scale;
  double* square;  // [steps, blocks]; null: no norms wanted
  int* bad;        // [steps, blocks]
  int64_t blocks;
  int redo;
};

template <class T>
__device__ void norms(const Call& call, const SegmentJob& job, int64_t base, int64_t number) {
  __shared__ double lane[kThreads];
  for (int s = 0; s < call.steps; ++s) {
    const T* slot = static_cast<const T*>(job.slots[s]);
    double sum = 0.0;
    bool bad = false;
    if (slot != nullptr) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int64_t e = base + i * kThreads;
        if (e >= job.size) break;
        const T v = slot[e];
        bad |= not_finite(v);
        sum += double(v) * double(v);
      }
    }
    lane[threadIdx.x] = sum;
    const int any = __syncthreads_or(bad);
    for (int half = kThreads / 2; half >= 32; half /= 2) {  // tree_sum, one thread a lane
      if (int(threadIdx.x) < half) lane[threadIdx.x] += lane[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x < 32) {
      const double total = warp_tree(lane[threadIdx.x]);
      if (threadIdx.x == 0) {
        call.square[int64_t(s) * call.blocks + number] = total;
        call.bad[int64_t(s) * call.blocks + number] = any;
      }
    }
    __syncthreads();
  }
}

template <class T>
__device__ void sums(const Call& call, const SegmentJob& job, int64_t base) {
  const T scale = T(*call.scale);
  for (int i = 0; i < kItems; ++i) {
    const int64_t e = base + int64_t(i) * kThreads;
    if (e >= job.size) return;
    T stack[kSegmentDepth];
    int depth = 0, node = 0;
    for (int first = 0; first < call.steps; first += kLoads) {
      T value[kLoads];
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        value[s] = T(0);
        if (first + s < call.steps) {
          const double weight = call.weights[first + s];
          const T* slot = static_cast<const T*>(job.slots[first + s]);
          if (slot != nullptr && weight != 0.0) value[s] = weight == 1.0 ? slot[e] : slot[e] * T(weight);
        }
      }
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        if (first + s < call.steps) {
          const SegmentStep step = call.program[first + s];
          stack[depth++] = value[s];
          for (int a = 0; a < step.adds; ++a) {
            --depth;
            stack[depth - 1] = stack[depth - 1] + stack[depth];
          }
          if (step.emit) static_cast<T*>(job.out[node++])[e] = stack[--depth] * scale;
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) segment_blocks(const Call call) {
  if (call.redo) {
    bool other = false;
    for (int s = threadIdx.x; s < call.steps; s += kThreads) other |= call.weights[s] != 1.0;
    if (!__syncthreads_or(other)) return;
  }
  const int64_t number = blockIdx.x;
  const DeviceSegments& p = find_job(call.table, call.count, number, &DeviceSegments::first_block);
  const int64_t base = (number - p.first_block) * kSegmentBlock + threadIdx.x;
  if (call.square != nullptr)
    p.job.is_double ? norms<double>(call, p.job, base, number) : norms<float>(call, p.job, base, number);
  p.job.is_double ? sums<double>(call, p.job, base) : sums<float>(call, p.job, base);
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

}  // namespace

size_t workspace_bytes(const SegmentCall& call) { return lay_out(call, nullptr).bytes; }

void segment_sum(const SegmentCall& call, void* workspace, Stream handle) {
  const cudaStream_t stream = native(handle);
  const Layout l = lay_out(call, workspace);
  const size_t steps = call.program.size();
  std::vector<DeviceSegments> table;
  std::vector<const void*> pointers;
  int64_t blocks = 0;
  for (const SegmentJob& job : call.jobs) {
    const void** at = l.pointers + pointers.size();
    pointers.insert(pointers.end(), job.slots, job.slots + steps);
    pointers.insert(pointers.end(), job.out, job.out + l.outs);
    table.push_back({{at, (void* const*)(at + steps), job.size, job.is_double, 0}, blocks});
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
  segment_blocks<<<unsigned(blocks), kThreads, 0, stream>>>(device);
  if (call.stats) finish_norms<<<unsigned(steps), kSegmentFinalLanes, 0, stream>>>(device, call.stats);
  check(cudaGetLastError(), "segment sum");
}

}  // namespace lrtt::cuda
