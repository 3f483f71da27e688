#include "pulses.cuh"

#include <type_traits>

#include "walks.cuh"

namespace lrtt::cuda {

namespace {

// Scratch for the streams of one round.
constexpr size_t kStreamBytes = size_t(72) << 20;

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
  const uint32_t flip = (p.transfer ? p.eta_sign : *job.eta) < 0.0f ? 0xffffffffu : 0u;

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
    copy_stored(along_columns ? p.d_bits : p.x_bits, along_columns ? p.d_neg : p.x_neg, begin, many, shorter, short0,
                shared.shorter);
    copy_stored(along_columns ? p.x_bits : p.d_bits, along_columns ? p.x_neg : p.d_neg, begin, many, longer, long0,
                shared.longer);
    finish_copies(shared, many, flip);
    __syncthreads();
    for (; block < last; ++block) {
      const int words = p.words[block], width = p.widths[block], place = p.place[block] - begin, end = place + words;
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
          run_bursts<Device, loses, how, true>(device, up, down, at, width, levels, run);
        } else {
          run_bursts<Device, loses, how, false>(device, up, down, at, width, levels, run);
        }
      } else if (live) {
        for (int group = 0; group < here; group += 32)
          walk_pulses<Device, loses, how>(device, at.short_bits + group, at.long_bits + group, min(here - group, 32),
                                          4 * words >= p.samples && !bursts, levels, run);
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
  if (loses) {
    const int64_t all_lost = warp_sum(lost);
    if (threadIdx.x % 32 == 0 && all_lost) add(job.counts + k_lost, all_lost);
  }
}

// One kernel a device model, Hold and way to take samples, so that each has the registers it needs. Resident blocks run
// through the cells of all jobs.
template <class Device, bool loses, int how, bool bursts>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    apply_pulses(const DevicePulse* table, int count, int64_t blocks, int round, const float* levels,
                 Predicate predicate) {
  extern __shared__ uint4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  if (!any_left(table, count, round, predicate)) return;
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
    run_cells<Device, loses, how, bursts>(p, int(block - p.first_cell_block), round, shared);
  }
}

bool same_kernel(const PulseJob& a, const PulseJob& b) { return !kernel_order(a, b) && !kernel_order(b, a); }

int64_t cell_blocks(const DevicePulse& p) {
  const int longer = p.along_columns ? p.job.n : p.job.m, shorter = p.along_columns ? p.job.m : p.job.n;
  return blocks_of(longer, kLongLanes) * blocks_of(shorter, kShortRows);
}

// Scratch for the streams of one block of samples.
size_t block_bytes(const DevicePulse& p) {
  return size_t(p.block_words) * (p.form == kCounted ? 1 : 2) * sizeof(uint32_t) * size_t(p.job.m + p.job.n);
}

// Rounds until the largest job of jobs[first .. last - 1] is through, each with `each` blocks of samples of every job.
PulseSet place_streams(std::vector<DevicePulse>& jobs, int first, int last, size_t bytes, Arena& streams) {
  const int64_t fit = int64_t(kStreamBytes / bytes), each = fit > 1 ? fit : 1;
  PulseSet set{first, last - first, 1, 0};
  for (int i = first; i < last; ++i) {
    DevicePulse& p = jobs[size_t(i)];
    const int64_t together = each < p.blocks ? each : p.blocks;
    p.capacity = int(together) * p.block_words;
    const int rounds = int(blocks_of(p.blocks, together));
    set.rounds = rounds > set.rounds ? rounds : set.rounds;
    p.x_bits = streams.take<uint32_t>(size_t(p.capacity) * size_t(p.job.n));
    p.d_bits = streams.take<uint32_t>(size_t(p.capacity) * size_t(p.job.m));
    if (p.form != kCounted) {
      p.x_neg = streams.take<uint32_t>(size_t(p.capacity) * size_t(p.job.n));
      p.d_neg = streams.take<uint32_t>(size_t(p.capacity) * size_t(p.job.m));
    }
    set.word_blocks += word_blocks(p);
    const bool follows =
        i > first && same_kernel(jobs[size_t(i) - 1].job, p.job);  // blocks of one kernel are numbered through
    p.first_cell_block = follows ? jobs[size_t(i) - 1].first_cell_block + cell_blocks(jobs[size_t(i) - 1]) : 0;
  }
  return set;
}

}  // namespace

DevicePulse describe(const PulseJob& job, const PulseParams& pulse) {
  DevicePulse p{};
  p.job = job;
  p.job.pulse = pulse;
  p.form = form_of(pulse);
  p.samples = block_samples(pulse);
  const int64_t first_block = job.first_sample / p.samples, blocks = blocks_of(job.samples, p.samples);
  p.first_block = uint32_t(first_block);
  p.blocks = int(blocks);
  p.block_words = p.form == kCounted ? p.samples : whole_rows(block_words(pulse));
  return p;
}

bool kernel_order(const PulseJob& a, const PulseJob& b) {
  if (form_of(a.pulse) != form_of(b.pulse)) return form_of(a.pulse) < form_of(b.pulse);
  if (hold(a.device) != hold(b.device)) return hold(a.device) < hold(b.device);
  if (takes_bursts(a.device) != takes_bursts(b.device)) return takes_bursts(a.device) < takes_bursts(b.device);
  return a.device.kind != b.device.kind ? a.device.kind < b.device.kind : (a.array == kC) < (b.array == kC);
}

std::vector<PulseSet> arrange(std::vector<DevicePulse>& jobs, Arena& arena) {
  int most_rounds = 0;  // of a set: as many as the largest of its jobs needs
  for (const DevicePulse& p : jobs) most_rounds = p.blocks > most_rounds ? p.blocks : most_rounds;
  for (DevicePulse& p : jobs) {
    const size_t samples = size_t(p.blocks) * size_t(p.samples);
    p.most_rounds = most_rounds;
    p.along_columns = p.job.n >= p.job.m;
    p.maxima = arena.take<uint32_t>(p.transfer ? 0 : size_t(p.job.samples) * 2);
    p.trains = arena.take<Planned>(samples);
    p.rows = p.transfer ? arena.take<int>(samples) : nullptr;
    p.words = arena.take<int>(size_t(p.blocks));
    p.place = arena.take<int>(size_t(p.blocks));
    p.begin = arena.take<int>(size_t(most_rounds) + 1);
    p.widths = arena.take<int>(size_t(p.blocks));
  }
  std::vector<PulseSet> sets;
  Arena most = arena;  // the sets use one region of streams in turn
  for (int first = 0, last = 0; first < int(jobs.size()); first = last) {
    size_t bytes = 0;
    while (last < int(jobs.size())) {
      const DevicePulse& p = jobs[size_t(last)];
      const size_t mine = block_bytes(p);
      if (last > first && (p.form != jobs[size_t(first)].form || bytes + mine > kStreamBytes)) break;
      bytes += mine;
      ++last;
    }
    Arena streams = arena;
    sets.push_back(place_streams(jobs, first, last, bytes, streams));
    most.reach(streams);
  }
  arena.reach(most);
  return sets;
}

void apply_trains(const std::vector<DevicePulse>& jobs, const DevicePulse* table, const std::vector<PulseSet>& sets,
                  const float* levels, Predicate predicate, cudaStream_t stream) {
  const int64_t most_words = int64_t(2048 / kWordThreads) * processors(),
                most_cells = int64_t(kCellBlocks) * processors();
  for (const PulseSet& set : sets) {
    const auto from = [&](int first) {
      return Predicate{predicate.jobs ? predicate.jobs + first : nullptr, predicate.force};
    };
    for (int round = 0; round < set.rounds; ++round) {
      // Later rounds are mostly empty: no more blocks than are resident, so that they are over at once.
      const int64_t most_here = round == 0 ? most_words : int64_t(kWordBlocks) * processors();
      const unsigned word_grid = unsigned(set.word_blocks < most_here ? set.word_blocks : most_here);
      launch_streams(table + set.first, set.count, jobs[size_t(set.first)].form, word_grid, round, from(set.first),
                     stream);
      for (int first = set.first, last = first; first < set.first + set.count; first = last) {
        while (last < set.first + set.count && same_kernel(jobs[size_t(first)].job, jobs[size_t(last)].job)) ++last;
        const DevicePulse& end = jobs[size_t(last) - 1];
        const int64_t blocks = end.first_cell_block + cell_blocks(end);
        const unsigned grid = unsigned(blocks < most_cells ? blocks : most_cells);
        if (end.form == kCounted) {
          launch_counted_cells(table + first, last - first, hold(end.job.device), blocks, grid, round, levels,
                               from(first), stream);
          continue;
        }
        with_device(int(end.job.device.kind), [&](auto device) {
          using Device = decltype(device);
          constexpr bool linear = kLinearStrength<Device>;
          const auto launch = [&](auto loses, auto how) {
            const auto run = [&](auto bursts) {
              const auto kernel =
                  apply_pulses<Device, decltype(loses)::value, decltype(how)::value, decltype(bursts)::value>;
              check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))),
                    "pulse kernels");
              kernel<<<grid, kCellThreads, sizeof(Shared), stream>>>(table + first, last - first, blocks, round, levels,
                                                                     from(first));
            };
            if (takes_bursts(end.job.device)) {
              run(std::integral_constant<bool, linear>{});
            } else {
              run(std::false_type{});
            }
          };
          const auto launch_held = [&](auto loses) {
            switch (hold(end.job.device)) {
              case kNoisy: launch(loses, std::integral_constant<int, kNoisy>{}); break;
              case kPair: launch(loses, std::integral_constant<int, kPair>{}); break;
              default: launch(loses, std::integral_constant<int, kPlain>{});
            }
          };
          if (end.job.array == kC) {  // only C's loss is counted
            launch_held(std::true_type{});
          } else {
            launch_held(std::false_type{});
          }
        });
      }
    }
  }
  check(cudaGetLastError(), "pulse kernels");
}

}  // namespace lrtt::cuda
