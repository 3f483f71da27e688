// Streams of bits: of every element of both sides, in which slots it fires and where it is negative.
#pragma once

#include <type_traits>

#include "readers.cuh"

namespace lrtt::cuda {

// One side of an outer product, and the constants of its random numbers.
struct Side {
  bool is_x;
  uint64_t key;
  uint32_t step, c3;
  uint32_t flip;  // turns the signs of d where the rate is negative: a cell then looks at the operands' signs only
  const PulseJob& job;
  __device__ __forceinline__ Side(const DevicePulse& p, bool x)
      : is_x(x),
        key(uint64_t(p.job.state[kKey])),
        step(uint32_t(p.job.state[kStep])),
        c3(counter3(x ? kBitX : kBitD, uint32_t(p.job.array), 0)),
        flip(!x && (p.transfer ? p.eta_sign : *p.job.eta) < 0.0f ? 0xffffffffu : 0u),
        job(p.job) {}
};

__device__ __forceinline__ void add_where_below(uint32_t& sum, uint32_t term, uint32_t a, uint32_t b) {
  asm("{\n  .reg .pred q;\n  setp.lt.u32 q, %2, %3;\n  @q mad.lo.u32 %0, %1, 1, %0;\n}"
      : "+r"(sum)
      : "r"(term), "r"(a), "r"(b));
}

__device__ __forceinline__ void add_product_of(uint32_t& sum, uint32_t a, uint32_t b) {
  asm("mad.lo.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
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

// Trains of up to kDirectSlots slots, one uniform each, from slot `shift` of the word on.
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
    const Words r = philox(side.key, uint32_t(group), sample * 64u + uint32_t(slot), side.step, side.c3);
    const uint32_t mask = 1u << (shift + slot);
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
constexpr int kMost = 8;                  // samples that a thread loads together
constexpr int kWarpGroups = 32 / kParts;  // groups of four elements of a warp's task

// What the threads of a block keep in shared memory: kMost loads each.
struct Kept {
  uint4* loads;
  __device__ __forceinline__ uint4& operator[](int i) const { return loads[i * int(blockDim.x) + int(threadIdx.x)]; }
};

__host__ __device__ __forceinline__ uint32_t chunks_of(int64_t elements) {
  return uint32_t((groups_of(elements) + kWarpGroups - 1) / kWarpGroups);
}

__device__ __forceinline__ uint32_t or_parts(uint32_t v) {
#pragma unroll
  for (int lanes = kWarpGroups; lanes < 32; lanes *= 2) v |= __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Keeps up to kMost samples, first, first + step, ...: `many` of them, zero beyond. All are loaded before the first is
// waited for, and the loop over them need not be unrolled.
template <Access kind>
__device__ __forceinline__ void keep(const Reader<kind>& reader, int first, int step, int many, Kept kept) {
  constexpr int batch = kind == kVectorBFloat16 ? kMost : kind == kVectorFloat ? kMost / 2 : 1;
#pragma unroll 1
  for (int begin = 0; begin < kMost; begin += batch) {
    uint4 raw[batch];
#pragma unroll
    for (int u = 0; u < batch; ++u) raw[u] = begin + u < many ? reader.read(first + (begin + u) * step) : uint4{};
#pragma unroll
    for (int u = 0; u < batch; ++u) kept[begin + u] = raw[u];
  }
}

// Word `word` of a block whose words hold several samples, for kWarpGroups groups of one side, by a warp: thread (part,
// group) takes every kParts-th of its samples.
template <Access kind, bool any>
__device__ __forceinline__ void make_word(const Operand& v, int elements, const BlockView& samples, const Side& side,
                                          int word, int width, int chunk, Kept kept, uint32_t* to_bits_,
                                          uint32_t* to_neg) {
  const int lane = int(threadIdx.x % 32), part = lane / kWarpGroups, group = chunk * kWarpGroups + lane % kWarpGroups;
  const bool inside = 4 * group < elements;
  const Reader<kind> reader(v, elements, group, samples);
  uint32_t bits[4] = {}, neg[4] = {};
  const int first = word * (32 / width), many = min(32 / width, samples.samples - first);
  Planned mine{0, 0.0f, 0.0f};  // 32 trains at most, one a lane
  if (lane < many) mine = samples.trains[first + lane];
  const float my_scale = side.is_x ? mine.sx : mine.sd;
  const int own = inside ? (many - part + kParts - 1) / kParts : 0;  // samples of this thread
#pragma unroll 1
  for (int u = 0; u * kParts < many; ++u) {
    const int at = part + u * kParts;
    if (u % kMost == 0) keep(reader, first + at, kParts, own - u, kept);  // with `any` also single slots come here
    const float scale = __shfl_sync(0xffffffffu, my_scale, at);
    const int bl = __shfl_sync(0xffffffffu, mine.bl, at);
    if (at >= many || !inside || bl == 0) continue;
    const uint4 value = Reader<kind>::decode(kept[u % kMost]);
    const uint32_t element[4] = {value.x, value.y, value.z, value.w};
    const uint32_t sample = uint32_t(samples.first_sample) + uint32_t(first + at);
    const int shift = at * width;
    if (!any && bl <= kDirectSlots) {
      fire_directly(side, element, scale, bl, shift, group, sample, bits, neg);
      continue;
    }
    uint32_t fired[4];
    fire<any>(side, element, scale, bl, group, sample, 0, fired);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t f = fired[k] << shift;
      bits[k] |= f;
      neg[k] |= f & (0u - (element[k] >> 31));
    }
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t all_bits = or_parts(bits[k]), all_neg = or_parts(neg[k]) ^ side.flip;
    const int e = 4 * group + k;
    if (part == k % kParts && e < elements) {
      to_bits_[e] = all_bits;
      to_neg[e] = all_neg;
    }
  }
}

// Word `word` of a block whose trains are single slots or none, whose scale is 0: the most frequent case, without a
// branch on the train. Thread (part, group) takes half of the samples, in order; two at a time hide each other's
// latencies.
template <Access kind>
__device__ __forceinline__ void make_single_slots(const Operand& v, int elements, const BlockView& samples,
                                                  const Side& side, int word, int chunk, Kept kept, uint32_t* to_bits_,
                                                  uint32_t* to_neg) {
  constexpr int half = 32 / kParts;
  const int lane = int(threadIdx.x % 32), part = lane / kWarpGroups, group = chunk * kWarpGroups + lane % kWarpGroups;
  const bool inside = 4 * group < elements;
  const Reader<kind> reader(v, elements, group, samples);
  const int first = word * 32 + part * half, many = inside ? samples.samples - first : 0;
  float my_scale = 0.0f;
  if (word * 32 + lane < samples.samples) {
    const Planned& mine = samples.trains[word * 32 + lane];
    my_scale = side.is_x ? mine.sx : mine.sd;
  }
  uint32_t bits[4] = {}, neg[4] = {}, sample = (uint32_t(samples.first_sample) + uint32_t(first)) * 64u, mask = 1u;
#pragma unroll 1
  for (int begin = 0; begin < half; begin += kMost) {
    keep(reader, first + begin, 1, many - begin, kept);
#pragma unroll 1
    for (int i = 0; i < kMost; i += 2) {
      Words r[2];
#pragma unroll
      for (int u = 0; u < 2; ++u, sample += 64u) r[u] = philox(side.key, uint32_t(group), sample, side.step, side.c3);
#pragma unroll
      for (int u = 0; u < 2; ++u, mask *= 2u) {
        const float scale = __shfl_sync(0xffffffffu, my_scale, part * half + begin + i + u);
        const uint4 value = Reader<kind>::decode(kept[i + u]);
        const uint32_t element[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          add_where_below(bits[k], mask, r[u].w[k], threshold(fabsf(from_bits(element[k])) * scale));
          neg[k] = __funnelshift_l(element[k], neg[k], 1);  // the last sample's sign lowest
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t all_bits = or_parts(bits[k] << (part * half)),
                   all_neg = or_parts((__brev(neg[k]) >> (32 - half)) << (part * half)) ^ side.flip;
    const int e = 4 * group + k;
    if (part == k % kParts && e < elements) {
      to_bits_[e] = all_bits;
      to_neg[e] = all_neg;
    }
  }
}

// Word `word` of a block whose words belong to one sample each, and the next one, by a warp: thread (part, group) makes
// word + part. A sample of more than 32 slots has several words, its pieces. Without `any` they are signed words.
template <Access kind, bool any>
__device__ __forceinline__ void make_whole_words(const Operand& v, int elements, const BlockView& samples,
                                                 const Side& side, int word, int words, int width, int chunk,
                                                 uint32_t* to_bits_, uint32_t* to_neg) {
  const int lane = int(threadIdx.x % 32), part = lane / kWarpGroups, group = chunk * kWarpGroups + lane % kWarpGroups;
  word += part;
  if (word >= words || 4 * group >= elements) return;
  const int s = any ? word / (width / 32) : word, piece = any ? word % (width / 32) : 0;
  const Planned train = s < samples.samples ? samples.trains[s] : Planned{0, 0.0f, 0.0f};
  const Reader<kind> reader(v, elements, group, samples);
  uint32_t fired[4] = {}, neg[4] = {};
  if (train.bl > 32 * piece) {
    const uint4 value = Reader<kind>::decode(reader.read(s));
    const uint32_t element[4] = {value.x, value.y, value.z, value.w};
    const uint32_t sample = uint32_t(samples.first_sample) + uint32_t(s);
    const float scale = side.is_x ? train.sx : train.sd;
    if (!any && train.bl <= kDirectSlots) {
      fire_directly(side, element, scale, train.bl, 0, group, sample, fired, neg);
    } else {
      fire<any>(side, element, scale, train.bl, group, sample, piece, fired);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (any) {
        neg[k] = (0u - (element[k] >> 31)) ^ side.flip;
      } else {
        fired[k] |= (element[k] ^ side.flip) & kSignBit;
      }
    }
  }
  const int64_t at = int64_t(part) * elements + 4 * group;
  if (elements % 4 == 0) {
    *reinterpret_cast<uint4*>(to_bits_ + at) = make_uint4(fired[0], fired[1], fired[2], fired[3]);
    if (any) *reinterpret_cast<uint4*>(to_neg + at) = make_uint4(neg[0], neg[1], neg[2], neg[3]);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * group + k >= elements) break;
    to_bits_[at + k] = fired[k];
    if (any) to_neg[at + k] = neg[k];
  }
}

// A warp's task in a round: the stream row and the groups that its number names.
template <bool any>
__device__ __forceinline__ void make_words(const DevicePulse& p, uint32_t task, int round, Kept kept) {
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
  const Side side(p, is_x);
  const int width = p.widths[block], words = p.words[block];
  if (width >= 32 && word % 2 != 0) return;  // made with the one before
  uint32_t* bits = (is_x ? p.x_bits : p.d_bits) + int64_t(row) * elements;
  uint32_t* neg = (is_x ? p.x_neg : p.d_neg) + int64_t(row) * elements;
  const auto make = [&](auto how) {
    constexpr Access kind = decltype(how)::value;
    if (!any && width == 1) {
      make_single_slots<kind>(v, elements, samples, side, word, chunk, kept, bits, neg);
    } else if (width >= 32) {
      make_whole_words<kind, any>(v, elements, samples, side, word, words, width, chunk, bits, neg);
    } else {
      make_word<kind, any>(v, elements, samples, side, word, width, chunk, kept, bits, neg);
    }
  };
  switch (access(v, elements, samples.rows)) {
    case kVectorFloat: make(std::integral_constant<Access, kVectorFloat>{}); break;
    case kVectorBFloat16: make(std::integral_constant<Access, kVectorBFloat16>{}); break;
    case kScattered: make(std::integral_constant<Access, kScattered>{}); break;
  }
}

// Tasks that a job has in a round; the trains decide how much of the room for its streams is used.
__device__ __forceinline__ uint32_t tasks_of(const DevicePulse& p, int round) {
  const int begin = p.begin[round], end = p.begin[round + 1];
  if (begin >= end) return 0;
  // Below 2^32: the streams of a round fit kStreamBytes, or are those of one block.
  return (chunks_of(p.job.n) + chunks_of(p.job.m)) * uint32_t(p.place[end - 1] + p.words[end - 1]);
}

// The streams of all jobs in a round, by all warps of a grid.
template <bool any>
__device__ __forceinline__ void make_round(const DevicePulse* table, int count, int round, const Predicate& predicate,
                                           Kept kept) {
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  int64_t task = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;  // from the first of the present job
  const int lane = int(threadIdx.x % 32);
  for (int first = 0; first < count; first += 32) {  // each lane asks a job of its own
    const int own = first + lane;
    const bool due = own < count && (!predicate.jobs || fires(predicate.jobs[own], predicate.force));
    const uint32_t mine = due ? tasks_of(table[own], round) : 0;
    for (int i = 0; i < 32 && first + i < count; ++i) {
      const uint32_t tasks = __shfl_sync(0xffffffffu, mine, i);
      for (; task < tasks; task += warps) make_words<any>(table[first + i], uint32_t(task), round, kept);
      task -= tasks;
    }
  }
}

}  // namespace lrtt::cuda
