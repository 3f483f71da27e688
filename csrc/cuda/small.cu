// Products of small float32 layers with their factors, whose launches take longer than their sums: x B^T or d A; and
// all that a backward pass owes the factors and the bias, in one launch.
#include "common.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// sum[q] = row . w[q, :] and the largest |row|, in all lanes of a warp.
template <int rank>
__device__ __forceinline__ void row_products(const float* row, const float* w, int k, int r, float (&sum)[rank],
                                             uint32_t& top) {
  const int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int q = 0; q < rank; ++q) sum[q] = 0.0f;
  top = 0;
#pragma unroll 4
  for (int j = lane; j < k; j += 32) {
    const float v = row[j];
    top = max(top, magnitude_bits(v));
#pragma unroll
    for (int q = 0; q < rank; ++q)
      if (q < r) sum[q] = fma_(v, w[q * k + j], sum[q]);
  }
#pragma unroll
  for (int q = 0; q < rank; ++q)
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum[q] += __shfl_xor_sync(0xffffffffu, sum[q], lanes);
  top = warp_max(top);
}

// One warp a row.
template <int rank>
__global__ void __launch_bounds__(kThreads) project_small(const SmallProjectJob job) {
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  if (row >= job.n) return;
  float sum[rank];
  uint32_t top;
  row_products<rank>(job.x + int64_t(row) * job.x_stride, job.w, job.k, job.r, sum, top);
#pragma unroll
  for (int q = 0; q < rank; ++q)
    if (lane == q && q < job.r) job.z[row * job.r + q] = sum[q];
  if (lane == 0) job.top[row] = top;
}

constexpr int kColumns = 32;  // of d or x, that a thread block takes

// Thread blocks take strips of columns of d (A's gradient and the bias'), then of x (B's). Those of x make D A
// themselves, all of it; the first of them stores it.
template <int rank>
__global__ void __launch_bounds__(kThreads) factor_gradients(const FactorJob job) {
  __shared__ float factor[kSmallSamples][rank], part[kWarps][kColumns][rank + 1];
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  const int d_strips = (job.d + kColumns - 1) / kColumns, strip = int(blockIdx.x);
  const bool of_d = strip < d_strips;
  if (of_d) {
    for (int i = int(threadIdx.x); i < job.n * rank; i += kThreads) {
      const int q = i % rank;
      factor[i / rank][q] = q < job.r ? job.z[i / rank * job.r + q] : 0.0f;
    }
  } else {
    for (int row = warp; row < job.n; row += kWarps) {
      float sum[rank];
      uint32_t top;
      row_products<rank>(job.grad + int64_t(row) * job.grad_stride, job.a_t, job.d, job.r, sum, top);
#pragma unroll
      for (int q = 0; q < rank; ++q) {
        if (lane != q) continue;
        factor[row][q] = q < job.r ? sum[q] : 0.0f;
        if (strip == d_strips && q < job.r) job.dz[row * job.r + q] = sum[q];
      }
      if (strip == d_strips && lane == 0) job.top[row] = top;
    }
  }
  __syncthreads();
  const float* values = of_d ? job.grad : job.x;
  const int64_t stride = of_d ? job.grad_stride : job.x_stride;
  const int columns = of_d ? job.d : job.k, first = (of_d ? strip : strip - d_strips) * kColumns;
  float sum[rank + 1] = {};
  if (first + lane < columns) {
#pragma unroll 4
    for (int row = warp; row < job.n; row += kWarps) {
      const float v = values[row * stride + first + lane];
#pragma unroll
      for (int q = 0; q < rank; ++q) sum[q] = fma_(v, factor[row][q], sum[q]);
      sum[rank] += v;
    }
  }
#pragma unroll
  for (int q = 0; q <= rank; ++q) part[warp][lane][q] = sum[q];
  __syncthreads();
  for (int i = int(threadIdx.x); i < kColumns * (rank + 1); i += kThreads) {
    // Of d a thread's neighbours take the ranks of a column, of x the columns of a rank: as the gradients lie in
    // memory.
    const int column = of_d ? i / (rank + 1) : i % kColumns, q = of_d ? i % (rank + 1) : i / kColumns;
    if (first + column >= columns) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += part[w][column][q];
    if (q < job.r) {
      (of_d ? job.grad_a[(first + column) * job.r + q] : job.grad_b[int64_t(q) * job.k + first + column]) = total;
    } else if (of_d && q == rank) {
      job.grad_bias[first + column] = total;
    }
  }
}

}  // namespace

void small_project(const SmallProjectJob& job, Stream handle) {
  if (job.n == 0) return;
  const auto kernel = job.r <= 8 ? project_small<8> : project_small<16>;
  kernel<<<unsigned(blocks_of(job.n, kWarps)), kThreads, 0, native(handle)>>>(job);
  check(cudaGetLastError(), "project");
}

void small_gradients(const FactorJob& job, Stream handle) {
  const auto kernel = job.r <= 8 ? factor_gradients<8> : factor_gradients<16>;
  kernel<<<unsigned(blocks_of(job.d, kColumns) + blocks_of(job.k, kColumns)), kThreads, 0, native(handle)>>>(job);
  check(cudaGetLastError(), "factor_gradients");
}

}  // namespace lrtt::cuda
