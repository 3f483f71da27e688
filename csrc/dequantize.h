// What the blocks of quantised checkpoints hold, once for the host and the device: block sizes, scales and quants.
//
// A block of kSize elements is kSize / kGroup groups; the elements of a group share a scale and an offset and come from
// consecutive bytes, so the loop over a group is a vector loop on the host and a thread's work on the device. Every
// element is `scale * quant`, `scale * quant + offset` (Q4_1, Q5_1) or `scale * quant - offset` (Q2_K, Q4_K, Q5_K),
// with one rounding an operation: built without contraction, the bits are those of ggml's reference and of gguf.quants.
// Layouts: ggml-quants.c and gguf/quants.py. Type numbers are GGML's.
#pragma once

#include "math.h"

namespace lrtt::blocks {

enum Type : int {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
  kMXFP4 = 39,
};

LRTT_HD uint32_t u16(const uint8_t* p) { return uint32_t(p[0]) | uint32_t(p[1]) << 8; }

LRTT_HD float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

LRTT_HD uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// IEEE binary16 to binary32, exact, without a branch: both the normal and the subnormal result are made and one is
// taken.
LRTT_HD float half(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 17;
  const float normal = float_of((magnitude >> 4) + 0x70000000u) * float_of(0x07800000u);  // 2^-112
  const float subnormal = float_of((magnitude >> 17) | 0x3f000000u) - 0.5f;
  return float_of(sign | bits_of(magnitude < 0x08000000u ? subnormal : normal));
}

// To nearest, ties to even, NaN to 0x7fc0: as torch rounds on the CPU.
LRTT_HD uint16_t bfloat(float f) {
  const uint32_t bits = bits_of(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

struct Affine {
  float scale, offset;
};

enum Sign { kNone, kPlus, kMinus };  // of the offset

template <Sign sign>
LRTT_HD float element(const Affine& a, int quant) {
  const float y = a.scale * float(quant);
  return sign == kPlus ? y + a.offset : sign == kMinus ? y - a.offset : y;
}

// Each type: kBytes, kSize, kGroup, kSign; affine(block, group), quant(block, group, index in the group).

struct Q4_0 {
  static constexpr int kBytes = 18, kSize = 32, kGroup = 16;
  static constexpr Sign kSign = kNone;
  static LRTT_HD Affine affine(const uint8_t* b, int) { return {half(u16(b)), 0}; }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) { return int((b[2 + j] >> (4 * g)) & 15) - 8; }
};

struct Q4_1 {
  static constexpr int kBytes = 20, kSize = 32, kGroup = 16;
  static constexpr Sign kSign = kPlus;
  static LRTT_HD Affine affine(const uint8_t* b, int) { return {half(u16(b)), half(u16(b + 2))}; }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) { return (b[4 + j] >> (4 * g)) & 15; }
};

struct Q5_0 {
  static constexpr int kBytes = 22, kSize = 32, kGroup = 16;
  static constexpr Sign kSign = kNone;
  static LRTT_HD Affine affine(const uint8_t* b, int) { return {half(u16(b)), 0}; }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    const uint32_t high = u16(b + 2 + 2 * g);
    return int(((b[6 + j] >> (4 * g)) & 15u) | ((high >> j) & 1u) << 4) - 16;
  }
};

struct Q5_1 {
  static constexpr int kBytes = 24, kSize = 32, kGroup = 16;
  static constexpr Sign kSign = kPlus;
  static LRTT_HD Affine affine(const uint8_t* b, int) { return {half(u16(b)), half(u16(b + 2))}; }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    const uint32_t high = u16(b + 4 + 2 * g);
    return int(((b[8 + j] >> (4 * g)) & 15u) | ((high >> j) & 1u) << 4);
  }
};

struct Q8_0 {
  static constexpr int kBytes = 34, kSize = 32, kGroup = 32;
  static constexpr Sign kSign = kNone;
  static LRTT_HD Affine affine(const uint8_t* b, int) { return {half(u16(b)), 0}; }
  static LRTT_HD int quant(const uint8_t* b, int, int j) { return int8_t(b[2 + j]); }
};

// scales 16 B (low nibble scale, high nibble minimum), 64 B of two-bit quants, d, dmin
struct Q2_K {
  static constexpr int kBytes = 84, kSize = 256, kGroup = 16;
  static constexpr Sign kSign = kMinus;
  static LRTT_HD Affine affine(const uint8_t* b, int g) {
    return {half(u16(b + 80)) * float(b[g] & 15), half(u16(b + 82)) * float(b[g] >> 4)};
  }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    return (b[16 + 32 * (g / 8) + 16 * (g % 2) + j] >> (2 * (g % 8 / 2))) & 3;
  }
};

// hmask 32 B, 64 B of two-bit quants, 16 six-bit scales in 12 B, d; the third bit is subtracted where it is 0
struct Q3_K {
  static constexpr int kBytes = 110, kSize = 256, kGroup = 16;
  static constexpr Sign kSign = kNone;
  static LRTT_HD Affine affine(const uint8_t* b, int g) {
    const uint8_t* s = b + 96;
    const int low = (s[g % 8] >> (4 * (g / 8))) & 15, high = (s[8 + g % 4] >> (2 * (g / 4))) & 3;
    return {half(u16(b + 108)) * float((low | high << 4) - 32), 0};
  }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    const int low = (b[32 + 32 * (g / 8) + 16 * (g % 2) + j] >> (2 * (g % 8 / 2))) & 3;
    return low - (int((b[16 * (g % 2) + j] >> (g / 2)) & 1) ^ 1) * 4;
  }
};

// Eight six-bit scales and minima in 12 B.
LRTT_HD Affine scale_min(const uint8_t* b, const uint8_t* s, int g) {
  const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
  const int least = g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6) << 4;
  return {half(u16(b)) * float(scale), half(u16(b + 2)) * float(least)};
}

struct Q4_K {
  static constexpr int kBytes = 144, kSize = 256, kGroup = 32;
  static constexpr Sign kSign = kMinus;
  static LRTT_HD Affine affine(const uint8_t* b, int g) { return scale_min(b, b + 4, g); }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) { return (b[16 + 32 * (g / 2) + j] >> (4 * (g % 2))) & 15; }
};

struct Q5_K {
  static constexpr int kBytes = 176, kSize = 256, kGroup = 32;
  static constexpr Sign kSign = kMinus;
  static LRTT_HD Affine affine(const uint8_t* b, int g) { return scale_min(b, b + 4, g); }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    return ((b[48 + 32 * (g / 2) + j] >> (4 * (g % 2))) & 15) | ((b[16 + j] >> g) & 1) << 4;
  }
};

// ql 128 B, qh 64 B, 16 int8 scales, d
struct Q6_K {
  static constexpr int kBytes = 210, kSize = 256, kGroup = 16;
  static constexpr Sign kSign = kNone;
  static LRTT_HD Affine affine(const uint8_t* b, int g) { return {half(u16(b + 208)) * float(int8_t(b[192 + g])), 0}; }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    const int half_block = g / 8, row = g % 8 / 2, at = 16 * (g % 2) + j;  // rows of 32, four in each half
    const int low = (b[64 * half_block + 32 * (row % 2) + at] >> (4 * (row / 2))) & 15;
    return (low | ((b[128 + 32 * half_block + at] >> (2 * row)) & 3) << 4) - 32;
  }
};

// E8M0 scale, halved, because the table of E2M1 values is doubled: 0 1 2 3 4 6 8 12 and their negatives
struct MXFP4 {
  static constexpr int kBytes = 17, kSize = 32, kGroup = 16;
  static constexpr Sign kSign = kNone;
  static LRTT_HD Affine affine(const uint8_t* b, int) {
    const uint32_t e = b[0];
    return {float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0};
  }
  static LRTT_HD int quant(const uint8_t* b, int g, int j) {
    const int q = (b[1 + j] >> (4 * g)) & 15;
    const int magnitude = (0xC8643210u >> (4 * (q & 7))) & 15u;  // the table as digits: a shift is a vector operation
    return q & 8 ? -magnitude : magnitude;
  }
};

// On the host: calls f with an object of the type, or returns false for a type that is not here (F32, F16 and BF16 have
// no blocks).
template <class F>
inline __attribute__((always_inline)) bool with_type(int type, F&& f) {
  switch (type) {
    case kQ4_0: f(Q4_0{}); return true;
    case kQ4_1: f(Q4_1{}); return true;
    case kQ5_0: f(Q5_0{}); return true;
    case kQ5_1: f(Q5_1{}); return true;
    case kQ8_0: f(Q8_0{}); return true;
    case kQ2_K: f(Q2_K{}); return true;
    case kQ3_K: f(Q3_K{}); return true;
    case kQ4_K: f(Q4_K{}); return true;
    case kQ5_K: f(Q5_K{}); return true;
    case kQ6_K: f(Q6_K{}); return true;
    case kMXFP4: f(MXFP4{}); return true;
    default: return false;
  }
}

// A matrix of blocks and where it is decoded to. Row i of the blocks becomes row `rows[i]` of out (row i if null).
struct Job {
  int type, is_bfloat;
  int64_t row_count, row_blocks;  // blocks of a row; for F32, F16 and BF16 its elements
  const uint8_t* blocks;
  void* out;
  int64_t out_stride;  // elements between rows of out
  const int64_t* rows;
};

}  // namespace lrtt::blocks
