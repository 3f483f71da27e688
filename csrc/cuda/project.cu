// z = x w^T of a layer's operand and one of its factors, with what else the pass over x can give: x in half precision
// and the largest |x| of each row.
//
// A thread block takes 16 rows of x, its warps a share of the columns each. A warp multiplies 16 x 16 pieces of x by
// 16 x 8 pieces of w^T on the tensor cores (mma.m16n8k16); the columns of a piece may be numbered in any order as long
// as both operands agree, so a thread takes neighbouring ones: kPiece of them in whole loads. The warps' sums are added
// in their order.
#include "common.cuh"
#include "halves.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kWarps = 8, kRows = 16, kRank = 16;
constexpr int kPiece = 8;          // neighbouring columns of a thread
constexpr int kStep = 4 * kPiece;  // columns of a warp's step
constexpr int kAhead = 2;          // steps whose loads are under way while as many are computed

template <bool bfloat>
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  if constexpr (bfloat) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// kPiece columns of a row as they lie in memory.
template <bool wide>
struct Raw {
  uint4 part[wide ? 2 : 1];
};

template <bool wide>
__device__ __forceinline__ Raw<wide> load_piece(const void* row, int64_t column) {
  Raw<wide> raw;
  const uint4* at = reinterpret_cast<const uint4*>(static_cast<const char*>(row) + column * (wide ? 4 : 2));
#pragma unroll
  for (int i = 0; i < (wide ? 2 : 1); ++i) raw.part[i] = __ldg(at + i);
  return raw;
}

template <bool wide, bool bfloat>
__device__ __forceinline__ uint4 halves(const Raw<wide>& raw) {
  if constexpr (wide) {
    const uint4 a = raw.part[0], b = raw.part[1];
    return make_uint4(
        narrow_pair<bfloat>(from_bits(a.x), from_bits(a.y)), narrow_pair<bfloat>(from_bits(a.z), from_bits(a.w)),
        narrow_pair<bfloat>(from_bits(b.x), from_bits(b.y)), narrow_pair<bfloat>(from_bits(b.z), from_bits(b.w)));
  } else {
    return raw.part[0];
  }
}

// The larger of the magnitudes in both halves: they are ordered as 16-bit integers.
__device__ __forceinline__ uint32_t larger(uint32_t top, const uint4& v) {
  constexpr uint32_t magnitude = 0x7fff7fffu;
  return __vmaxu2(top,
                  __vmaxu2(__vmaxu2(v.x & magnitude, v.y & magnitude), __vmaxu2(v.z & magnitude, v.w & magnitude)));
}

// `wide`: x is float32; it is written in half precision too.
template <bool wide, bool bfloat>
__global__ void __launch_bounds__(32 * kWarps, 2) project_rows(const ProjectJob job) {
  __shared__ float sums[kWarps][kRows][kRank + 1];
  __shared__ uint32_t tops[kWarps][kRows];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32), group = lane / 4, piece = lane % 4;
  const int64_t row0 = int64_t(blockIdx.x) * kRows;
  const int64_t rows[2] = {row0 + group, row0 + group + 8};
  const char* x[2];
  char* narrow[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = rows[h] < job.n ? rows[h] : job.n - 1;  // loaded again, written by none
    x[h] = static_cast<const char*>(job.x) + row * job.x_stride * (wide ? 4 : 2);
    narrow[h] = static_cast<char*>(job.narrow) + row * job.narrow_stride * 2;
  }
  float low[4] = {}, high[4] = {};  // columns 0 .. 7 and 8 .. 15 of z
  uint32_t top[2] = {};
  const int steps = job.k / kStep, each = (steps + kWarps - 1) / kWarps;
  const int first = warp * each, last = first + each < steps ? first + each : steps;
  Raw<wide> next_x[kAhead][2];
  uint4 next_w[kAhead][2];
  const auto load = [&](int step0) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t column = int64_t(step0 + u) * kStep + piece * kPiece;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int q = group + 8 * h;
        next_w[u][h] = uint4{};
        if (step0 + u >= last) continue;
        next_x[u][h] = load_piece<wide>(x[h], column);
        if (q < job.r)
          next_w[u][h] =
              __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(job.w) + q * int64_t(job.k) + column));
      }
    }
  };
  load(first);
#pragma unroll 1
  for (int step0 = first; step0 < last; step0 += kAhead) {
    Raw<wide> raw[kAhead][2];
    uint4 w[kAhead][2];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) raw[u][h] = next_x[u][h], w[u][h] = next_w[u][h];
    load(step0 + kAhead);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (step0 + u >= last) break;
      const int64_t column = int64_t(step0 + u) * kStep + piece * kPiece;
      uint4 v[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        v[h] = halves<wide, bfloat>(raw[u][h]);
        top[h] = larger(top[h], v[h]);
        if (wide && rows[h] < job.n) *reinterpret_cast<uint4*>(narrow[h] + column * 2) = v[h];
      }
      multiply<bfloat>(low, v[0].x, v[1].x, v[0].y, v[1].y, w[u][0].x, w[u][0].y);
      multiply<bfloat>(low, v[0].z, v[1].z, v[0].w, v[1].w, w[u][0].z, w[u][0].w);
      multiply<bfloat>(high, v[0].x, v[1].x, v[0].y, v[1].y, w[u][1].x, w[u][1].y);
      multiply<bfloat>(high, v[0].z, v[1].z, v[0].w, v[1].w, w[u][1].z, w[u][1].w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // element i of a sum: row group + 8 (i / 2), column 2 piece + i % 2
    sums[warp][group + 8 * (i / 2)][2 * piece + i % 2] = low[i];
    sums[warp][group + 8 * (i / 2)][2 * piece + i % 2 + 8] = high[i];
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t most = max(top[h] & 0xffffu, top[h] >> 16);
    most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
    if (piece == 0) tops[warp][group + 8 * h] = most;
  }
  __syncthreads();
  const int row = int(threadIdx.x) / kRank, q = int(threadIdx.x) % kRank;
  if (row0 + row >= job.n) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i][row][q];
  if (q < job.r)
    static_cast<uint16_t*>(job.z)[(row0 + row) * job.z_stride + q] = uint16_t(narrow_pair<bfloat>(sum, 0.0f));
  if (q == 0) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) most = max(most, tops[i][row]);
    job.top[row0 + row] = bfloat ? most << 16 : to_bits(__half2float(__ushort_as_half(uint16_t(most))));
  }
}

}  // namespace

void project(const ProjectJob& job, Stream handle) {
  static_assert(kRows * kRank == 32 * kWarps, "a thread for each element of z");
  if (job.n == 0) return;
  const unsigned grid = unsigned(blocks_of(job.n, kRows));
  const auto kernel = job.wide ? (job.bfloat ? project_rows<true, true> : project_rows<true, false>)
                               : (job.bfloat ? project_rows<false, true> : project_rows<false, false>);
  kernel<<<grid, 32 * kWarps, 0, native(handle)>>>(job);
  check(cudaGetLastError(), "project");
}

}  // namespace lrtt::cuda
