// How streams read their operands: a block of samples, four elements of a sample at a time.
#pragma once

#include "pulses.cuh"

namespace lrtt::cuda {

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

}  // namespace lrtt::cuda
