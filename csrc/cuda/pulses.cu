#include "pulses.cuh"

#include <cstddef>
#include <type_traits>

namespace lrtt::cuda {

namespace {

// Scratch for the streams of one round.
constexpr size_t kStreamBytes = size_t(64) << 20;

// What the cells of one thread block read: a segment of both sides' streams, and the noise levels times sigma, the
// negative ones behind the positive. Words lie along a row, so that four of them are one load; rows are four words
// longer than a segment, so that the loads of eight rows meet all banks.
constexpr int kSegmentWords = 96;  // so that warps with fewer pulses seldom wait for the others
constexpr int kRowWords = kSegmentWords + 4;

template <int rows>
struct Segment {
  uint32_t bits[rows][kRowWords], neg[rows][kRowWords];
};

struct Shared {
  Segment<kLongLanes> longer;
  Segment<kShortRows> shorter;
  float levels[2 * kNoiseLevels];
  float roots[33];  // of 0, 1, ...; behind the levels, by whose address they are found
};

// Stored words [row0, row0 + words) of the elements from `first` on, zero beyond `elements` and up to a multiple of
// four words; signs are turned by `flip`.
template <int rows>
__device__ __forceinline__ void copy_stored(const uint32_t* bits, const uint32_t* neg, int64_t row0, int words,
                                            int elements, int first, uint32_t flip, Segment<rows>& to) {
  constexpr int together = kCellThreads / rows;
  const int lane = int(threadIdx.x) % rows, word0 = int(threadIdx.x) / rows;
  const bool inside = first + lane < elements;
  int64_t at = (row0 + word0) * elements + first + lane;
#pragma unroll 1
  for (int word = word0; word < ((words + 3) & ~3); word += together, at += together * int64_t(elements)) {
    const bool stored = inside && word < words;
    to.bits[lane][word] = stored ? bits[at] : 0u;
    to.neg[lane][word] = stored ? neg[at] ^ flip : 0u;
  }
}

// Which of up to 32 words hold a coincidence: bit 31 is the first word.
__device__ __forceinline__ uint32_t hits(const uint32_t* s, const uint32_t* l, int words) {
  uint32_t found = 0;
#pragma unroll 4
  for (int i = 0; i < words; i += 4) {
    const uint4 a = *reinterpret_cast<const uint4*>(s + i), b = *reinterpret_cast<const uint4*>(l + i);
    const uint32_t four =
        ((a.x & b.x) ? 8u : 0u) | ((a.y & b.y) ? 4u : 0u) | ((a.z & b.z) ? 2u : 0u) | ((a.w & b.w) ? 1u : 0u);
    found |= four << (28 - i);
  }
  return found;
}

// Addresses in shared memory as 32-bit numbers, which the loop over pulses keeps instead of making them anew.
template <class T>
__device__ __forceinline__ uint32_t shared_address(const T* p) {
  uint32_t at = uint32_t(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(at));
  return at;
}

// If m is used up: the next word with a coincidence, m = s & l and up = the signs; m stays 0 where none is left.
// Written out so that lanes that need no word pass by without a branch.
__device__ __forceinline__ void fetch(uint32_t s, uint32_t l, uint32_t& found, uint32_t& m, uint32_t& up) {
  asm volatile(
      "{\n"
      "  .reg .pred q;\n"
      "  .reg .b32 i, t, a, b;\n"
      "  setp.eq.u32 q, %1, 0;\n"
      "  setp.ne.and.u32 q, %0, 0, q;\n"
      "  bfind.shiftamt.u32 i, %0;\n"
      "  shr.u32 t, 0x80000000, i;\n"
      "  @q xor.b32 %0, %0, t;\n"
      "  mad.lo.u32 a, i, 4, %3;\n"
      "  mad.lo.u32 b, i, 4, %4;\n"
      "  @q ld.shared.u32 i, [a];\n"
      "  @q ld.shared.u32 t, [b];\n"
      "  @q and.b32 %1, i, t;\n"
      "  @q ld.shared.u32 i, [a + %5];\n"
      "  @q ld.shared.u32 t, [b + %6];\n"
      "  @q xor.b32 %2, i, t;\n"
      "}"
      : "+r"(found), "+r"(m), "+r"(up)
      : "r"(s), "r"(l), "n"(int(sizeof(uint32_t)) * kShortRows * kRowWords),
        "n"(int(sizeof(uint32_t)) * kLongLanes * kRowWords)
      : "memory");
}

// levels[state >> 19]: the sign and the level of PulseNoise.
__device__ __forceinline__ float level_of(uint32_t levels, uint32_t state) {
  float level;
  asm volatile(
      "{\n"
      "  .reg .b32 i;\n"
      "  mul.hi.u32 i, %1, 8192;\n"
      "  mad.lo.u32 i, i, 4, %2;\n"
      "  ld.shared.f32 %0, [i];\n"
      "}"
      : "=f"(level)
      : "r"(state), "r"(levels));
  return level;
}

__device__ __forceinline__ float root_of(uint32_t levels, uint32_t n) {
  float root;
  asm volatile(
      "{\n"
      "  .reg .b32 i;\n"
      "  mad.lo.u32 i, %1, 4, %2;\n"
      "  ld.shared.f32 %0, [i + %3];\n"
      "}"
      : "=f"(root)
      : "r"(n), "r"(levels), "n"(int(offsetof(Shared, roots) - offsetof(Shared, levels))));
  return root;
}

// What a thread keeps of its cell between pulses. Of a pair, `minus` and `minus_cell` are the second.
struct Run {
  Cell cell, minus_cell;
  float w, minus;
  PulseNoise random;
  float cut;  // of a block
  uint32_t pulses;
};

// The pulse at the lowest bit of m, which is taken off.
template <class Device, bool loses, int how>
__device__ __forceinline__ void one_pulse(const DeviceParams& device, uint32_t levels, uint32_t& m, uint32_t up,
                                          Run& run) {
  const uint32_t less = plus(m, 0xffffffffu);
  const bool upwards = (up & m & ~less) != 0, on_minus = how == kPair && !upwards;
  m &= less;
  run.random.state = advance(run.random.state, run.random.increment);
  const float xi = level_of(levels, run.random.state);
  float over = 0.0f;
  const float next = pulse<Device>(device, on_minus ? run.minus_cell : run.cell, on_minus ? run.minus : run.w,
                                   how == kPair || upwards, xi, over);
  (on_minus ? run.minus : run.w) = next;
  if (loses) run.cut += over;
  run.pulses = plus(run.pulses, 1);
}

// Up to 32 words of both sides, pulse by pulse. A lane walks its own words: only the number of pulses, not where they
// lie, makes lanes wait for each other. `dense`: a word has many pulses, and looking for the next one less often pays.
template <class Device, bool loses, int how>
__device__ __forceinline__ void walk_pulses(const DeviceParams& device, const uint32_t* short_words,
                                            const uint32_t* long_words, int words, bool dense, uint32_t levels,
                                            Run& run) {
  const uint32_t s = shared_address(short_words), l = shared_address(long_words);
  uint32_t found = hits(short_words, long_words, words), m = 0, up = 0;
  if (dense) {
    while (true) {
      fetch(s, l, found, m, up);
      if (m == 0) break;
      one_pulse<Device, loses, how>(device, levels, m, up, run);
      if (m != 0) one_pulse<Device, loses, how>(device, levels, m, up, run);
    }
  } else {
    while (true) {
      fetch(s, l, found, m, up);
      if (m == 0) break;
      one_pulse<Device, loses, how>(device, levels, m, up, run);
    }
  }
}

// The coincidences m of one sample, none or some, as a burst. `down` of a pair is the second cell's way up.
template <class Device, bool loses, int how>
__device__ __forceinline__ void one_burst(const DeviceParams& device, const Burst& up, const Burst& down, uint32_t m,
                                          uint32_t signs, uint32_t levels, Run& run) {
  const uint32_t n = uint32_t(__popc(m));
  const bool upwards = (signs & m) != 0, on_minus = how == kPair && !upwards;
  const float many = from_bits(plus(n, 0x4b000000u)) - 8388608.0f;
  const Burst way{upwards ? up.s : down.s, upwards ? up.h : down.h, upwards ? up.mean : down.mean,
                  upwards ? up.shake : down.shake, upwards ? up.most : down.most};
  const Cell& cell = on_minus ? run.minus_cell : run.cell;
  float& w = on_minus ? run.minus : run.w;
  run.pulses = plus(run.pulses, n);
  if (many > way.most) {  // a large burst
#pragma unroll 1
    for (uint32_t i = 0; i < n; ++i) {
      run.random.state = advance(run.random.state, run.random.increment);
      float over = 0.0f;
      w = pulse<Device>(device, cell, w, how == kPair || upwards, level_of(levels, run.random.state), over);
      if (loses) run.cut += over;
    }
    return;
  }
  const uint32_t next = advance(run.random.state, run.random.increment);
  const float eta = level_of(levels, next) * root_of(levels, n);
  float over = 0.0f;
  const float moved = burst<Device>(device, cell, way, w, many, eta, over);
  if (n != 0) {
    run.random.state = next;
    w = moved;
    if (loses) run.cut += over;
  }
}

// The samples of words in which most samples have a coincidence: all of them, without a search.
template <class Device, bool loses, int how>
__device__ __forceinline__ void all_bursts(const DeviceParams& device, const Burst& up, const Burst& down,
                                           const uint32_t* short_bits, const uint32_t* short_neg,
                                           const uint32_t* long_bits, const uint32_t* long_neg, int words, int width,
                                           uint32_t levels, Run& run) {
  const uint32_t slots = 0xffffffffu >> (32 - width);
#pragma unroll 1
  for (int i = 0; i < words; i += 4) {  // words beyond are zero
    const auto four = [i](const uint32_t* v) { return *reinterpret_cast<const uint4*>(v + i); };
    const uint4 a = four(short_bits), b = four(long_bits), c = four(short_neg), d = four(long_neg);
    const uint32_t m[4] = {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w},
                   signs[4] = {c.x ^ d.x, c.y ^ d.y, c.z ^ d.z, c.w ^ d.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll 1
      for (uint32_t own = slots; own != 0; own = width < 32 ? own << width : 0)
        one_burst<Device, loses, how>(device, up, down, m[k] & own, signs[k], levels, run);
    }
  }
}

// Up to 32 words of both sides, sample by sample of those that have a coincidence.
template <class Device, bool loses, int how>
__device__ __forceinline__ void walk_bursts(const DeviceParams& device, const Burst& up, const Burst& down,
                                            const uint32_t* short_words, const uint32_t* long_words, int words,
                                            int width, uint32_t levels, Run& run) {
  const uint32_t s = shared_address(short_words), l = shared_address(long_words), slots = 0xffffffffu >> (32 - width);
  uint32_t found = hits(short_words, long_words, words), m = 0, signs = 0;
  while (true) {
    fetch(s, l, found, m, signs);
    if (m == 0) break;
    const uint32_t own = m & (slots << ((__ffs(int(m)) - 1) & ~(width - 1)));
    m ^= own;
    one_burst<Device, loses, how>(device, up, down, own, signs, levels, run);
  }
}

// Samples of at most so many slots seldom have a coincidence each.
constexpr int kSparseSlots = 4;

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
  const int last = p.begin[round + 1];
  for (int block = p.begin[round]; block < last; ++block) {
    const int words = p.words[block], width = p.widths[block];
    const bool dense = 4 * words >= p.samples;
    const uint32_t before = run.pulses;
    run.cut = 0.0f;  // rounded once a block, as on the CPU
    run.random = PulseNoise{};
    if (noisy && words > 0) run.random = pulse_noise(key, index, p.first_block + uint32_t(block), step, c3);
    Burst up{}, down{};
    if (bursts && width > 1) {
      up = burst_of<Device>(device, run.cell, true);
      down = burst_of<Device>(device, how == kPair ? run.minus_cell : run.cell, how == kPair);
    }
    for (int begin = 0; begin < words; begin += kSegmentWords) {
      const int many = min(words - begin, kSegmentWords);
      __syncthreads();  // the segment before is done with
      const int64_t row0 = p.place[block] + begin;
      copy_stored(along_columns ? p.d_bits : p.x_bits, along_columns ? p.d_neg : p.x_neg, row0, many, shorter, short0,
                  flip, shared.shorter);
      copy_stored(along_columns ? p.x_bits : p.d_bits, along_columns ? p.x_neg : p.d_neg, row0, many, longer, long0, 0,
                  shared.longer);
      __syncthreads();
      if (!live) continue;
      if (bursts && width > kSparseSlots) {
        all_bursts<Device, loses, how>(device, up, down, shared.shorter.bits[row], shared.shorter.neg[row],
                                       shared.longer.bits[mine], shared.longer.neg[mine], many, min(width, 32), levels,
                                       run);
        continue;
      }
      for (int group = 0; group < many; group += 32) {
        const uint32_t *short_words = &shared.shorter.bits[row][group], *long_words = &shared.longer.bits[mine][group];
        const int here = min(many - group, 32);
        if (bursts && width > 1) {
          walk_bursts<Device, loses, how>(device, up, down, short_words, long_words, here, width, levels, run);
        } else {
          walk_pulses<Device, loses, how>(device, short_words, long_words, here, dense && !bursts, levels, run);
        }
      }
    }
    if (loses) lost += int64_t(double(run.cut) * kFixedPoint + 0.5);
    if (how == kNoisy && run.pulses != before) last_touch = p.first_block + uint32_t(block);
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
  if (predicate.jobs && !any_fires(predicate, count)) return;
  if (threadIdx.x < 33) shared.roots[threadIdx.x] = sqrt_(float(threadIdx.x));
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
  p.block_words = p.form == kCounted ? p.samples : block_words(pulse);
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
      const unsigned word_grid = unsigned(set.word_blocks < most_words ? set.word_blocks : most_words);
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
