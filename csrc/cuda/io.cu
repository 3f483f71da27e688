// Converters on the device (io.h): one block a sample, so that its scale and its clip flag need no second launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"

namespace lrtt::cuda {
namespace {

constexpr int kThreads = kReadLanes;  // thread l is lane l of the sums

template <class T>
__device__ __forceinline__ float widen(T v) {
  return float(v);
}

// The tree of tree_sum<kReadLanes> over one number a thread.
__device__ double block_tree(double v, double* lane) {
  __syncthreads();  // before lane is used again
  lane[threadIdx.x] = v;
  for (int half = kReadLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) lane[threadIdx.x] += lane[threadIdx.x + half];
  }
  __syncthreads();
  return lane[0];
}

template <class Job>
__device__ __forceinline__ ReadId id_of(const Job& job, int64_t s) {
  return ReadId{uint64_t(job.state[kKey]), uint32_t(job.first_sample + s), uint32_t(*job.ticket), uint32_t(job.array),
                uint32_t(job.round)};
}

// The words of elements group(i), group(i) + 16, + 32, + 48; i counts Philox calls.
__device__ __forceinline__ int first_element(int i) { return i / 16 * 64 + i % 16; }

template <class X, class U>
__global__ void __launch_bounds__(kThreads) input_kernel(const InputJob job) {
  __shared__ double lane[kReadLanes];
  __shared__ uint32_t top;
  const int64_t s = blockIdx.x;
  const int t = int(threadIdx.x), n = job.n;
  const IoNumbers& io = job.io;
  const X* x = static_cast<const X*>(job.x) + s * job.stride;
  U* u = static_cast<U*>(job.u) + s * n;
  if (job.pending != nullptr && job.pending[s] == 0) {
    for (int e = t; e < n; e += kThreads) u[e] = U(0.0f);
    if (t == 0) job.per[s] = job.per[job.samples + s] = 0.0f;
    return;
  }
  uint32_t largest = 0;
  if (io.management == float(kAbsMax)) {
    if (t == 0) top = 0;
    __syncthreads();
    for (int e = t; e < n; e += kThreads) {
      const uint32_t b = magnitude_bits(widen(x[e]));
      largest = b > largest ? b : largest;
    }
    largest = warp_max(largest);
    if (t % 32 == 0) atomicMax(&top, largest);
    __syncthreads();
    largest = top;
  }
  double sum = 0.0;
  if (io.worst_case != 0.0f && job.round > 0) {
    double up = 0.0, down = 0.0;
    for (int e = t; e < n; e += kThreads) {
      const float v = widen(x[e]);
      up += double(max_(v, 0.0f));
      down += double(max_(-v, 0.0f));
    }
    const double positive = block_tree(up, lane), negative = block_tree(down, lane);
    sum = positive > negative ? positive : negative;
  }
  const float alpha = read_scale(io, largest, sum, uint32_t(job.round));
  const bool noisy = io.inp_noise != 0.0f && alpha != 0.0f, dithered = io.inp_round == float(kStochastic);
  if (!noisy && !dithered) {
    for (int e = t; e < n; e += kThreads) u[e] = U(dac(io, widen(x[e]), alpha, 0.0f));
  } else {
    const ReadId id = id_of(job, s);
    const int calls = (n + kReadGroup - 1) / kReadGroup * 16;
    for (int i = t; i < calls; i += kThreads) {
      Words xi{}, dither{};
      if (dithered) dither = philox(id.key, uint32_t(i), id.sample, id.ticket, id.c3(kInputRounding));
      if (noisy) xi = philox(id.key, uint32_t(i), id.sample, id.ticket, id.c3(kInputNoise));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = first_element(i) + 16 * k;
        if (e >= n) continue;
        float v = dac(io, widen(x[e]), alpha, dithered ? uniform(dither.w[k]) - 0.5f : 0.0f);
        if (noisy) v = fma_(io.inp_noise, normal(xi.w[k]), v);
        u[e] = U(v);
      }
    }
  }
  float sigma = io.out_noise;
  if (io.w_noise != 0.0f) {
    __syncthreads();  // other threads wrote part of u
    double squares = 0.0;
    for (int e = t; e < n; e += kThreads) squares += double(widen(u[e])) * double(widen(u[e]));
    sigma = read_sigma(io, block_tree(squares, lane));
  }
  if (t == 0) {
    job.per[s] = alpha;
    job.per[job.samples + s] = sigma;
  }
}

__global__ void __launch_bounds__(kThreads) output_kernel(const OutputJob job) {
  const int64_t s = blockIdx.x;
  const int t = int(threadIdx.x), n = job.n;
  if (job.pending != nullptr && job.pending[s] == 0) {
    if (t == 0) job.clipped[s] = 0;
    return;
  }
  const IoNumbers& io = job.io;
  const float alpha = job.per[s], sigma = job.per[job.samples + s];
  const bool noisy = sigma != 0.0f && alpha != 0.0f, dithered = io.out_round == float(kStochastic);
  const ReadId id = id_of(job, s);
  const float* acc = job.acc + s * n;
  float* y = job.y + s * n;
  const int calls = (n + kReadGroup - 1) / kReadGroup * 16;
  int any = 0;
  for (int i = t; i < calls; i += kThreads) {
    Words xi{}, dither{};
    if (noisy) xi = philox(id.key, uint32_t(i), id.sample, id.ticket, id.c3(kOutputNoise));
    if (dithered) dither = philox(id.key, uint32_t(i), id.sample, id.ticket, id.c3(kOutputRounding));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int e = first_element(i) + 16 * k;
      if (e >= n) continue;
      bool over;
      y[e] = adc(io, acc[e], alpha, noisy ? sigma : 0.0f, noisy ? normal(xi.w[k]) : 0.0f,
                 dithered ? uniform(dither.w[k]) - 0.5f : 0.0f, over);
      any |= over;
    }
  }
  any = __syncthreads_or(any);
  if (t == 0) job.clipped[s] = any != 0;
}

// A block makes kTile x kTile products, a thread kEach x kEach of them, kDeep inputs at a time.
constexpr int kTile = 64, kEach = 4, kDeep = 16, kProductThreads = (kTile / kEach) * (kTile / kEach);

template <class U>
__global__ void __launch_bounds__(kProductThreads) product_kernel(const ProductJob job) {
  __shared__ float us[kDeep][kTile + 4], ws[kDeep][kTile + 4];
  const int t = int(threadIdx.x), n = job.n;
  const int64_t s0 = int64_t(blockIdx.x) * kTile, d0 = int64_t(blockIdx.y) * kTile;
  const bool mine = t < kTile && s0 + t < job.samples && job.pending[s0 + t] != 0;
  if (!__syncthreads_or(mine)) return;  // the usual case: nothing of these samples was clipped
  const U* u = static_cast<const U*>(job.u);
  float acc[kEach][kEach] = {};
  const int row = t / (kTile / kEach) * kEach, column = t % (kTile / kEach) * kEach;
  for (int k0 = 0; k0 < n; k0 += kDeep) {
    for (int i = t; i < kTile * kDeep; i += kProductThreads) {
      const int k = i % kDeep, r = i / kDeep;
      const bool inside = k0 + k < n;
      us[k][r] = inside && s0 + r < job.samples ? widen(u[(s0 + r) * n + k0 + k]) : 0.0f;
      ws[k][r] = inside && d0 + r < job.d ? widen(U(job.w[(d0 + r) * n + k0 + k])) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) acc[i][j] = fma_(us[k][row + i], ws[k][column + j], acc[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j)
      if (s0 + row + i < job.samples && d0 + column + j < job.d)
        job.acc[(s0 + row + i) * job.d + d0 + column + j] = acc[i][j];
}

__global__ void ticket_kernel(int64_t* reads, int mode, int64_t* ticket) { *ticket = 2 * reads[mode]++ + mode; }

template <class X>
void launch_input(const InputJob& job, cudaStream_t stream) {
  const unsigned blocks = unsigned(job.samples);
  if (job.u_type == kFloat32) input_kernel<X, float><<<blocks, kThreads, 0, stream>>>(job);
  if (job.u_type == kBFloat16) input_kernel<X, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(job);
  if (job.u_type == kFloat16) input_kernel<X, __half><<<blocks, kThreads, 0, stream>>>(job);
}

}  // namespace

void take_ticket(int64_t* reads, int mode, int64_t* ticket, Stream stream) {
  ticket_kernel<<<1, 1, 0, native(stream)>>>(reads, mode, ticket);
  check(cudaGetLastError(), "io_ticket_");
}

void read_input(const InputJob& job, Stream handle) {
  if (job.samples == 0) return;
  const cudaStream_t stream = native(handle);
  if (job.x_type == kFloat32) launch_input<float>(job, stream);
  if (job.x_type == kBFloat16) launch_input<__nv_bfloat16>(job, stream);
  if (job.x_type == kFloat16) launch_input<__half>(job, stream);
  check(cudaGetLastError(), "io_input");
}

void read_output(const OutputJob& job, Stream stream) {
  if (job.samples == 0) return;
  output_kernel<<<unsigned(job.samples), kThreads, 0, native(stream)>>>(job);
  check(cudaGetLastError(), "io_output_");
}

void read_product(const ProductJob& job, Stream handle) {
  if (job.samples == 0) return;
  const cudaStream_t stream = native(handle);
  const dim3 blocks(unsigned(blocks_of(job.samples, kTile)), unsigned(blocks_of(job.d, kTile)));
  if (job.u_type == kFloat32) product_kernel<float><<<blocks, kProductThreads, 0, stream>>>(job);
  if (job.u_type == kBFloat16) product_kernel<__nv_bfloat16><<<blocks, kProductThreads, 0, stream>>>(job);
  if (job.u_type == kFloat16) product_kernel<__half><<<blocks, kProductThreads, 0, stream>>>(job);
  check(cudaGetLastError(), "io_product");
}

}  // namespace lrtt::cuda
