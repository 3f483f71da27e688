#include "pulses.cuh"

#include <type_traits>

namespace lrtt::cuda {

namespace {

// Scratch for the streams of one round.
constexpr size_t kStreamBytes = size_t(64) << 20;

// The trains of one block of samples as a stream sees them.
struct BlockView {
  const Planned* trains;
  const int* rows;  // null: row s is sample s
  int samples;
  int64_t first_sample;  // random counter of sample 0
  int64_t first_row;     // operand row of sample 0 where rows is null
  __device__ __forceinline__ int64_t row(int s) const { return rows ? rows[s] : first_row + s; }
};

__device__ __forceinline__ BlockView view(const DevicePulse& p, int block, int size) {
  const int64_t first = int64_t(block) * size, left = p.job.samples - first;
  return BlockView{p.trains + first, p.transfer ? p.rows + first : nullptr, int(left < size ? left : size),
                   p.job.first_sample + first, first};
}

// How the four elements of a group are read: one vector load a sample, or one by one (any strides, rows by index).
enum Access { kVectorFloat, kVectorBFloat16, kScattered };

__device__ __forceinline__ Access access(const Operand& v, int elements, const int* rows) {
  const int size = v.type == kFloat32 ? 4 : 2;
  const bool whole = rows == nullptr && elements % 4 == 0 && v.es == 1 && v.type != kFloat16 && v.ss % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(v.p) % (4 * size) == 0;
  return !whole ? kScattered : v.type == kFloat32 ? kVectorFloat : kVectorBFloat16;
}

// The operand's four elements of one sample. `read` gives them as they lie in memory, so that a load is not waited for
// before its use; `decode` makes float bits of them.
template <Access kind>
struct Reader {
  const char* at;  // sample 0
  int64_t stride;  // bytes from sample to sample
  __device__ __forceinline__ Reader(const Operand& v, int, int group, const BlockView& block) {
    constexpr int size = kind == kVectorFloat ? 4 : 2;
    stride = v.ss * size;
    at = static_cast<const char*>(v.p) + block.first_row * stride + int64_t(4 * group) * size;
  }
  __device__ __forceinline__ uint4 read(int s) const {
    if (kind == kVectorFloat) return __ldg(reinterpret_cast<const uint4*>(at + s * stride));
    const uint2 f = __ldg(reinterpret_cast<const uint2*>(at + s * stride));
    return make_uint4(f.x, f.y, 0u, 0u);
  }
  __device__ __forceinline__ static uint4 decode(const uint4& raw) {
    if (kind == kVectorFloat) return raw;
    return make_uint4(raw.x << 16, raw.x & 0xffff0000u, raw.y << 16, raw.y & 0xffff0000u);
  }
};

template <>
struct Reader<kScattered> {
  const Operand& v;
  int elements, group;
  const BlockView& block;
  __device__ __forceinline__ Reader(const Operand& operand, int n, int g, const BlockView& b)
      : v(operand), elements(n), group(g), block(b) {}
  __device__ __forceinline__ uint4 read(int s) const {
    const int64_t row = block.row(s);
    uint32_t value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      value[k] = 4 * group + k < elements ? to_bits(load(v, row * v.ss + int64_t(4 * group + k) * v.es)) : 0u;
    return make_uint4(value[0], value[1], value[2], value[3]);
  }
  __device__ __forceinline__ static uint4 decode(const uint4& raw) { return raw; }
};

// One side of an outer product, and the constants of its random numbers.
struct Side {
  bool is_x;
  uint64_t key;
  uint32_t step, c3;
  const PulseJob& job;
  __device__ __forceinline__ Side(const PulseJob& j, bool x)
      : is_x(x),
        key(uint64_t(j.state[kKey])),
        step(uint32_t(j.state[kStep])),
        c3(counter3(x ? kBitX : kBitD, uint32_t(j.array), 0)),
        job(j) {}
};

// An integer operation on a GPU goes through a pipe of half the width of that of multiplications, and these kernels are
// made of integer operations: what can be a multiplication is written as one, in PTX where the compiler would turn it
// back.
__device__ __forceinline__ void add_where_below(uint32_t& sum, uint32_t term, uint32_t a, uint32_t b) {
  asm("{\n  .reg .pred q;\n  setp.lt.u32 q, %2, %3;\n  @q mad.lo.u32 %0, %1, 1, %0;\n}"
      : "+r"(sum)
      : "r"(term), "r"(a), "r"(b));
}

__device__ __forceinline__ void add_product_of(uint32_t& sum, uint32_t a, uint32_t b) {
  asm("mad.lo.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
}

__device__ __forceinline__ uint32_t plus(uint32_t a, uint32_t b) {
  asm("mad.lo.u32 %0, %0, 1, %1;" : "+r"(a) : "r"(b));
  return a;
}

// The uppermost bit in all places.
__device__ __forceinline__ uint32_t spread_sign(uint32_t v) {
  uint32_t all;
  asm("mul.hi.s32 %0, %1, 1;" : "=r"(all) : "r"(v));
  return all;
}

__device__ __forceinline__ uint32_t upper_bit(uint32_t v) {
  uint32_t bit;
  asm("mul.hi.u32 %0, %1, 2;" : "=r"(bit) : "r"(v));
  return bit;
}

// Trains of up to kDirectSlots slots, one uniform each: those of the slots shift, shift + 1, ... that the word has.
__device__ __forceinline__ void fire_directly(const Side& side, const uint32_t (&element)[4], float scale, int bl,
                                              int shift, int group, uint32_t sample, uint32_t (&bits)[4],
                                              uint32_t (&neg)[4]) {
  uint32_t limit[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) limit[k] = threshold(fabsf(from_bits(element[k])) * scale);
  uint32_t sign[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sign[k] = upper_bit(element[k]);
#pragma unroll 1
  for (int slot = 0; slot < bl; ++slot) {
    const uint32_t place = uint32_t(shift + slot);
    if (place >= 32) continue;
    const Words r = philox(side.key, uint32_t(group), sample * 64u + uint32_t(slot), side.step, side.c3);
    const uint32_t mask = 1u << place;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      add_where_below(bits[k], mask, r.w[k], limit[k]);
      add_product_of(neg[k], mask, sign[k]);  // where nothing fires the sign is not looked at
    }
  }
}

// The slots in which the four elements of a group fire for one sample. `any` (Form kAnyBits): the 32 slots from 32 *
// piece on, of probabilities on a grid.
template <bool any>
__device__ __forceinline__ void fire(const Side& side, const uint32_t (&element)[4], float scale, int train, int group,
                                     uint32_t sample, int piece, uint32_t (&fired)[4]) {
  const uint32_t c1 = sample * 64u;
  Words grid{};
  if (any && side.job.pulse.sto_round)
    grid = philox(side.key, uint32_t(group), c1 + (side.is_x ? 0u : 1u), side.step,
                  counter3(kRound, uint32_t(side.job.array), 0));
  uint32_t limit[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float chance = abs_(from_bits(element[k])) * scale;
    if (any)
      chance = on_grid(chance, side.is_x ? side.job.pulse.x_res : side.job.pulse.d_res, side.job.pulse.sto_round != 0,
                       grid.w[k]);
    limit[k] = threshold(chance);
    fired[k] = 0;
  }
  const int bl = any ? min(train - 32 * piece, 32) : train;
  const uint32_t slots = 0xffffffffu >> (32 - bl), c3 = any ? side.c3 + uint32_t(piece) : side.c3;
  if (any && bl <= kDirectSlots) {
#pragma unroll 1
    for (int slot = 0; slot < bl; ++slot) {
      const Words r = philox(side.key, uint32_t(group), c1 + uint32_t(slot), side.step, c3);
#pragma unroll
      for (int k = 0; k < 4; ++k) fired[k] |= (r.w[k] < limit[k] ? 1u : 0u) << slot;
    }
  } else {
    uint32_t undecided[4] = {slots, slots, slots, slots};
#pragma unroll 1
    for (uint32_t plane = 0; plane < 32; ++plane) {
      const Words r = philox(side.key, uint32_t(group), c1 + plane, side.step, c3);
      uint32_t open = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // bernoulli_plane
        const uint32_t p = spread_sign(limit[k]);
        fired[k] = plus(fired[k], undecided[k] & p & ~r.w[k]);
        undecided[k] &= ~(p ^ r.w[k]);
        limit[k] *= 2;  // the next bit
        open |= undecided[k];
      }
      if (open == 0) break;
    }
  }
}

constexpr int kParts = 2;                 // threads that share the samples of a word
constexpr int kAhead = 2;                 // samples whose operands a thread loads at once
constexpr int kWarpGroups = 32 / kParts;  // groups of four elements of a warp's task

__host__ __device__ __forceinline__ uint32_t chunks_of(int64_t elements) {
  return uint32_t((groups_of(elements) + kWarpGroups - 1) / kWarpGroups);
}

__device__ __forceinline__ uint32_t or_parts(uint32_t v) {
#pragma unroll
  for (int lanes = kWarpGroups; lanes < 32; lanes *= 2) v |= __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Word `word` of a block's stream, for kWarpGroups groups of one side, by a warp: thread (part, group) takes every
// kParts-th sample from `first` on, which has the word's first slot.
template <Access kind, bool any>
__device__ __forceinline__ void make_word(const Operand& v, int elements, const BlockView& samples, const Side& side,
                                          int word, int first, int chunk, uint32_t* to_bits_, uint32_t* to_neg) {
  const int lane = int(threadIdx.x % 32), part = lane / kWarpGroups, group = chunk * kWarpGroups + lane % kWarpGroups;
  const int low = word * 32;
  const bool inside = 4 * group < elements;
  const Reader<kind> reader(v, elements, group, samples);
  uint32_t bits[4] = {}, neg[4] = {};
  for (int many = 32; many == 32; first += 32) {  // 32 trains at a time, one a lane
    Planned mine{0, 0.0f, 0.0f, low + 32};
    if (first + lane < samples.samples) mine = samples.trains[first + lane];
    many = __popc(__ballot_sync(0xffffffffu, mine.first < low + 32));
    const float my_scale = side.is_x ? mine.sx : mine.sd;
    const uint32_t my_slots = uint32_t(mine.bl) << 16 | uint32_t(mine.first);
#pragma unroll 1
    for (int i = part; i - part < many; i += kParts * kAhead) {
      uint4 raw[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (i + u * kParts < many && inside) raw[u] = reader.read(first + i + u * kParts);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = i + u * kParts;
        const float scale = __shfl_sync(0xffffffffu, my_scale, at);
        const uint32_t slots = __shfl_sync(0xffffffffu, my_slots, at);
        const int bl = int(slots >> 16);
        if (at >= many || !inside || bl == 0) continue;
        const uint4 value = Reader<kind>::decode(raw[u]);
        const uint32_t element[4] = {value.x, value.y, value.z, value.w};
        const uint32_t sample = uint32_t(samples.first_sample) + uint32_t(first + at);
        int shift = int(slots & 0xffffu) - low;
        if (!any && bl <= kDirectSlots) {
          fire_directly(side, element, scale, bl, shift, group, sample, bits, neg);
          continue;
        }
        int piece = any && shift < 0 ? -shift / 32 : 0;  // pieces that end before the word are passed over
        if (any) shift += 32 * piece;
        do {
          uint32_t fired[4];
          fire<any>(side, element, scale, bl, group, sample, piece, fired);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint32_t f = shift >= 0 ? fired[k] << shift : fired[k] >> -shift;
            bits[k] |= f;
            neg[k] |= f & (0u - (element[k] >> 31));
          }
          ++piece;
          shift += 32;
        } while (any && 32 * piece < bl && shift < 32);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t all_bits = or_parts(bits[k]), all_neg = or_parts(neg[k]);
    const int e = 4 * group + k;
    if (part == k % kParts && e < elements) {
      to_bits_[e] = all_bits;
      to_neg[e] = all_neg;
    }
  }
}

// A warp's task in a round: the stream row and the groups that its number names.
template <bool any>
__device__ __forceinline__ void make_words(const DevicePulse& p, uint32_t task, int round) {
  const uint32_t x_chunks = chunks_of(p.job.n), chunks = x_chunks + chunks_of(p.job.m);
  const int row = int(task / chunks), block = block_of_row(p, round, row);
  uint32_t chunk = task % chunks;
  const int word = row - p.place[block];
  if (word >= p.words[block]) return;
  const bool is_x = chunk < x_chunks;
  if (!is_x) chunk -= x_chunks;
  const int elements = is_x ? p.job.n : p.job.m;
  const BlockView samples = view(p, block, any ? p.samples : kBlockSamples);
  const Operand& v = is_x ? p.job.x : p.job.d;
  const Side side(p.job, is_x);
  const int first = p.starts[int64_t(block) * p.block_words + word];
  uint32_t* bits = (is_x ? p.x_bits : p.d_bits) + int64_t(row) * elements;
  uint32_t* neg = (is_x ? p.x_neg : p.d_neg) + int64_t(row) * elements;
  switch (access(v, elements, samples.rows)) {
    case kVectorFloat: make_word<kVectorFloat, any>(v, elements, samples, side, word, first, chunk, bits, neg); break;
    case kVectorBFloat16:
      make_word<kVectorBFloat16, any>(v, elements, samples, side, word, first, chunk, bits, neg);
      break;
    case kScattered: make_word<kScattered, any>(v, elements, samples, side, word, first, chunk, bits, neg); break;
  }
}

// Blocks of tasks that a job has in a round; the trains decide how much of the room for its streams is used.
__device__ __forceinline__ int64_t task_blocks(const DevicePulse& p, int round) {
  const int begin = p.begin[round], end = p.begin[round + 1];
  if (begin >= end) return 0;
  // Below 2^32: the streams of a round fit kStreamBytes.
  const uint32_t tasks = (chunks_of(p.job.n) + chunks_of(p.job.m)) * uint32_t(p.place[end - 1] + p.words[end - 1]);
  return (tasks + kWordThreads / 32 - 1) / (kWordThreads / 32);
}

// Resident blocks run through the tasks of all jobs: a launch that finds nothing to do must cost next to nothing.
template <bool any>
__global__ void __launch_bounds__(kWordThreads, any ? 4 : 5)
    make_streams(const DevicePulse* table, int count, int round, Predicate predicate) {
  if (predicate.jobs && !any_fires(predicate, count)) return;
  int64_t b = blockIdx.x;  // counted from the first task of the present job
  for (int i = 0; i < count; ++i) {
    const DevicePulse& p = table[i];
    if (predicate.jobs && !fires(predicate.jobs[i], predicate.force)) continue;
    const int64_t blocks = task_blocks(p, round);
    for (; b < blocks; b += gridDim.x) make_words<any>(p, uint32_t(b) * (kWordThreads / 32) + threadIdx.x / 32, round);
    b -= blocks;
  }
}

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

// All pulses of kCellThreads cells, block of samples by block of samples. `loses`: count what the bounds cut. `how`:
// Hold.
template <class Device, bool loses, int how>
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
  float w = live ? (how == kPlain ? job.w : job.cells)[index] + 0.0f : 0.0f, minus = 0.0f;
  uint32_t pulses = 0, last_touch = 0;
  int64_t lost = 0;
  Cell cell{}, minus_cell{};  // the second of a pair
  if (live) cell = draw_cell<Device>(device, id);
  if (how == kPair && live) {
    minus = job.cells[size + index] + 0.0f;
    minus_cell = draw_cell<Device>(device, minus_of(id));
  }
  const uint32_t levels = shared_address(shared.levels);
  const int last = p.begin[round + 1];
  for (int block = p.begin[round]; block < last; ++block) {
    const int words = p.words[block];
    const bool dense = 4 * words >= p.samples;
    const uint32_t before = pulses;
    float cut = 0.0f;  // rounded once a block, as on the CPU
    PulseNoise random{};
    if (noisy && words > 0) random = pulse_noise(key, index, p.first_block + uint32_t(block), step, c3);
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
      for (int group = 0; group < many; group += 32) {
        const uint32_t *short_words = &shared.shorter.bits[row][group], *long_words = &shared.longer.bits[mine][group];
        const uint32_t s = shared_address(short_words), l = shared_address(long_words);
        uint32_t found = hits(short_words, long_words, min(many - group, 32)), m = 0, up = 0;
        const auto one_pulse = [&] {
          const uint32_t less = plus(m, 0xffffffffu);
          const bool upwards = (up & m & ~less) != 0, on_minus = how == kPair && !upwards;
          m &= less;
          random.state = advance(random.state, random.increment);
          const float xi = level_of(levels, random.state);
          float over = 0.0f;
          const float next = pulse<Device>(device, on_minus ? minus_cell : cell, on_minus ? minus : w,
                                           how == kPair || upwards, xi, over);
          (on_minus ? minus : w) = next;
          if (loses) cut += over;
          pulses = plus(pulses, 1);
        };
        // A lane walks its own words: only the number of pulses, not where they lie, makes lanes wait for each other.
        if (dense) {  // long trains: a word has many pulses, and looking for the next one less often pays
          while (true) {
            fetch(s, l, found, m, up);
            if (m == 0) break;
            one_pulse();
            if (m != 0) one_pulse();
          }
        } else {
          while (true) {
            fetch(s, l, found, m, up);
            if (m == 0) break;
            one_pulse();
          }
        }
      }
    }
    if (loses) lost += int64_t(double(cut) * kFixedPoint + 0.5);
    if (how == kNoisy && pulses != before) last_touch = p.first_block + uint32_t(block);
  }
  if (how == kPlain) {
    if (live) job.w[index] = w;
  } else if (live && pulses) {
    job.cells[index] = w;
    if (how == kPair) job.cells[size + index] = minus;
    job.w[index] = how == kPair ? w - minus : shown(device, id, w, kByPulses, last_touch, step);
  }
  const int64_t all_pulses = warp_sum(int64_t(pulses));
  if (threadIdx.x % 32 == 0 && all_pulses) add(job.counts + k_pulses_a + job.array, all_pulses);
  if (loses) {
    const int64_t all_lost = warp_sum(lost);
    if (threadIdx.x % 32 == 0 && all_lost) add(job.counts + k_lost, all_lost);
  }
}

// One kernel a device model and Hold, so that each has the registers it needs. Resident blocks run through the cells of
// all jobs.
template <class Device, bool loses, int how>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    apply_pulses(const DevicePulse* table, int count, int64_t blocks, int round, const float* levels,
                 Predicate predicate) {
  extern __shared__ uint4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  if (predicate.jobs && !any_fires(predicate, count)) return;
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
    run_cells<Device, loses, how>(p, int(block - p.first_cell_block), round, shared);
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

// Blocks of the kernel that makes the streams of a round.
int64_t word_blocks(const DevicePulse& p) {
  if (p.form == kCounted) return blocks_of((groups_of(p.job.n) + groups_of(p.job.m)) * p.capacity, kWordThreads);
  return blocks_of((chunks_of(p.job.n) + chunks_of(p.job.m)) * int64_t(p.capacity), kWordThreads / 32);
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
    p.starts = arena.take<int>(p.form == kCounted ? 0 : size_t(p.blocks) * size_t(p.block_words));
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
      switch (jobs[size_t(set.first)].form) {
        case kShortBits:
          make_streams<false>
              <<<word_grid, kWordThreads, 0, stream>>>(table + set.first, set.count, round, from(set.first));
          break;
        case kAnyBits:
          make_streams<true>
              <<<word_grid, kWordThreads, 0, stream>>>(table + set.first, set.count, round, from(set.first));
          break;
        default: launch_values(table + set.first, set.count, word_grid, round, from(set.first), stream);
      }
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
          const auto launch = [&](auto loses, auto how) {
            const auto kernel = apply_pulses<Device, decltype(loses)::value, decltype(how)::value>;
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))),
                  "pulse kernels");
            kernel<<<grid, kCellThreads, sizeof(Shared), stream>>>(table + first, last - first, blocks, round, levels,
                                                                   from(first));
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
