// Counted trains (mean_count, deterministic_implicit): the values of both sides are stored, each cell counts its
// pulses.
#include "pulses.cuh"

namespace lrtt::cuda {
namespace {

// Four elements of one sample of one side: task `task` of a job in a round.
__device__ __forceinline__ void make_value(const DevicePulse& p, int64_t task, int round) {
  const int64_t x_groups = groups_of(p.job.n), groups = x_groups + groups_of(p.job.m);
  const int row = int(task / groups), block = block_of_row(p, round, row), s = row - p.place[block];
  const int64_t sample = int64_t(block) * p.samples + s;
  if (s >= p.words[block] || sample >= p.job.samples) return;
  int64_t group = task - row * groups;
  const bool is_x = group < x_groups;
  if (!is_x) group -= x_groups;
  const int elements = is_x ? p.job.n : p.job.m;
  const Planned t = p.trains[sample];  // blocks lie end to end
  if (t.bl == 0) return;               // its values are not read
  const PulseParams& pulse = p.job.pulse;
  const Operand& v = is_x ? p.job.x : p.job.d;
  const int64_t from = p.transfer ? p.rows[sample] : sample;
  float value[4];
  load4(v, from * v.ss + 4 * group * v.es, elements - int(4 * group), value);
  Words random{};
  if (pulse.sto_round) {
    const uint32_t c1 = (uint32_t(p.job.first_sample) + uint32_t(sample)) * 64u + (is_x ? 0u : 1u);
    random = philox(uint64_t(p.job.state[kKey]), uint32_t(group), c1, uint32_t(p.job.state[kStep]),
                    counter3(kRound, uint32_t(p.job.array), 0));
  }
  uint32_t* to = (is_x ? p.x_bits : p.d_bits) + int64_t(row) * elements + 4 * group;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * group + k >= elements) break;
    const float q = counted_value(pulse.type, abs_(value[k]) * (is_x ? t.sx : t.sd), is_x ? pulse.x_res : pulse.d_res,
                                  pulse.sto_round != 0, random.w[k], t.bl);
    to[k] = to_bits(q) | (to_bits(value[k]) & 0x80000000u);
  }
}

// Resident blocks run through the tasks of all jobs, as in make_streams.
__global__ void __launch_bounds__(kWordThreads)
    make_values(const DevicePulse* table, int count, int round, Predicate predicate) {
  if (!any_left(table, count, round, predicate)) return;
  int64_t b = blockIdx.x;  // counted from the first task of the present job
  for (int i = 0; i < count; ++i) {
    const DevicePulse& p = table[i];
    if (predicate.jobs && !fires(predicate.jobs[i], predicate.force)) continue;
    const int begin = p.begin[round], end = p.begin[round + 1];
    if (begin >= end) continue;
    const int64_t tasks = (groups_of(p.job.n) + groups_of(p.job.m)) * int64_t(p.place[end - 1] + p.words[end - 1]);
    const int64_t blocks = (tasks + kWordThreads - 1) / kWordThreads;
    for (; b < blocks; b += gridDim.x) {
      const int64_t task = b * kWordThreads + threadIdx.x;
      if (task < tasks) make_value(p, task, round);
    }
    b -= blocks;
  }
}

// Cells as in apply_pulses; each counts its pulses of a sample from the values of both sides.
template <class Device, int how>
__device__ void run_counts(const DevicePulse& p, int tile_block, int round, const float* levels) {
  const PulseJob& job = p.job;
  const DeviceParams& device = job.device;
  const int longer = p.along_columns ? job.n : job.m, shorter = p.along_columns ? job.m : job.n;
  const int long_blocks = (longer + kLongLanes - 1) / kLongLanes;
  const int along = tile_block % long_blocks * kLongLanes + int(threadIdx.x % kLongLanes);
  const int across = tile_block / long_blocks * kShortRows + int(threadIdx.x / kLongLanes);
  const bool live = along < longer && across < shorter;
  const int row = p.along_columns ? across : along, column = p.along_columns ? along : across;
  const uint32_t index = uint32_t(row) * uint32_t(job.n) + uint32_t(column);
  const uint64_t key = uint64_t(job.state[kKey]);
  const uint32_t step = uint32_t(job.state[kStep]), c3 = counter3(kNoise, uint32_t(job.array), 0);
  const bool flip = (p.transfer ? p.eta_sign : *job.eta) < 0.0f;
  const bool noisy = device.dw_min_std > 0.0f, inside = device.mult_noise != 0.0f;

  int64_t pulses = 0, lost = 0;
  if (live) {
    const CellId id{key, uint32_t(job.array), index};
    const int64_t size = int64_t(job.m) * job.n;
    const Cell cell = draw_cell<Device>(device, id);
    Cell minus_cell{};                                                          // the second of a pair
    float w = (how == kPlain ? job.w : job.cells)[index] + 0.0f, minus = 0.0f;  // no negative zero
    if (how == kPair) {
      minus_cell = draw_cell<Device>(device, minus_of(id));
      minus = job.cells[size + index] + 0.0f;
    }
    uint32_t last_touch = 0;
    for (int block = p.begin[round], last = p.begin[round + 1]; block < last; ++block) {
      if (p.words[block] == 0) continue;
      const int64_t first = int64_t(block) * p.samples, left = p.job.samples - first;
      const int many_samples = int(left < p.samples ? left : p.samples);
      const Planned* trains = p.trains + first;
      const int64_t counted = pulses;
      float cut = 0.0f;  // rounded once a block, as on the CPU
      PulseNoise random{};
      if (noisy) random = pulse_noise(key, index, p.first_block + uint32_t(block), step, c3);
      const bool as_bursts = takes_bursts<Device>(device) && burst_width(p.widths[block]);
      Burst upwards{}, downwards{};
      if (as_bursts) {
        upwards = burst_of<Device>(device, cell, true);
        downwards = burst_of<Device>(device, how == kPair ? minus_cell : cell, how == kPair);
      }
      for (int s = 0; s < many_samples; ++s) {
        const int bl = trains[s].bl;
        if (bl == 0) continue;
        const uint32_t x = p.x_bits[int64_t(p.place[block] + s) * job.n + column];
        const uint32_t d = p.d_bits[int64_t(p.place[block] + s) * job.m + row];
        const int many = counted_pulses(job.pulse.type, abs_(from_bits(x)), abs_(from_bits(d)), bl);
        const bool up = ((x ^ d) >> 31) != uint32_t(flip);  // x*d negative: an up pulse
        const bool at_once = as_bursts && float(many) <= (up ? upwards : downwards).most;
        if (at_once && many > 0) {
          if (noisy) random.state = advance(random.state, random.increment);
          const float eta = noisy ? noise(levels, random.state) * sqrt_(float(many)) : 0.0f;
          if (how == kPair && !up) {
            minus = burst<Device>(minus_cell, downwards, inside, minus, float(many), eta, cut);
          } else {
            w = burst<Device>(cell, up ? upwards : downwards, inside, w, float(many), eta, cut);
          }
        }
        for (int pulse_number = 0; pulse_number < many && !at_once; ++pulse_number) {
          float xi = 0.0f;
          if (noisy) {
            random.state = advance(random.state, random.increment);
            xi = noise(levels, random.state);
          }
          if (how == kPair && !up) {  // the cells of a pair take pulses upwards only
            minus = pulse<Device>(device, minus_cell, minus, true, xi, cut);
          } else {
            w = pulse<Device>(device, cell, w, up, xi, cut);
          }
        }
        pulses += many;
      }
      lost += int64_t(double(cut) * kFixedPoint + 0.5);
      if (pulses != counted) last_touch = p.first_block + uint32_t(block);
    }
    if (how == kPlain) job.w[index] = w;
    if (how != kPlain && pulses) {
      job.cells[index] = w;
      if (how == kPair) job.cells[size + index] = minus;
      job.w[index] = how == kPair ? w - minus : shown(device, id, w, kByPulses, last_touch, step);
    }
  }
  const int64_t all_pulses = warp_sum(pulses), all_lost = warp_sum(lost);
  if (threadIdx.x % 32 == 0) {
    if (all_pulses) add(job.counts + k_pulses_a + job.array, all_pulses);
    if (all_lost && job.array == kC) add(job.counts + k_lost, all_lost);
  }
}

// Resident blocks run through the cells of all jobs, as in apply_pulses.
template <int how>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    apply_counts(const DevicePulse* table, int count, int64_t blocks, int round, const float* levels,
                 Predicate predicate) {
  __shared__ float scaled[kNoiseLevels];
  if (!any_left(table, count, round, predicate)) return;
  float sigma = -1.0f;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const DevicePulse& p = find_job(table, count, block, &DevicePulse::first_cell_block);
    if (p.begin[round] >= p.begin[round + 1]) continue;
    if (predicate.jobs && !fires(predicate.jobs[&p - table], predicate.force)) continue;
    if (sigma != p.job.device.dw_min_std) {
      sigma = p.job.device.dw_min_std;
      __syncthreads();  // the cells before are done with the old ones
      for (int i = threadIdx.x; i < kNoiseLevels; i += kCellThreads) scaled[i] = sigma * levels[i];
      __syncthreads();
    }
    const int tile_block = int(block - p.first_cell_block);
    with_device(int(p.job.device.kind),
                [&](auto device) { run_counts<decltype(device), how>(p, tile_block, round, scaled); });
  }
}

}  // namespace

void launch_values(const DevicePulse* table, int count, unsigned grid, int round, Predicate predicate,
                   cudaStream_t stream) {
  make_values<<<grid, kWordThreads, 0, stream>>>(table, count, round, predicate);
}

void launch_counted_cells(const DevicePulse* table, int count, int how, int64_t blocks, unsigned grid, int round,
                          const float* levels, Predicate predicate, cudaStream_t stream) {
  switch (how) {
    case kNoisy:
      apply_counts<kNoisy><<<grid, kCellThreads, 0, stream>>>(table, count, blocks, round, levels, predicate);
      break;
    case kPair:
      apply_counts<kPair><<<grid, kCellThreads, 0, stream>>>(table, count, blocks, round, levels, predicate);
      break;
    default: apply_counts<kPlain><<<grid, kCellThreads, 0, stream>>>(table, count, blocks, round, levels, predicate);
  }
}

}  // namespace lrtt::cuda
