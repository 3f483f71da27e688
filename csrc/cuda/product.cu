// Passes between float32 and half precision around the matrix products of a layer.
//
// add_product: float32 g + alpha z b of half-precision operands, in one pass over g: what a layer's input gradient
// takes on from its factors while it is widened to the input's type. narrow_rows: float32 rows in half precision, into
// rows that are longer than they: an operand that others stand beside.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = 256, kRows = 64;
constexpr int kAhead = 8;  // rows whose loads are under way together

template <bool bfloat>
__device__ __forceinline__ float widen(uint32_t half) {
  return bfloat ? from_bits(half << 16) : __half2float(__ushort_as_half(uint16_t(half)));
}

// `columns` neighbouring halves in pairs, in one load.
template <int columns>
__device__ __forceinline__ void load_pairs(const uint32_t* at, uint32_t (&pair)[columns / 2]) {
  if constexpr (columns == 4) {
    const uint2 two = *reinterpret_cast<const uint2*>(at);
    pair[0] = two.x, pair[1] = two.y;
  } else {
    pair[0] = *at;
  }
}

template <bool bfloat, int columns>
__device__ __forceinline__ void widen_pairs(const uint32_t (&pair)[columns / 2], float (&wide)[columns]) {
#pragma unroll
  for (int c = 0; c < columns; ++c) wide[c] = widen<bfloat>(c % 2 ? pair[c / 2] >> 16 : pair[c / 2] & 0xffffu);
}

// A thread keeps its columns of b, `rank` rows of them, and runs down kRows rows of g.
template <bool bfloat, int rank, int columns>
__global__ void __launch_bounds__(kThreads, 2) add_product_rows(const SumJob job) {
  __shared__ alignas(16) float z[kRows][rank];
  const int64_t first = int64_t(blockIdx.y) * kRows, left = job.n - first;
  const int rows = int(left < kRows ? left : kRows), column = int(blockIdx.x * kThreads + threadIdx.x) * columns;
  const uint16_t *half_z = static_cast<const uint16_t*>(job.z), *half_b = static_cast<const uint16_t*>(job.b);
  for (int i = threadIdx.x; i < kRows * rank; i += kThreads) {
    const int row = i / rank, q = i % rank;
    z[row][q] = row < rows && q < job.r ? job.alpha * widen<bfloat>(half_z[(first + row) * job.r + q]) : 0.0f;
  }
  __syncthreads();
  if (column >= job.k) return;
  float b[rank][columns];
#pragma unroll
  for (int q = 0; q < rank; ++q) {
    uint32_t pair[columns / 2] = {};
    if (q < job.r) load_pairs<columns>(reinterpret_cast<const uint32_t*>(half_b + int64_t(q) * job.k + column), pair);
    widen_pairs<bfloat, columns>(pair, b[q]);
  }
  const uint32_t* from =
      reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(job.g) + first * job.k + column);
  float* to = job.out + first * job.k + column;
  for (int row0 = 0; row0 < rows; row0 += kAhead) {
    uint32_t pair[kAhead][columns / 2];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (row0 + u >= rows) continue;
      load_pairs<columns>(from + int64_t(row0 + u) * (job.k / 2), pair[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (row0 + u >= rows) continue;
      float sum[columns];
      widen_pairs<bfloat, columns>(pair[u], sum);
#pragma unroll
      for (int q = 0; q < rank; ++q)
#pragma unroll
        for (int c = 0; c < columns; ++c) sum[c] = fma_(z[row0 + u][q], b[q][c], sum[c]);
      float* at = to + int64_t(row0 + u) * job.k;
      if (columns == 4) {
        *reinterpret_cast<float4*>(at) = make_float4(sum[0], sum[1], sum[columns - 2], sum[columns - 1]);
      } else {
        *reinterpret_cast<float2*>(at) = make_float2(sum[0], sum[1]);
      }
    }
  }
}

template <int rank, int columns>
void launch(const SumJob& job, cudaStream_t stream) {
  const dim3 grid(unsigned(blocks_of(job.k, kThreads * columns)), unsigned(blocks_of(job.n, kRows)));
  if (job.bfloat) {
    add_product_rows<true, rank, columns><<<grid, kThreads, 0, stream>>>(job);
  } else {
    add_product_rows<false, rank, columns><<<grid, kThreads, 0, stream>>>(job);
  }
  check(cudaGetLastError(), "add_product");
}

template <bool bfloat>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  if (bfloat) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

constexpr int kNarrowed = 2;  // pieces of eight elements that a thread takes, a block apart

template <bool bfloat>
__global__ void __launch_bounds__(kThreads) narrow_row_pieces(const NarrowJob job, int64_t pieces, uint32_t of_row) {
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kNarrowed) + threadIdx.x;
  float4 from[kNarrowed][2];
#pragma unroll
  for (int i = 0; i < kNarrowed; ++i) {
    const int64_t piece = first + i * kThreads;
    if (piece >= pieces) continue;
    const float4* at = reinterpret_cast<const float4*>(job.x) + 2 * piece;
    from[i][0] = __ldcs(at);
    from[i][1] = __ldcs(at + 1);
  }
#pragma unroll
  for (int i = 0; i < kNarrowed; ++i) {
    const int64_t piece = first + i * kThreads;
    if (piece >= pieces) continue;
    const int64_t row = piece / of_row;
    uint16_t* to = static_cast<uint16_t*>(job.out) + row * job.stride + 8 * (piece - row * of_row);
    const float4 a = from[i][0], b = from[i][1];
    *reinterpret_cast<uint4*>(to) = make_uint4(narrow_pair<bfloat>(a.x, a.y), narrow_pair<bfloat>(a.z, a.w),
                                               narrow_pair<bfloat>(b.x, b.y), narrow_pair<bfloat>(b.z, b.w));
  }
}

}  // namespace

void narrow_rows(const NarrowJob& job, Stream handle) {
  const int64_t pieces = job.n * (job.k / 8);
  if (pieces == 0) return;
  const unsigned grid = unsigned(blocks_of(pieces, kThreads * kNarrowed));
  const auto kernel = job.bfloat ? narrow_row_pieces<true> : narrow_row_pieces<false>;
  kernel<<<grid, kThreads, 0, native(handle)>>>(job, pieces, uint32_t(job.k / 8));
  check(cudaGetLastError(), "narrow_rows");
}

void add_product(const SumJob& job, Stream handle) {
  const cudaStream_t stream = native(handle);
  if (job.r <= 8) {
    launch<8, 4>(job, stream);
  } else if (job.r <= 16) {
    launch<16, 4>(job, stream);
  } else {
    launch<32, 2>(job, stream);
  }
}

}  // namespace lrtt::cuda
