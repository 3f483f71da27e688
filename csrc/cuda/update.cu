// Updates of A and B: pulsed, digital, and the pulse learning rate.
#include <algorithm>

#include "pulses.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kMaximaWarps = 8;

// Eight bfloat16 at a time: the magnitudes of the halves of a word are ordered as 16-bit integers.
__device__ __forceinline__ uint32_t largest_bfloat16(const uint4* row, int vectors, int lane) {
  uint32_t top = 0;
#pragma unroll 8
  for (int i = lane; i < vectors; i += 32) {
    const uint4 v = row[i];
    constexpr uint32_t magnitude = 0x7fff7fffu;
    top =
        __vmaxu2(top, __vmaxu2(__vmaxu2(v.x & magnitude, v.y & magnitude), __vmaxu2(v.z & magnitude, v.w & magnitude)));
  }
  return max(top << 16, top & 0xffff0000u);
}

// By a warp.
__device__ __forceinline__ uint32_t largest(const Operand& v, int64_t at, int elements, int lane) {
  const uint16_t* row = static_cast<const uint16_t*>(v.p) + at;
  if (v.type == kBFloat16 && v.es == 1 && elements % 8 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0)
    return largest_bfloat16(reinterpret_cast<const uint4*>(row), elements / 8, lane);
  uint32_t top = 0;
#pragma unroll 4
  for (int e = 4 * lane; e < elements; e += 128) {
    float value[4];
    load4(v, at + e * v.es, elements - e, value);
#pragma unroll
    for (int k = 0; k < 4; ++k) top = max(top, magnitude_bits(value[k]));
  }
  return top;
}

// Largest |x| and |d| of each sample, one warp a sample.
__global__ void __launch_bounds__(32 * kMaximaWarps) sample_maxima(const DevicePulse* table, int count, int64_t warps) {
  const int64_t warp = int64_t(blockIdx.x) * kMaximaWarps + threadIdx.x / 32;
  if (warp >= warps) return;
  const DevicePulse& p = find_job(table, count, warp, &DevicePulse::first_sample_warp);
  const int64_t s = warp - p.first_sample_warp;
  const int lane = int(threadIdx.x % 32);
  const auto top = [&](const Operand& v, const uint32_t* given, int elements) {
    return given ? given[s] : warp_max(largest(v, s * v.ss, elements, lane));
  };
  const uint32_t x = top(p.job.x, p.job.x_top, p.job.n), d = top(p.job.d, p.job.d_top, p.job.m);
  if (lane == 0) {
    p.maxima[2 * s] = x;
    p.maxima[2 * s + 1] = d;
  }
}

constexpr int kFew = 32;  // elements whose maximum a single thread finds

// Whether the largest |x| and |d| of samples are at hand, or can be found in passing.
bool has_maxima(const PulseJob& job) { return (job.x_top || job.n <= kFew) && (job.d_top || job.m <= kFew); }

__device__ __forceinline__ uint32_t largest_of_few(const Operand& v, const uint32_t* given, int64_t s, int elements) {
  if (given) return given[s];
  uint32_t top = 0;
  for (int e = 0; e < elements; e += 4) {
    float value[4];
    load4(v, s * v.ss + e * v.es, elements - e, value);
#pragma unroll
    for (int k = 0; k < 4; ++k) top = max(top, magnitude_bits(value[k]));
  }
  return top;
}

// Trains and their slots, one thread block per block of samples; the last one of a job packs its rounds. kLevelBlocks
// more fill the noise table.
__global__ void __launch_bounds__(kBlockSamples) plan_trains(DevicePulse* table, int count, float* levels) {
  if (blockIdx.x < kLevelBlocks) return fill_levels(levels, int(blockIdx.x));
  const int64_t number = int64_t(blockIdx.x) - kLevelBlocks;
  DevicePulse& p = const_cast<DevicePulse&>(find_job(table, count, number, &DevicePulse::first_plan_block));
  const int block = int(number - p.first_plan_block);
  const bool mine = int(threadIdx.x) < p.samples;
  const int64_t s = int64_t(block) * p.samples + threadIdx.x;
  Train train{0, 0.0f, 0.0f};
  bool finite = true;
  if (mine && s < p.job.samples) {
    const uint32_t x = p.maxima ? p.maxima[2 * s] : largest_of_few(p.job.x, p.job.x_top, s, p.job.n);
    const uint32_t d = p.maxima ? p.maxima[2 * s + 1] : largest_of_few(p.job.d, p.job.d_top, s, p.job.m);
    train = plan_train(*p.job.eta, x, d, p.job.device.granularity, p.job.pulse, finite);
  }
  if (mine) p.trains[s] = Planned{train.bl, train.sx, train.sd};
  lay_out(p, block, train.bl);
  const int bad = __syncthreads_count(!finite);
  if (threadIdx.x == 0 && bad) count_nonfinite(p.job.counts, p.job.state[kStep], bad);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // thread 0 wrote what lay_out found
    last = atomicAdd(&p.planned, 1) == p.blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < 32) place_blocks(p);
}

struct Layout {
  DevicePulse* table;
  float* levels;
  std::vector<DevicePulse> jobs;
  std::vector<PulseSet> sets;
  int64_t warps = 0, plans = 0;
  size_t bytes;

  Layout(std::vector<PulseJob> list, void* workspace) {
    std::stable_sort(list.begin(), list.end(), kernel_order);
    Arena arena(workspace);
    table = arena.take<DevicePulse>(list.size());
    levels = arena.take<float>(kNoiseLevels);
    for (const PulseJob& job : list) {
      if (job.samples == 0) continue;
      DevicePulse p = describe(job, job.pulse);
      p.finds_maxima = !has_maxima(job);
      p.first_sample_warp = warps;
      p.first_plan_block = plans;
      warps += p.finds_maxima ? job.samples : 0;
      plans += p.blocks;
      jobs.push_back(p);
    }
    sets = arrange(jobs, arena);
    bytes = arena.used();
  }
};

}  // namespace

size_t workspace_bytes(const std::vector<PulseJob>& jobs) { return Layout(jobs, nullptr).bytes; }

void pulsed_update(const std::vector<PulseJob>& list, void* workspace, Stream handle) {
  const Layout layout(list, workspace);
  const int count = int(layout.jobs.size());
  if (count == 0) return;
  const cudaStream_t stream = native(handle);
  store_table(layout.jobs, layout.table, stream);
  if (layout.warps > 0)
    sample_maxima<<<unsigned(blocks_of(layout.warps, kMaximaWarps)), 32 * kMaximaWarps, 0, stream>>>(
        layout.table, count, layout.warps);
  plan_trains<<<unsigned(layout.plans + kLevelBlocks), kBlockSamples, 0, stream>>>(layout.table, count, layout.levels);
  check(cudaGetLastError(), "pulse planning");
  apply_trains(layout.jobs, layout.table, layout.sets, layout.levels, Predicate{nullptr, 0}, stream);
}

// ------------------------------------------------------------------ digital

namespace {

constexpr int kDigitalThreads = 256, kDigitalItems = 4;

struct DeviceDigital {
  cpu::DigitalJob job;
  int* bad;
  int64_t first_block;
};

template <class T>
__device__ void find_bad(const DeviceDigital& p, int64_t first) {
  const T* g = static_cast<const T*>(p.job.grad);
  bool bad = false;
  for (int i = 0; i < kDigitalItems; ++i) {
    const int64_t e = first + int64_t(i) * kDigitalThreads;
    if (e < p.job.size) bad |= !(g[e] - g[e] == T(0));
  }
  if (bad) atomicOr(p.bad, 1);
}

template <class T>
__device__ void descend(const DeviceDigital& p, int64_t first) {
  const T* g = static_cast<const T*>(p.job.grad);
  T* w = static_cast<T*>(p.job.w);
  const T rate = T(*p.job.lr * p.job.scale);
  for (int i = 0; i < kDigitalItems; ++i) {
    const int64_t e = first + int64_t(i) * kDigitalThreads;
    if (e < p.job.size) w[e] -= rate * g[e];
  }
}

__global__ void __launch_bounds__(kDigitalThreads) digital_check(const DeviceDigital* table, int count) {
  const DeviceDigital& p = find_job(table, count, int64_t(blockIdx.x), &DeviceDigital::first_block);
  const int64_t first = (int64_t(blockIdx.x) - p.first_block) * kDigitalThreads * kDigitalItems + threadIdx.x;
  p.job.is_double ? find_bad<double>(p, first) : find_bad<float>(p, first);
}

__global__ void __launch_bounds__(kDigitalThreads) digital_descend(const DeviceDigital* table, int count) {
  const DeviceDigital& p = find_job(table, count, int64_t(blockIdx.x), &DeviceDigital::first_block);
  const int64_t block = int64_t(blockIdx.x) - p.first_block;
  if (*p.bad) {
    if (block == 0 && threadIdx.x == 0) count_nonfinite(p.job.counts, p.job.state[kStep], 1);
    return;
  }
  const int64_t first = block * kDigitalThreads * kDigitalItems + threadIdx.x;
  p.job.is_double ? descend<double>(p, first) : descend<float>(p, first);
}

struct DeviceScale {
  cpu::ScaleJob job;
};

__global__ void __launch_bounds__(kScaleLanes) scale_rates(const DeviceScale* table) {
  __shared__ double cross[kScaleLanes], square[kScaleLanes];
  const cpu::ScaleJob& job = table[blockIdx.x].job;
  const int lane = int(threadIdx.x);
  double c = 0.0, s = 0.0;
#pragma unroll 16  // sixteen loads under way while the sums follow in order
  for (int64_t e = lane; e < job.size; e += kScaleLanes) {
    const double f = job.first[e];
    c += double(job.grad[e]) * f;
    s += f * f;
  }
  cross[lane] = c;
  square[lane] = s;
  for (int half = kScaleLanes / 2; half > 0; half /= 2) {  // tree_sum, one thread a lane
    __syncthreads();
    if (lane < half) {
      cross[lane] += cross[lane + half];
      square[lane] += square[lane + half];
    }
  }
  if (lane == 0) *job.eta = pulse_rate(*job.lr * job.scale, cross[0], square[0]);
}

}  // namespace

size_t workspace_bytes(const std::vector<cpu::DigitalJob>& jobs) {
  Arena arena(nullptr);
  arena.take<DeviceDigital>(jobs.size());
  arena.take<int>(jobs.size());
  return arena.used();
}

void digital_update(const std::vector<cpu::DigitalJob>& list, void* workspace, Stream handle) {
  if (list.empty()) return;
  const cudaStream_t stream = native(handle);
  Arena arena(workspace);
  DeviceDigital* table = arena.take<DeviceDigital>(list.size());
  int* bad = arena.take<int>(list.size());
  std::vector<DeviceDigital> jobs;
  int64_t blocks = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    jobs.push_back(DeviceDigital{list[i], bad + i, blocks});
    blocks += blocks_of(list[i].size, kDigitalThreads * kDigitalItems);
  }
  store_table(jobs, table, stream);
  check(cudaMemsetAsync(bad, 0, sizeof(int) * list.size(), stream), "digital update");
  digital_check<<<unsigned(blocks), kDigitalThreads, 0, stream>>>(table, int(jobs.size()));
  digital_descend<<<unsigned(blocks), kDigitalThreads, 0, stream>>>(table, int(jobs.size()));
  check(cudaGetLastError(), "digital update");
}

size_t workspace_bytes(const std::vector<cpu::ScaleJob>& jobs) {
  Arena arena(nullptr);
  arena.take<DeviceScale>(jobs.size());
  return arena.used();
}

void pulse_scale(const std::vector<cpu::ScaleJob>& list, void* workspace, Stream handle) {
  if (list.empty()) return;
  const cudaStream_t stream = native(handle);
  DeviceScale* table = Arena(workspace).take<DeviceScale>(list.size());
  std::vector<DeviceScale> jobs;
  for (const cpu::ScaleJob& job : list) jobs.push_back(DeviceScale{job});
  store_table(jobs, table, stream);
  scale_rates<<<unsigned(jobs.size()), kScaleLanes, 0, stream>>>(table);
  check(cudaGetLastError(), "pulse scale");
}

}  // namespace lrtt::cuda
