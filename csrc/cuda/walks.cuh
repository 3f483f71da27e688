// What a thread does with the words of both streams that lie in shared memory: pulse by pulse, or sample by sample.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstddef>

#include "pulses.cuh"

namespace lrtt::cuda {

// What the cells of one thread block read: a segment of both sides' streams, and the noise levels times sigma, the
// negative ones behind the positive. Words lie along a row, so that four of them are one load; rows are four words
// longer than a segment, so that the loads of eight rows meet all banks.
constexpr int kSegmentWords = 128;  // 4096 single slots; warps with fewer pulses seldom wait for the others
constexpr int kRowWords = kSegmentWords + 4;

template <int rows>
struct Segment {
  uint32_t bits[rows][kRowWords], neg[rows][kRowWords];
};

// Where the words of a block of samples lie.
struct alignas(16) BlockPlace {
  int words, width, place;
};

__device__ __forceinline__ BlockPlace place_of(const DevicePulse& p, int block) {
  return BlockPlace{p.words[block], p.widths[block], p.place[block]};
}

constexpr int kPlaces = 32;  // blocks of a segment that are looked up together

struct Shared {
  Segment<kLongLanes> longer;
  Segment<kShortRows> shorter;
  float levels[2 * kNoiseLevels];
  float2 roots[33];  // n and sqrt(n) of a burst; behind the levels, by whose address they are found
  BlockPlace places[kPlaces];
};

// Starts to copy the stored words [row0, row0 + words) of the elements from `first` on, zero beyond `elements` and up
// to a multiple of four words; neg of the first `negs` of them.
template <int rows>
__device__ __forceinline__ void copy_stored(const uint32_t* bits, const uint32_t* neg, int64_t row0, int words,
                                            int negs, int elements, int first, Segment<rows>& to) {
  constexpr int together = kCellThreads / rows;
  const int lane = int(threadIdx.x) % rows, word0 = int(threadIdx.x) / rows;
  const bool inside = first + lane < elements;
  int64_t at = inside ? (row0 + word0) * elements + first + lane : 0;
#pragma unroll 1
  for (int word = word0; word < ((words + 3) & ~3); word += together, at += together * int64_t(elements)) {
    const bool stored = inside && word < words;
    __pipeline_memcpy_async(&to.bits[lane][word], bits + (stored ? at : 0), 4, stored ? 0 : 4);
    if (word < negs) __pipeline_memcpy_async(&to.neg[lane][word], neg + (inside ? at : 0), 4, inside ? 0 : 4);
  }
}

// Which of up to 32 words hold a coincidence: bit 31 is the first word. `slots`: bits of a word that are slots.
template <uint32_t slots>
__device__ __forceinline__ uint32_t hits(const uint32_t* s, const uint32_t* l, int words) {
  uint32_t found = 0;
#pragma unroll 4
  for (int i = 0; i < words; i += 4) {
    const uint4 a = *reinterpret_cast<const uint4*>(s + i), b = *reinterpret_cast<const uint4*>(l + i);
    const uint32_t four = ((a.x & b.x & slots) ? 8u : 0u) | ((a.y & b.y & slots) ? 4u : 0u) |
                          ((a.z & b.z & slots) ? 2u : 0u) | ((a.w & b.w & slots) ? 1u : 0u);
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

// The same of signed words.
__device__ __forceinline__ void fetch_signed(uint32_t s, uint32_t l, uint32_t& found, uint32_t& m, uint32_t& up) {
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
      "  @q xor.b32 a, i, t;\n"
      "  @q shr.s32 %2, a, 31;\n"
      "  @q and.b32 i, i, t;\n"
      "  @q and.b32 %1, i, 0x7fffffff;\n"
      "}"
      : "+r"(found), "+r"(m), "+r"(up)
      : "r"(s), "r"(l)
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

// n and its root.
__device__ __forceinline__ float2 root_of(uint32_t levels, uint32_t n) {
  float2 pair;
  asm volatile(
      "{\n"
      "  .reg .b32 i;\n"
      "  mad.lo.u32 i, %2, 8, %3;\n"
      "  ld.shared.v2.f32 {%0, %1}, [i + %4];\n"
      "}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(n), "r"(levels), "n"(int(offsetof(Shared, roots) - offsetof(Shared, levels))));
  return pair;
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
template <class Device, bool loses, int how, bool is_signed>
__device__ __forceinline__ void walk_pulses(const DeviceParams& device, const uint32_t* short_words,
                                            const uint32_t* long_words, int words, bool dense, uint32_t levels,
                                            Run& run) {
  const uint32_t s = shared_address(short_words), l = shared_address(long_words);
  uint32_t found = hits<is_signed ? ~kSignBit : ~0u>(short_words, long_words, words), m = 0, up = 0;
  const auto next = [&] {
    if constexpr (is_signed) {
      fetch_signed(s, l, found, m, up);
    } else {
      fetch(s, l, found, m, up);
    }
    return m != 0;
  };
  if (is_signed || dense) {
    while (next()) {
      one_pulse<Device, loses, how>(device, levels, m, up, run);
      if (m != 0) one_pulse<Device, loses, how>(device, levels, m, up, run);
    }
  } else {
    while (next()) one_pulse<Device, loses, how>(device, levels, m, up, run);
  }
}

// The coincidences m of one sample, none or some, as a burst. `down` of a pair is the second cell's way up. `inside`:
// see burst.
template <class Device, bool loses, int how, bool inside>
__device__ __forceinline__ void one_burst(const DeviceParams& device, const Burst& up, const Burst& down, uint32_t m,
                                          bool upwards, uint32_t levels, Run& run) {
  const uint32_t n = uint32_t(__popc(m));
  const bool on_minus = how == kPair && !upwards;
  const float2 many = root_of(levels, n);
  const Burst way{upwards ? up.s : down.s, upwards ? up.h : down.h, upwards ? up.mean : down.mean,
                  upwards ? up.shake : down.shake, upwards ? up.most : down.most};
  const Cell& cell = on_minus ? run.minus_cell : run.cell;
  float& w = on_minus ? run.minus : run.w;
  run.pulses = plus(run.pulses, n);
  if (many.x > way.most) {  // a large burst
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
  const float eta = level_of(levels, next) * many.y;
  float over = 0.0f;
  const float moved = burst<Device>(cell, way, inside, w, many.x, eta, over);
  if (n != 0) {
    run.random.state = next;
    w = moved;
    if (loses) run.cut += over;
  }
}

// Words of one block in shared memory, for one cell; the first is at a multiple of 16 bytes.
struct Place {
  const uint32_t *short_bits, *short_neg, *long_bits, *long_neg;
  int words;  // a multiple of four
};

// How the words of bursts hold their samples.
enum WordKind { kShared, kPieces, kSigned };  // several samples in a word, words of one sample, signed words

// All samples of words, without a search for those that have a coincidence: most do.
template <class Device, bool loses, int how, bool inside, int kind>
__device__ __forceinline__ void all_bursts(const DeviceParams& device, const Burst& up, const Burst& down,
                                           const Place& at, int width, uint32_t levels, Run& run) {
#pragma unroll 1
  for (int i = 0; i < at.words; i += 4) {
    const auto four = [i](const uint32_t* v) { return *reinterpret_cast<const uint4*>(v + i); };
    const uint4 a = four(at.short_bits), b = four(at.long_bits);
    uint32_t m[4] = {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w};
    if constexpr (kind == kSigned) {
      const uint32_t signs[4] = {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        one_burst<Device, loses, how, inside>(device, up, down, m[k] & ~kSignBit, int(signs[k]) < 0, levels, run);
    } else {
      const uint4 c = four(at.short_neg), d = four(at.long_neg);
      const uint32_t signs[4] = {c.x ^ d.x, c.y ^ d.y, c.z ^ d.z, c.w ^ d.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (kind == kPieces) {
          one_burst<Device, loses, how, inside>(device, up, down, m[k], (signs[k] & m[k]) != 0, levels, run);
        } else {
#pragma unroll 1
          for (uint32_t own = 0xffffffffu >> (32 - width); own != 0; own <<= width)
            one_burst<Device, loses, how, inside>(device, up, down, m[k] & own, (signs[k] & m[k] & own) != 0, levels,
                                                  run);
        }
      }
    }
  }
}

// A block's bursts, or those of a part of it.
template <class Device, bool loses, int how, bool inside>
__device__ __forceinline__ void run_bursts(const DeviceParams& device, const Burst& up, const Burst& down,
                                           const Place& at, int width, bool is_signed, uint32_t levels, Run& run) {
  if (is_signed) {
    all_bursts<Device, loses, how, inside, kSigned>(device, up, down, at, width, levels, run);
  } else if (width >= 32) {
    all_bursts<Device, loses, how, inside, kPieces>(device, up, down, at, width, levels, run);
  } else {
    all_bursts<Device, loses, how, inside, kShared>(device, up, down, at, width, levels, run);
  }
}

}  // namespace lrtt::cuda
