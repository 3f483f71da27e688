// The pulses of a round on its cells.
#pragma once

#include "walks.cuh"

namespace lrtt::cuda {

// All pulses of kCellThreads cells, block of samples by block of samples. `loses`: count what the bounds cut. `how`:
// Hold. `bursts`: the device takes them.
template <class Device, bool loses, int how, bool bursts>
__device__ __forceinline__ void run_cells(const DevicePulse& p, int tile_block, int round, Shared& shared) {
  const PulseJob& job = p.job;
  const DeviceParams device = job.device;
  const bool along_columns = p.along_columns;
  const int longer = along_columns ? job.n : job.m, shorter = along_columns ? job.m : job.n;
  const int long_blocks = (longer + kLongLanes - 1) / kLongLanes;
  const int long0 = tile_block % long_blocks * kLongLanes, short0 = tile_block / long_blocks * kShortRows;
  const int mine = int(threadIdx.x % kLongLanes), row = int(threadIdx.x / kLongLanes);
  const bool live = long0 + mine < longer && short0 + row < shorter;
  const uint64_t key = uint64_t(job.state[kKey]);
  const uint32_t step = uint32_t(job.state[kStep]), c3 = counter3(kNoise, uint32_t(job.array), 0);
  const bool noisy = device.dw_min_std > 0.0f;

  const uint32_t index = along_columns ? uint32_t(short0 + row) * uint32_t(job.n) + uint32_t(long0 + mine)
                                       : uint32_t(long0 + mine) * uint32_t(job.n) + uint32_t(short0 + row);
  const CellId id{key, uint32_t(job.array), index};
  const int64_t size = int64_t(job.m) * job.n;
  Run run{};
  run.w = live ? (how == kPlain ? job.w : job.cells)[index] + 0.0f : 0.0f;
  uint32_t last_touch = 0;
  int64_t lost = 0;
  if (live) run.cell = draw_cell<Device>(device, id);
  if (how == kPair && live) {
    run.minus = job.cells[size + index] + 0.0f;
    run.minus_cell = draw_cell<Device>(device, minus_of(id));
  }
  const uint32_t levels = shared_address(shared.levels);
  const int last = p.begin[round + 1], rows = p.place[last - 1] + p.words[last - 1];
  int block = p.begin[round];
  uint32_t before = 0;
  Burst up{}, down{};
  // The blocks of a round lie end to end, so a segment may hold several, or a part of one: the fewer segments, the less
  // warps wait for one another.
  for (int begin = 0; begin < rows; begin += kSegmentWords) {
    const int many = min(rows - begin, kSegmentWords);
    __syncthreads();  // the segment before is done with
    const int first = block;
    const BlockPlace at_first = place_of(p, first);
    const bool covered = at_first.place <= begin && at_first.place + at_first.words >= begin + many;
    const int negs = covered && signed_words(p, at_first.width) ? 0 : min(many, p.neg_capacity - begin);
    if (threadIdx.x < kPlaces && first + int(threadIdx.x) < last)
      shared.places[threadIdx.x] = place_of(p, first + int(threadIdx.x));
    copy_stored(along_columns ? p.d_bits : p.x_bits, along_columns ? p.d_neg : p.x_neg, begin, many, negs, shorter,
                short0, shared.shorter);
    copy_stored(along_columns ? p.x_bits : p.d_bits, along_columns ? p.x_neg : p.d_neg, begin, many, negs, longer,
                long0, shared.longer);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (; block < last; ++block) {
      const BlockPlace own = block - first < kPlaces ? shared.places[block - first] : place_of(p, block);
      const int words = own.words, width = own.width, place = own.place - begin, end = place + words;
      const bool is_signed = signed_words(p, width);
      if (words == 0) continue;
      if (place >= many) break;
      if (place >= 0) {  // the block begins here
        before = run.pulses;
        run.cut = 0.0f;  // rounded once a block, as on the CPU
        if (noisy) run.random = pulse_noise(key, index, p.first_block + uint32_t(block), step, c3);
        if (bursts && burst_width(width)) {
          up = burst_of<Device>(device, run.cell, true);
          down = burst_of<Device>(device, how == kPair ? run.minus_cell : run.cell, how == kPair);
        }
      }
      const int from = max(place, 0), here = min(end, many) - from;
      const Place at{shared.shorter.bits[row] + from, shared.shorter.neg[row] + from, shared.longer.bits[mine] + from,
                     shared.longer.neg[mine] + from, here};
      if (live && bursts && burst_width(width)) {
        if (device.mult_noise != 0.0f) {
          run_bursts<Device, loses, how, true>(device, up, down, at, width, is_signed, levels, run);
        } else {
          run_bursts<Device, loses, how, false>(device, up, down, at, width, is_signed, levels, run);
        }
      } else if (live) {
        const bool dense = 4 * words >= p.samples && !bursts;
        for (int group = 0; group < here; group += 32) {
          const uint32_t *s = at.short_bits + group, *l = at.long_bits + group;
          if (!bursts && is_signed) {
            walk_pulses<Device, loses, how, !bursts>(device, s, l, min(here - group, 32), dense, levels, run);
          } else {
            walk_pulses<Device, loses, how, false>(device, s, l, min(here - group, 32), dense, levels, run);
          }
        }
      }
      if (end > many) break;  // it goes on in the next segment
      if (loses) lost += int64_t(double(run.cut) * kFixedPoint + 0.5);
      if (how == kNoisy && run.pulses != before) last_touch = p.first_block + uint32_t(block);
    }
  }
  if (how == kPlain) {
    if (live) job.w[index] = run.w;
  } else if (live && run.pulses) {
    job.cells[index] = run.w;
    if (how == kPair) job.cells[size + index] = run.minus;
    job.w[index] = how == kPair ? run.w - run.minus : shown(device, id, run.w, kByPulses, last_touch, step);
  }
  const int64_t all_pulses = warp_sum(int64_t(run.pulses));
  if (threadIdx.x % 32 == 0 && all_pulses) add(job.counts + k_pulses_a + job.array, all_pulses);
  if (loses && job.array == kC) {  // the others' are not counted
    const int64_t all_lost = warp_sum(lost);
    if (threadIdx.x % 32 == 0 && all_lost) add(job.counts + k_lost, all_lost);
  }
}

// The cells of all jobs in a round, by resident blocks: `run` takes kCellThreads of one job.
template <class Run>
__device__ __forceinline__ void run_round(const DevicePulse* table, int count, int64_t blocks, int round,
                                          const float* levels, const Predicate& predicate, Shared& shared,
                                          const Run& run) {
  if (threadIdx.x < 33) shared.roots[threadIdx.x] = make_float2(float(threadIdx.x), sqrt_(float(threadIdx.x)));
  float sigma = -1.0f;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const DevicePulse& p = find_job(table, count, block, &DevicePulse::first_cell_block);
    if (p.begin[round] >= p.begin[round + 1]) continue;
    if (predicate.jobs && !fires(predicate.jobs[&p - table], predicate.force)) continue;
    if (sigma != p.job.device.dw_min_std) {
      sigma = p.job.device.dw_min_std;
      __syncthreads();  // the cells before are done with the old ones
      for (int i = threadIdx.x; i < kNoiseLevels; i += kCellThreads) {
        shared.levels[i] = sigma * levels[i];
        shared.levels[i + kNoiseLevels] = -(sigma * levels[i]);
      }
    }
    run(p, int(block - p.first_cell_block));
  }
}

// Lets a kernel have the shared memory that its cells want.
template <class Kernel>
Kernel with_memory(Kernel kernel) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))),
        "pulse kernels");
  return kernel;
}

}  // namespace lrtt::cuda
