#include "pulses.cuh"

namespace lrtt::cuda {

void reserve(DevicePulse& p, Arena& arena, Arena& streams, bool both) {
  const int64_t m = p.job.m, n = p.job.n, words = int64_t(p.blocks) * p.block_words;
  p.along_columns = n >= m;
  p.fused = !both;
  p.maxima = arena.take<uint32_t>(p.transfer ? 0 : size_t(p.job.samples) * 2);
  p.trains = arena.take<Train>(size_t(p.blocks) * kBlockSamples);
  p.rows = arena.take<int>(p.transfer ? size_t(p.blocks) * kBlockSamples : 0);
  p.offsets = arena.take<int>(size_t(p.blocks) * (kBlockSamples + 1));
  p.words = arena.take<int>(size_t(p.blocks));
  const bool store_x = both || !p.along_columns, store_d = both || p.along_columns;
  p.x_bits = streams.take<uint32_t>(store_x ? size_t(words * n) : 0);
  p.x_neg = streams.take<uint32_t>(store_x ? size_t(words * n) : 0);
  p.d_bits = streams.take<uint32_t>(store_d ? size_t(words * m) : 0);
  p.d_neg = streams.take<uint32_t>(store_d ? size_t(words * m) : 0);
}

namespace {

constexpr int kCellBlocks = 2;  // resident on a multiprocessor
constexpr int kWordThreads = 128;

__host__ __device__ __forceinline__ int64_t groups_of(int64_t elements) { return (elements + 3) / 4; }

// The trains of one block of samples as a stream sees them.
struct BlockView {
  const Train* trains;
  const int* rows;  // null: row s is sample s
  const int* offsets;
  int samples;
  int64_t first_sample;  // random counter of sample 0
  int64_t first_row;     // operand row of sample 0 where rows is null
};

// The slots in which elements 4*group .. 4*group+3 of sample s fire, and the signs of the elements.
__device__ __forceinline__ void fire(const Operand& v, int elements, bool is_x, const BlockView& block, int s, const Train& t,
                                     int group, uint64_t key, uint32_t step, uint32_t c3, uint32_t (&fired)[4],
                                     uint32_t (&sign)[4]) {
  const float scale = is_x ? t.sx : t.sd;
  const int64_t row = block.rows ? block.rows[s] : block.first_row + s;
  const int64_t at = row * v.ss + int64_t(4 * group) * v.es;
  float value[4];
  load4(v, at, elements - 4 * group, value);
  Threshold limit[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    limit[k] = threshold(abs_(value[k]) * scale);
    sign[k] = 0u - (to_bits(value[k]) >> 31);
    fired[k] = 0;
  }
  const uint32_t c1 = uint32_t(block.first_sample + s) * 64u;
  const uint32_t slots = 0xffffffffu >> (32 - t.bl);
  if (t.bl <= kDirectSlots) {
    for (int slot = 0; slot < t.bl; ++slot) {
      const Words r = philox(key, uint32_t(group), c1 + uint32_t(slot), step, c3);
#pragma unroll
      for (int k = 0; k < 4; ++k) fired[k] |= (r.w[k] < limit[k].bits ? 1u : 0u) << slot;
    }
  } else {
    uint32_t undecided[4] = {slots, slots, slots, slots};
    for (uint32_t plane = 0; plane < 32; ++plane) {
      const Words r = philox(key, uint32_t(group), c1 + plane, step, c3);
      uint32_t open = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        bernoulli_plane(plane, r.w[k], limit[k].bits, undecided[k], fired[k]);
        open |= undecided[k];
      }
      if (open == 0) break;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) fired[k] = (fired[k] | limit[k].always) & slots;
}

// The first sample that ends after slot `low`.
__device__ __forceinline__ int first_reaching(const BlockView& block, int low) {
  int begin = 0;
  for (int end = block.samples; begin < end;) {
    const int middle = (begin + end) / 2;
    if (block.offsets[middle + 1] > low) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

__device__ __forceinline__ BlockView view(const DevicePulse& p, int block) {
  const int64_t left = p.job.samples - int64_t(block) * kBlockSamples;
  return BlockView{p.trains + int64_t(block) * kBlockSamples,
                   p.transfer ? p.rows + int64_t(block) * kBlockSamples : nullptr,
                   p.offsets + int64_t(block) * (kBlockSamples + 1),
                   int(left < kBlockSamples ? left : kBlockSamples),
                   p.job.first_sample + int64_t(block) * kBlockSamples,
                   int64_t(block) * kBlockSamples};
}

__device__ __forceinline__ void or_bits(uint32_t* bits, uint32_t* neg, uint32_t fired, uint32_t sign) {
  if (!fired) return;
  atomicOr(bits, fired);
  if (sign) atomicOr(neg, fired);
}

// An update stores the bits of its shorter side: a task is four elements of one sample, or-ed into words that the planning
// has cleared.
__global__ void __launch_bounds__(kWordThreads) make_short_streams(const DevicePulse* table, int count) {
  const DevicePulse& p = find_job(table, count, int64_t(blockIdx.x), &DevicePulse::first_word_block);
  const bool is_x = !p.along_columns;
  const int elements = is_x ? p.job.n : p.job.m, groups = int(groups_of(elements));
  const int64_t task = (int64_t(blockIdx.x) - p.first_word_block) * kWordThreads + threadIdx.x;
  const int group = int(task % groups);
  const int64_t sample = task / groups;
  if (sample >= p.job.samples) return;
  const int block = int(sample / kBlockSamples), s = int(sample % kBlockSamples);
  const BlockView samples = view(p, block);
  const Train t = samples.trains[s];
  if (t.bl == 0) return;
  uint32_t fired[4], sign[4];
  fire(is_x ? p.job.x : p.job.d, elements, is_x, samples, s, t, group, uint64_t(p.job.state[kKey]),
       uint32_t(p.job.state[kStep]), counter3(is_x ? kBitX : kBitD, uint32_t(p.job.array), 0), fired, sign);
  const int shift = samples.offsets[s];
  const int64_t at = (int64_t(block) * p.block_words + shift / 32) * elements + 4 * group;
  uint32_t* bits = is_x ? p.x_bits : p.d_bits;
  uint32_t* neg = is_x ? p.x_neg : p.d_neg;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * group + k >= elements) break;
    const uint64_t f = uint64_t(fired[k]) << (shift & 31);
    or_bits(bits + at + k, neg + at + k, uint32_t(f), sign[k]);
    or_bits(bits + at + elements + k, neg + at + elements + k, uint32_t(f >> 32), sign[k]);
  }
}

// A transfer stores both sides: a task is a word of four consecutive elements of one side.
__global__ void __launch_bounds__(kWordThreads) make_both_streams(const DevicePulse* table, int count, Predicate predicate) {
  const DevicePulse& p = find_job(table, count, int64_t(blockIdx.x), &DevicePulse::first_word_block);
  if (!fires(predicate.jobs[&p - table], predicate.force)) return;
  const int64_t x_groups = groups_of(p.job.n), groups = x_groups + groups_of(p.job.m);
  const int64_t task = (int64_t(blockIdx.x) - p.first_word_block) * kWordThreads + threadIdx.x;
  const int64_t slot = task / groups;  // block and word
  const int block = int(slot / p.block_words), word = int(slot % p.block_words);
  if (block >= p.blocks || word >= p.words[block]) return;
  int64_t group = task % groups;
  const bool is_x = group < x_groups;
  if (!is_x) group -= x_groups;
  const int elements = is_x ? p.job.n : p.job.m;
  const BlockView samples = view(p, block);
  const uint64_t key = uint64_t(p.job.state[kKey]);
  const uint32_t step = uint32_t(p.job.state[kStep]), c3 = counter3(is_x ? kBitX : kBitD, uint32_t(p.job.array), 0);
  uint32_t bits[4] = {}, neg[4] = {};
  for (int s = first_reaching(samples, word * 32); s < samples.samples; ++s) {
    const int shift = samples.offsets[s] - word * 32;
    if (shift >= 32) break;
    const Train t = samples.trains[s];
    if (t.bl == 0) continue;
    uint32_t fired[4], sign[4];
    fire(is_x ? p.job.x : p.job.d, elements, is_x, samples, s, t, int(group), key, step, c3, fired, sign);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t f = shift >= 0 ? fired[k] << shift : fired[k] >> -shift;
      bits[k] |= f;
      neg[k] |= f & sign[k];
    }
  }
  const int64_t at = (int64_t(block) * p.block_words + word) * elements + 4 * group;
  uint32_t* to_bits_ = is_x ? p.x_bits : p.d_bits;
  uint32_t* to_neg = is_x ? p.x_neg : p.d_neg;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * group + k < elements) {
      to_bits_[at + k] = bits[k];
      to_neg[at + k] = neg[k];
    }
  }
}

// A segment of both sides' streams, for the cells of one thread block.
struct Segment {
  uint32_t long_bits[kSegmentWords][kLongLanes], long_neg[kSegmentWords][kLongLanes];
  uint32_t short_bits[kSegmentWords][kShortRows], short_neg[kSegmentWords][kShortRows];
};

// Makes the longer side's words [begin, begin + words) by all threads, a task being four elements of one sample. Bits are
// or-ed in, so the order of the threads does not matter.
__device__ __forceinline__ void make_long(const PulseJob& job, const Operand& v, int elements, bool is_x,
                                          const BlockView& block, int begin, int words, int long0, uint64_t key,
                                          uint32_t step, Segment& out) {
  constexpr int groups = kLongLanes / 4;
  for (int i = threadIdx.x; i < words * kLongLanes; i += kCellThreads) {
    (&out.long_bits[0][0])[i] = 0;
    (&out.long_neg[0][0])[i] = 0;
  }
  __syncthreads();
  const int low = begin * 32, high = low + words * 32;
  const int first = first_reaching(block, low);
  const uint32_t c3 = counter3(is_x ? kBitX : kBitD, uint32_t(job.array), 0);
  const int group = threadIdx.x % groups;
  for (int s = first + int(threadIdx.x) / groups; s < block.samples; s += kCellThreads / groups) {
    const int shift = block.offsets[s] - low;  // negative where the sample began in the segment before
    if (shift >= high - low) break;            // offsets ascend
    const Train t = block.trains[s];
    if (t.bl == 0) continue;
    uint32_t fired[4], sign[4];
    fire(v, elements, is_x, block, s, t, long0 / 4 + group, key, step, c3, fired, sign);
    const int word = shift >= 0 ? shift / 32 : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t f = shift >= 0 ? uint64_t(fired[k]) << (shift & 31) : uint64_t(fired[k] >> -shift);
      const int lane = 4 * group + k;
      or_bits(&out.long_bits[word][lane], &out.long_neg[word][lane], uint32_t(f), sign[k]);
      if (word + 1 < words)
        or_bits(&out.long_bits[word + 1][lane], &out.long_neg[word + 1][lane], uint32_t(f >> 32), sign[k]);
    }
  }
}

// Copies `words` rows of `width` stored elements from `first` on, zero beyond `elements`.
template <int width>
__device__ __forceinline__ void copy_stored(const uint32_t* bits, const uint32_t* neg, int64_t row0, int words, int elements,
                                            int first, uint32_t (*to_bits_)[width], uint32_t (*to_neg)[width]) {
  for (int i = threadIdx.x; i < words * width; i += kCellThreads) {
    const int word = i / width, lane = i % width;
    const bool inside = first + lane < elements;
    const int64_t at = (row0 + word) * elements + first + lane;
    to_bits_[word][lane] = inside ? bits[at] : 0u;
    to_neg[word][lane] = inside ? neg[at] : 0u;
  }
}

template <class Device>
__device__ void run_cells(const DevicePulse& p, Segment& segment, const float* levels) {
  const PulseJob& job = p.job;
  const DeviceParams& device = job.device;
  const int longer = p.along_columns ? job.n : job.m, shorter = p.along_columns ? job.m : job.n;
  const int long_blocks = (longer + kLongLanes - 1) / kLongLanes;
  const int tile_block = int(int64_t(blockIdx.x) - p.first_cell_block);
  const int long0 = tile_block % long_blocks * kLongLanes, short0 = tile_block / long_blocks * kShortRows;
  const int mine = int(threadIdx.x % kLongLanes), row = int(threadIdx.x / kLongLanes);
  const bool live = long0 + mine < longer && short0 + row < shorter;
  const uint64_t key = uint64_t(job.state[kKey]);
  const uint32_t step = uint32_t(job.state[kStep]), c3 = counter3(kNoise, uint32_t(job.array), 0);
  const uint32_t flip = (p.transfer ? p.eta_sign : *job.eta) < 0.0f ? 0xffffffffu : 0u;
  const float sigma = device.dw_min_std;

  const uint32_t index = p.along_columns ? uint32_t(short0 + row) * uint32_t(job.n) + uint32_t(long0 + mine)
                                         : uint32_t(long0 + mine) * uint32_t(job.n) + uint32_t(short0 + row);
  Cell cell{};
  float w = 0.0f;
  uint32_t pulses = 0;
  int64_t lost = 0;
  if (live) {
    cell = draw_cell<Device>(device, key, uint32_t(job.array), index);
    w = job.w[index];
  }
  for (int block = 0; block < p.blocks; ++block) {
    const int words = p.words[block];
    const int64_t base = int64_t(block) * p.block_words;
    float cut = 0.0f;  // rounded once a block, as on the CPU
    for (int begin = 0; begin < words; begin += kSegmentWords) {
      const int many = words - begin < kSegmentWords ? words - begin : kSegmentWords;
      __syncthreads();  // the segment before is done with
      copy_stored<kShortRows>(p.along_columns ? p.d_bits : p.x_bits, p.along_columns ? p.d_neg : p.x_neg, base + begin, many,
                              shorter, short0, segment.short_bits, segment.short_neg);
      if (p.fused) {
        make_long(job, p.along_columns ? job.x : job.d, longer, p.along_columns, view(p, block), begin, many, long0, key, step,
                  segment);
      } else {
        copy_stored<kLongLanes>(p.along_columns ? p.x_bits : p.d_bits, p.along_columns ? p.x_neg : p.d_neg, base + begin,
                                many, longer, long0, segment.long_bits, segment.long_neg);
      }
      __syncthreads();
      const uint32_t c1 = segment_counter(job.first_sample + int64_t(block) * kBlockSamples, begin);
      // A lane walks its own words: only the number of pulses, not where they lie, makes lanes wait for each other.
      Words random{};
      uint32_t m = 0, up = 0;
      int word = live ? 0 : many;
      for (uint32_t n = 0;; ++n) {
        while (m == 0 && word < many) {
          m = segment.short_bits[word][row] & segment.long_bits[word][mine];
          if (m != 0) up = segment.short_neg[word][row] ^ segment.long_neg[word][mine] ^ flip;
          ++word;
        }
        if (m == 0) break;
        const uint32_t rest = m & (m - 1);
        float xi = 0.0f;
        if (sigma > 0.0f) {
          if ((n & 7) == 0) random = philox(key, index, c1 + n / 8, step, c3);
          const uint32_t low = (n & 2) ? random.w[1] : random.w[0], high = (n & 2) ? random.w[3] : random.w[2];
          xi = sigma * noise(levels, noise_bits((n & 4) ? high : low, n));
        }
        w = pulse<Device>(device, cell, w, (up & (m ^ rest)) != 0, xi, cut);
        m = rest;
        ++pulses;
      }
    }
    lost += int64_t(double(cut) * kFixedPoint + 0.5);
  }
  if (live) job.w[index] = w;
  const int64_t all_pulses = warp_sum(int64_t(pulses)), all_lost = warp_sum(lost);
  if (threadIdx.x % 32 == 0) {
    if (all_pulses) add(job.counts + k_pulses_a + job.array, all_pulses);
    if (all_lost && job.array == kC) add(job.counts + k_lost, all_lost);
  }
}

__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    apply_pulses(const DevicePulse* table, int count, Predicate predicate) {
  __shared__ Segment segment;
  __shared__ float levels[kNoiseLevels];
  const DevicePulse& p = find_job(table, count, int64_t(blockIdx.x), &DevicePulse::first_cell_block);
  if (predicate.jobs && !fires(predicate.jobs[&p - table], predicate.force)) return;
  if (p.job.device.dw_min_std > 0.0f) {
    for (int i = threadIdx.x; i < kNoiseLevels; i += kCellThreads) levels[i] = noise_level(uint32_t(i));
    __syncthreads();
  }
  with_device(int(p.job.device.kind), [&](auto device) { run_cells<decltype(device)>(p, segment, levels); });
}

}  // namespace

int64_t word_blocks(const DevicePulse& p) {
  if (p.fused) return blocks_of(groups_of(p.along_columns ? p.job.m : p.job.n) * p.job.samples, kWordThreads);
  return blocks_of((groups_of(p.job.n) + groups_of(p.job.m)) * p.blocks * p.block_words, kWordThreads);
}

int64_t cell_blocks(const DevicePulse& p) {
  const int longer = p.along_columns ? p.job.n : p.job.m, shorter = p.along_columns ? p.job.m : p.job.n;
  return blocks_of(longer, kLongLanes) * blocks_of(shorter, kShortRows);
}

void launch_streams_and_cells(const DevicePulse* table, int count, int64_t word_grid, int64_t cell_grid,
                              Predicate predicate, cudaStream_t stream) {
  if (count == 0) return;
  if (word_grid > 0x7fffffff || cell_grid > 0x7fffffff)
    throw std::runtime_error("lightning_lrtt: a pulsed update must fit 2^31 thread blocks; split the batch");
  if (predicate.jobs) {
    make_both_streams<<<unsigned(word_grid), kWordThreads, 0, stream>>>(table, count, predicate);
  } else {
    make_short_streams<<<unsigned(word_grid), kWordThreads, 0, stream>>>(table, count);
  }
  apply_pulses<<<unsigned(cell_grid), kCellThreads, 0, stream>>>(table, count, predicate);
  check(cudaGetLastError(), "pulse kernels");
}

}  // namespace lrtt::cuda
