// Small float32 layers, whose sums take less time than launches: all of a layer's forward pass in one launch, all of
// its backward pass in another. C + alpha A B is made where it is multiplied by, and never stored.
#include "common.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLanes = 16;                        // neighbouring threads that share sums
constexpr int kEach = 4;                          // rows of a thread, and columns of a group of sums
constexpr int kRows = kThreads / kLanes * kEach;  // of a thread block
constexpr int kTurn = 4 * kLanes;                 // elements that the lanes take at a time
constexpr int kStrip = 32;                        // columns of d or x for whose gradients a thread block cares

__host__ __device__ __forceinline__ int whole_turns(int length) { return (length + kTurn - 1) / kTurn * kTurn; }

// Rows in memory, zero beyond their ends. `whole`: four neighbours are one load.
template <bool whole>
struct Matrix {
  const float* at;
  int64_t stride;
  int rows, length;

  __device__ __forceinline__ float4 four(int row, int column) const {
    if (row >= rows || column >= length) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* p = at + row * stride + column;
    if constexpr (whole) {
      return *reinterpret_cast<const float4*>(p);
    } else {
      const int left = length - column;
      return make_float4(p[0], left > 1 ? p[1] : 0.0f, left > 2 ? p[2] : 0.0f, left > 3 ? p[3] : 0.0f);
    }
  }
};

bool whole_rows(const float* p, int64_t stride, int length) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 4 == 0 && length % 4 == 0;
}

__device__ __forceinline__ void multiply_add(float factor, const float4& v, float4& sum) {
  sum.x = fma_(factor, v.x, sum.x);
  sum.y = fma_(factor, v.y, sum.y);
  sum.z = fma_(factor, v.z, sum.z);
  sum.w = fma_(factor, v.w, sum.w);
}

// A thread's part of kEach rows of v times 4 * groups rows of weights in shared memory: every kLanes-th four elements.
// sum[g][4 i + c]: row i of v with row 4 g + c of weights; top[i]: the largest magnitude_bits of row i.
template <int groups, int ahead>
struct Product {
  static constexpr int kAhead = ahead;  // turns whose loads are under way
  float4 next[kAhead][kEach];
  float sum[groups][kEach * 4];
  uint32_t top[kEach];
  int first, lane;

  template <bool whole>
  __device__ __forceinline__ void begin(const Matrix<whole>& v, int first_row) {
    first = first_row + int(threadIdx.x) / kLanes * kEach;
    lane = int(threadIdx.x) % kLanes;
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
#pragma unroll
      for (int i = 0; i < kEach; ++i) next[u][i] = v.four(first + i, u * kTurn + 4 * lane);
  }

  template <bool whole>
  __device__ __forceinline__ void run(const Matrix<whole>& v, const float* weights, int length) {
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int e = 0; e < kEach * 4; ++e) sum[g][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) top[i] = 0;
#pragma unroll 1
    for (int turn = 0; turn < length; turn += kAhead * kTurn) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int here = turn + u * kTurn;
        if (here >= length) break;
        float4 element[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          element[i] = next[u][i];
          next[u][i] = v.four(first + i, here + kAhead * kTurn + 4 * lane);
          top[i] = max(max(top[i], max(magnitude_bits(element[i].x), magnitude_bits(element[i].y))),
                       max(magnitude_bits(element[i].z), magnitude_bits(element[i].w)));
        }
#pragma unroll
        for (int g = 0; g < groups; ++g)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float4 w = *reinterpret_cast<const float4*>(weights + (4 * g + c) * length + here + 4 * lane);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
              float& s = sum[g][4 * i + c];
              s = fma_(element[i].x, w.x, s);
              s = fma_(element[i].y, w.y, s);
              s = fma_(element[i].z, w.z, s);
              s = fma_(element[i].w, w.w, s);
            }
          }
      }
    }
  }

  // Lanes pass on half of what they have, and half of that, ...
  template <int half>
  __device__ __forceinline__ void fold(float (&s)[kEach * 4]) const {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int e = 0; e < half; ++e) {
      const float kept = upper ? s[e + half] : s[e], given = upper ? s[e] : s[e + half];
      s[e] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    }
    if constexpr (half > 1) fold<half / 2>(s);
  }

  // The sixteen sums of a group over all lanes, one a lane: that of row first + lane / 4 and weights 4 g + lane % 4.
  __device__ __forceinline__ float total(int g) {
    float s[kEach * 4];
#pragma unroll
    for (int e = 0; e < kEach * 4; ++e) s[e] = sum[g][e];
    fold<kLanes / 2>(s);
    return s[0];
  }

  // Writes the tops of rows below n.
  __device__ __forceinline__ void store_tops(uint32_t* to, int n) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int half = kLanes / 2; half > 0; half /= 2) top[i] = max(top[i], __shfl_xor_sync(0xffffffffu, top[i], half));
      if (lane == i && first + i < n) to[first + i] = top[i];
    }
  }
};

// ------------------------------------------------------------------ forward

// Thread blocks take kRows samples and four columns of y, or of z.
template <int rank, bool whole>
__global__ void __launch_bounds__(kThreads, 1) small_forward(const SmallForwardJob job) {
  extern __shared__ float4 memory[];
  __shared__ float a[kEach][rank];
  const SmallLayer& layer = job.layer;
  float* weights = reinterpret_cast<float*>(memory);
  const int d_tiles = (layer.d + 3) / 4, tile = int(blockIdx.x), length = whole_turns(layer.k);
  const bool of_z = tile >= d_tiles;
  const int column = 4 * (of_z ? tile - d_tiles : tile), columns = of_z ? layer.r : layer.d;
  const Matrix<whole> x{job.x, job.x_stride, job.n, layer.k}, b{layer.b, layer.k, layer.r, layer.k},
      base{of_z ? layer.b : layer.c, layer.k, columns, layer.k};
  Product<1, 4> product;
  product.begin(x, int(blockIdx.y) * kRows);
  for (int i = int(threadIdx.x); i < kEach * rank; i += kThreads) {
    const int row = column + i / rank, q = i % rank;
    a[i / rank][q] = !of_z && row < layer.d && q < layer.r ? layer.alpha * layer.a[row * layer.r + q] : 0.0f;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < length / 2; i += kThreads) {  // four neighbours of two rows
    const int row = i / (length / 4) * 2, at = i % (length / 4) * 4;
    float4 low = base.four(column + row, at), high = base.four(column + row + 1, at);
    if (!of_z) {
#pragma unroll
      for (int q = 0; q < rank; ++q) {
        const float4 v = b.four(q, at);
        multiply_add(a[row][q], v, low);
        multiply_add(a[row + 1][q], v, high);
      }
    }
    *reinterpret_cast<float4*>(weights + row * length + at) = low;
    *reinterpret_cast<float4*>(weights + (row + 1) * length + at) = high;
  }
  __syncthreads();
  product.run(x, weights, length);
  const float total = product.total(0);
  const int row = product.first + product.lane / 4, at = column + product.lane % 4;
  if (row < job.n && at < columns)
    (of_z ? job.z : job.y)[int64_t(row) * columns + at] = !of_z && job.bias ? total + job.bias[at] : total;
  if (of_z && column == 0) product.store_tops(job.top, job.n);
}

// ------------------------------------------------------------------ backward

// Floats in front of the factors of all samples: weights, and later the warps' parts of sums.
__host__ __device__ __forceinline__ int front(int rank, int length) {
  const int weights = 8 * length, parts = kWarps * kStrip * (rank + 1);
  return weights > parts ? weights : parts;
}

// sum over samples of v[:, first .. first + kStrip - 1] times `factor` [n][rank] in shared memory (or times 1: the last
// one): a warp adds up every kWarps-th sample. take(column, q, sum) gets them; `along`: threads that are neighbours
// take columns that are, or else ranks.
template <int rank, bool whole, class Take>
__device__ __forceinline__ void sum_over_samples(const Matrix<whole>& v, int first, const float* factor, float* parts,
                                                 bool along, const Take& take) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  float sum[rank + 1] = {};
  if (first + lane < v.length) {
#pragma unroll 8
    for (int row = warp; row < v.rows; row += kWarps) {
      const float element = v.at[row * v.stride + first + lane];
#pragma unroll
      for (int q = 0; q < rank; ++q) sum[q] = fma_(element, factor[row * rank + q], sum[q]);
      sum[rank] += element;
    }
  }
#pragma unroll
  for (int q = 0; q <= rank; ++q) parts[(warp * kStrip + lane) * (rank + 1) + q] = sum[q];
  __syncthreads();
  for (int i = int(threadIdx.x); i < kStrip * (rank + 1); i += kThreads) {
    const int column = along ? i % kStrip : i / (rank + 1), q = along ? i / kStrip : i % (rank + 1);
    if (first + column >= v.length) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += parts[(w * kStrip + column) * (rank + 1) + q];
    take(first + column, q, total);
  }
}

// D A of all samples, and from it the gradient of B in a strip of columns. The first strip stores D A.
template <int rank, bool whole>
__device__ __forceinline__ void gradient_of_b(const SmallBackwardJob& job, int strip, float* memory) {
  const SmallLayer& layer = job.layer;
  const int length = whole_turns(layer.d);
  float *weights = memory, *factor = memory + front(rank, length);
  const Matrix<whole> d{job.grad, job.grad_stride, job.n, layer.d}, x{job.x, job.x_stride, job.n, layer.k};
  Product<2, 1> product;
#pragma unroll 1
  for (int q0 = 0; q0 < rank; q0 += 8) {
    product.begin(d, 0);
    if (q0 > 0) __syncthreads();  // the weights before are done with
    for (int i = int(threadIdx.x); i < length; i += kThreads) {
#pragma unroll
      for (int q = 0; q < 8; ++q)
        weights[q * length + i] = i < layer.d && q0 + q < layer.r ? layer.a[i * layer.r + q0 + q] : 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < job.n; first += kRows) {
      if (first > 0) product.begin(d, first);
      product.run(d, weights, length);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float total = product.total(g);
        const int row = product.first + product.lane / 4, q = q0 + 4 * g + product.lane % 4;
        if (row >= job.n) continue;
        factor[row * rank + q] = total;
        if (strip == 0 && q < layer.r) job.dz[row * layer.r + q] = total;
      }
      if (strip == 0 && q0 == 0) product.store_tops(job.top, job.n);
    }
  }
  __syncthreads();
  sum_over_samples<rank, whole>(x, strip * kStrip, factor, memory, true, [&](int column, int q, float total) {
    if (q >= layer.r) return;
    const int64_t at = int64_t(q) * layer.k + column;
    job.grad_b[at] = job.first_b[at] = layer.alpha * total;
  });
}

// The gradients of A and of the bias in a strip of columns of D.
template <int rank, bool whole>
__device__ __forceinline__ void gradient_of_a(const SmallBackwardJob& job, int strip, float* memory) {
  const SmallLayer& layer = job.layer;
  float* factor = memory + front(rank, whole_turns(layer.d));
  for (int i = int(threadIdx.x); i < job.n * rank; i += kThreads) {
    const int q = i % rank;
    factor[i] = q < layer.r ? job.z[i / rank * layer.r + q] : 0.0f;
  }
  __syncthreads();
  const Matrix<whole> d{job.grad, job.grad_stride, job.n, layer.d};
  sum_over_samples<rank, whole>(d, strip * kStrip, factor, memory, false, [&](int column, int q, float total) {
    if (q == rank) job.grad_bias[column] = total;
    if (q >= layer.r) return;
    const int64_t at = int64_t(column) * layer.r + q;
    job.grad_a[at] = job.first_a[at] = layer.alpha * total;
  });
}

// The gradient of x for kRows samples and four columns.
template <int rank, bool whole>
__device__ __forceinline__ void gradient_of_x(const SmallBackwardJob& job, int column, int first, float* memory) {
  const SmallLayer& layer = job.layer;
  const int length = whole_turns(layer.d);
  float *weights = memory, *b = memory + 4 * length;
  const Matrix<whole> d{job.grad, job.grad_stride, job.n, layer.d}, c{layer.c, layer.k, layer.d, layer.k};
  Product<1, 2> product;
  product.begin(d, first);
  for (int i = int(threadIdx.x); i < 4 * rank; i += kThreads) {
    const int q = i / 4, at = column + i % 4;
    b[i] = q < layer.r && at < layer.k ? layer.b[int64_t(q) * layer.k + at] : 0.0f;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < length; i += kThreads) {
    float4 sum = c.four(i, column);
#pragma unroll
    for (int q = 0; q < rank; ++q) {
      const float a = i < layer.d && q < layer.r ? layer.alpha * layer.a[i * layer.r + q] : 0.0f;
      multiply_add(a, *reinterpret_cast<const float4*>(b + 4 * q), sum);
    }
    weights[i] = sum.x;
    weights[length + i] = sum.y;
    weights[2 * length + i] = sum.z;
    weights[3 * length + i] = sum.w;
  }
  __syncthreads();
  product.run(d, weights, length);
  const float total = product.total(0);
  const int row = product.first + product.lane / 4, at = column + product.lane % 4;
  if (row < job.n && at < layer.k) job.grad_x[int64_t(row) * layer.k + at] = total;
}

// The longest tasks come first.
template <int rank, bool whole>
__global__ void __launch_bounds__(kThreads, 2) small_backward(const SmallBackwardJob job) {
  extern __shared__ float4 memory[];
  float* floats = reinterpret_cast<float*>(memory);
  const int k_strips = (job.layer.k + kStrip - 1) / kStrip, d_strips = (job.layer.d + kStrip - 1) / kStrip;
  int block = int(blockIdx.x);
  if (block < k_strips) return gradient_of_b<rank, whole>(job, block, floats);
  block -= k_strips;
  if (block < d_strips) return gradient_of_a<rank, whole>(job, block, floats);
  block -= d_strips;
  const int tiles = (job.layer.k + 3) / 4;
  gradient_of_x<rank, whole>(job, block % tiles * 4, block / tiles * kRows, floats);
}

}  // namespace

void forward(const SmallForwardJob& job, Stream handle) {
  const SmallLayer& layer = job.layer;
  const bool whole = whole_rows(job.x, job.x_stride, layer.k) && whole_rows(layer.b, layer.k, layer.k) &&
                     whole_rows(layer.c, layer.k, layer.k);
  const auto kernel = layer.r <= 8 ? (whole ? small_forward<8, true> : small_forward<8, false>)
                                   : (whole ? small_forward<16, true> : small_forward<16, false>);
  const dim3 grid(unsigned(blocks_of(layer.d, 4) + blocks_of(layer.r, 4)), unsigned(blocks_of(job.n, kRows)));
  kernel<<<grid, kThreads, sizeof(float) * 4 * size_t(whole_turns(layer.k)), native(handle)>>>(job);
  check(cudaGetLastError(), "small_forward");
}

void backward(const SmallBackwardJob& job, Stream handle) {
  const SmallLayer& layer = job.layer;
  const bool whole = whole_rows(job.grad, job.grad_stride, layer.d) && whole_rows(layer.c, layer.k, layer.k);
  const auto kernel = layer.r <= 8 ? (whole ? small_backward<8, true> : small_backward<8, false>)
                                   : (whole ? small_backward<16, true> : small_backward<16, false>);
  const int rank = layer.r <= 8 ? 8 : 16;
  const size_t floats = size_t(front(rank, whole_turns(layer.d))) + size_t(job.n) * size_t(rank);
  const int64_t tiles = job.grad_x ? blocks_of(layer.k, 4) * blocks_of(job.n, kRows) : 0;
  const int64_t blocks = blocks_of(layer.k, kStrip) + blocks_of(layer.d, kStrip) + tiles;
  kernel<<<unsigned(blocks), kThreads, sizeof(float) * floats, native(handle)>>>(job);
  check(cudaGetLastError(), "small_backward");
}

}  // namespace lrtt::cuda
