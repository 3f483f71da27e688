#include "pulses.cuh"

#include <type_traits>

#include "rounds.cuh"

namespace lrtt::cuda {

namespace {

// Scratch for the streams of one round.
constexpr size_t kStreamBytes = size_t(32) << 20;

// The first round: one kernel a device model, Hold and way to take samples, so that each has the registers it needs.
template <class Device, bool loses, int how, bool bursts>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    apply_pulses(const DevicePulse* table, int count, int64_t blocks, const float* levels, Predicate predicate) {
  extern __shared__ uint4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  if (!any_left(table, count, 0, predicate)) return;
  run_round(table, count, blocks, 0, levels, predicate, shared, [&](const DevicePulse& p, int tile_block) {
    run_cells<Device, loses, how, bursts>(p, tile_block, 0, shared);
  });
}

bool same_kernel(const PulseJob& a, const PulseJob& b) { return !kernel_order(a, b) && !kernel_order(b, a); }

int64_t cell_blocks(const DevicePulse& p) {
  const int longer = p.along_columns ? p.job.n : p.job.m, shorter = p.along_columns ? p.job.m : p.job.n;
  return blocks_of(longer, kLongLanes) * blocks_of(shorter, kShortRows);
}

// Scratch for the streams of one block of samples.
size_t block_bytes(const DevicePulse& p) {
  return size_t(p.block_words + p.neg_words) * sizeof(uint32_t) * size_t(p.job.m + p.job.n);
}

// Rounds until the largest job of jobs[first .. last - 1] is through, each with `each` blocks of samples of every job.
PulseSet place_streams(std::vector<DevicePulse>& jobs, int first, int last, size_t bytes, Arena& streams) {
  const int64_t fit = int64_t(kStreamBytes / bytes), each = fit > 1 ? fit : 1;
  PulseSet set{first, last - first, 1, 0};
  for (int i = first; i < last; ++i) {
    DevicePulse& p = jobs[size_t(i)];
    const int64_t together = each < p.blocks ? each : p.blocks;
    p.capacity = int(together) * p.block_words;
    p.neg_capacity = p.form == kCounted ? p.capacity : int(together) * p.neg_words;
    // At best; blocks whose words are not signed must lie among the first rows, which may take a round more.
    const bool orders = p.form == kShortBits && p.neg_words < p.block_words;
    const int rounds = orders && p.blocks > 1 ? p.blocks : int(blocks_of(p.blocks, together));
    set.rounds = rounds > set.rounds ? rounds : set.rounds;
    p.x_bits = streams.take<uint32_t>(size_t(p.capacity) * size_t(p.job.n));
    p.d_bits = streams.take<uint32_t>(size_t(p.capacity) * size_t(p.job.m));
    if (p.form != kCounted) {
      p.x_neg = streams.take<uint32_t>(size_t(p.neg_capacity) * size_t(p.job.n));
      p.d_neg = streams.take<uint32_t>(size_t(p.neg_capacity) * size_t(p.job.m));
    }
    set.word_blocks += word_blocks(p);
    p.first_cell_block = i > first ? jobs[size_t(i) - 1].first_cell_block + cell_blocks(jobs[size_t(i) - 1]) : 0;
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
  // Of the samples there are: a small batch does not fill its only block.
  const int most = job.samples < p.samples ? int(job.samples) : p.samples;
  p.block_words =
      p.form == kCounted ? p.samples : whole_rows(int(blocks_of(int64_t(block_words(pulse)) * most, p.samples)));
  const int unsigned_words = whole_rows((most + 1) / 2);  // at most 16 slots a sample
  p.neg_words = p.form == kCounted                                       ? 0
                : p.form == kShortBits && p.block_words > unsigned_words ? unsigned_words
                                                                         : p.block_words;
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
    p.maxima = p.finds_maxima ? arena.take<uint32_t>(size_t(p.job.samples) * 2) : nullptr;
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
      if (last > first && (!same_kernel(jobs[size_t(first)].job, p.job) || bytes + mine > kStreamBytes)) break;
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

namespace {

// The streams and the cells of a set, all rounds. `last`: of its jobs.
void run_set(const PulseSet& set, const DevicePulse& last, const DevicePulse* table, const float* levels,
             Predicate predicate, cudaStream_t stream) {
  const int64_t most_words = int64_t(kWordBlocks) * processors(), most_cells = int64_t(kCellBlocks) * processors(),
                blocks = last.first_cell_block + cell_blocks(last);
  const unsigned word_grid = unsigned(set.word_blocks < most_words ? set.word_blocks : most_words);
  const unsigned grid = unsigned(blocks < most_cells ? blocks : most_cells);
  if (last.form == kCounted) {
    for (int round = 0; round < set.rounds; ++round) {
      launch_values(table, set.count, word_grid, round, predicate, stream);
      launch_counted_cells(table, set.count, hold(last.job.device), blocks, grid, round, levels, predicate, stream);
    }
    return;
  }
  launch_streams(table, set.count, last.form, word_grid, predicate, stream);
  with_device(int(last.job.device.kind), [&](auto device) {
    using Device = decltype(device);
    constexpr bool linear = kLinearStrength<Device>;
    const auto launch = [&](auto loses, auto how, auto bursts) {
      constexpr int kHow = decltype(how)::value;
      const auto first = with_memory(apply_pulses<Device, decltype(loses)::value, kHow, decltype(bursts)::value>);
      first<<<grid, kCellThreads, sizeof(Shared), stream>>>(table, set.count, blocks, levels, predicate);
      if (set.rounds > 1) launch_later_rounds(table, set.count, kHow, blocks, levels, predicate, stream);
    };
    const auto launch_held = [&](auto loses, auto bursts) {
      switch (hold(last.job.device)) {
        case kNoisy: launch(loses, std::integral_constant<int, kNoisy>{}, bursts); break;
        case kPair: launch(loses, std::integral_constant<int, kPair>{}, bursts); break;
        default: launch(loses, std::integral_constant<int, kPlain>{}, bursts);
      }
    };
    const auto launch_with = [&](auto bursts) {
      if (last.job.array == kC) {  // only C's loss is counted
        launch_held(std::true_type{}, bursts);
      } else {
        launch_held(std::false_type{}, bursts);
      }
    };
    if (takes_bursts(last.job.device)) {
      launch_with(std::integral_constant<bool, linear>{});
    } else {
      launch_with(std::false_type{});
    }
  });
}

}  // namespace

void apply_trains(const std::vector<DevicePulse>& jobs, const DevicePulse* table, const std::vector<PulseSet>& sets,
                  const float* levels, Predicate predicate, cudaStream_t stream) {
  for (const PulseSet& set : sets) {
    const Predicate own{predicate.jobs ? predicate.jobs + set.first : nullptr, predicate.force};
    run_set(set, jobs[size_t(set.first + set.count) - 1], table + set.first, levels, own, stream);
  }
  check(cudaGetLastError(), "pulse kernels");
}

}  // namespace lrtt::cuda
