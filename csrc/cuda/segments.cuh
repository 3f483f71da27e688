// Segment sums of one block of a parameter. A thread owns four neighbouring lanes, which it loads with 128 bits, and
// takes all their rows: so one pass over the slots gives the sum, the norms and the flags, and the lanes' sums stay in
// registers.
#pragma once

#include "common.cuh"

namespace lrtt::cuda {

constexpr int kFour = 4;
constexpr int kThreads = kSegmentLanes / kFour, kRows = kSegmentBlock / kSegmentLanes;
constexpr int kLoads = 12;  // slots in flight
constexpr int kDepth = 4;   // of a stack in registers; the tree of 12 segments needs 4

struct DeviceSegments {
  SegmentJob job;  // slots and out point into scratch memory
  int64_t first_block;
};

struct Call {
  const DeviceSegments* table;
  int count, steps;
  const SegmentStep* program;
  const double *weights, *scale;
  double* square;  // [steps, blocks]; null: no norms wanted
  int* bad;        // [steps, blocks]
  int64_t blocks;
  int redo;
};

template <class T>
struct alignas(16) Four {
  T v[kFour];
};

// Elements e to e + 3, zeros past the end.
template <class T>
__device__ __forceinline__ Four<T> load(const T* from, int64_t e, const SegmentJob& job) {
  Four<T> value{};
  if (from == nullptr) return value;
  if (job.aligned && e + kFour <= job.size) return *reinterpret_cast<const Four<T>*>(from + e);
#pragma unroll
  for (int j = 0; j < kFour; ++j)
    if (e + j < job.size) value.v[j] = from[e + j];
  return value;
}

template <class T>
__device__ __forceinline__ void store(T* to, int64_t e, const SegmentJob& job, const Four<T>& value) {
  if (job.aligned && e + kFour <= job.size) {
    *reinterpret_cast<Four<T>*>(to + e) = value;
    return;
  }
#pragma unroll
  for (int j = 0; j < kFour; ++j)
    if (e + j < job.size) to[e + j] = value.v[j];
}

// The square of a float is exact in a double: fused or not, the bits are the same.
__device__ __forceinline__ void add_square(double& sum, float v) { sum = __fma_rn(double(v), double(v), sum); }
__device__ __forceinline__ void add_square(double& sum, double v) { sum += v * v; }

template <class T>
__device__ __forceinline__ void weigh(Four<T>& value, double weight) {
  if (weight == 1.0) return;
#pragma unroll
  for (int j = 0; j < kFour; ++j) value.v[j] = weight == 0.0 ? T(0) : value.v[j] * T(weight);
}

// tree_sum<kSegmentLanes> of a block of threads that hold four lanes each: 128 and 64 to 4 lanes away are other
// threads. Only thread 0 has the result.
__device__ __forceinline__ double tree_of_lanes(double (&own)[kFour], double (*upper)[kFour]) {
  static_assert(kThreads == 64, "two warps");
  const int t = int(threadIdx.x);
  __syncthreads();
  if (t >= 32) {
#pragma unroll
    for (int j = 0; j < kFour; ++j) upper[t - 32][j] = own[j];
  }
  __syncthreads();
  if (t >= 32) return 0.0;
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    own[j] += upper[t][j];
#pragma unroll
    for (int half = 16; half > 0; half /= 2) own[j] += __shfl_down_sync(0xffffffffu, own[j], half);
  }
  return (own[0] + own[2]) + (own[1] + own[3]);
}

__device__ void put(const Call& call, int s, int64_t number, double total, int bad) {
  if (threadIdx.x != 0) return;
  call.square[int64_t(s) * call.blocks + number] = total;
  call.bad[int64_t(s) * call.blocks + number] = bad;
}

// Up to kLoads slots of floats whose sum needs kDepth values at a time: everything in one pass.
template <bool norms>
__device__ void one_pass(const Call& call, const SegmentJob& job, int64_t base, int64_t number) {
  __shared__ const float* slots[kLoads];
  __shared__ float* out[kLoads];
  __shared__ double weights[kLoads];
  __shared__ SegmentStep program[kLoads];
  if (int(threadIdx.x) < call.steps) {
    const int s = int(threadIdx.x);
    slots[s] = static_cast<const float*>(job.slots[s]);
    weights[s] = call.weights[s];
    program[s] = call.program[s];
    int node = 0;
    for (int before = 0; before < s; ++before) node += call.program[before].emit;
    out[s] = program[s].emit ? static_cast<float*>(job.out[node]) : nullptr;
  }
  __syncthreads();
  const float scale = float(*call.scale);
  double square[kLoads][kFour] = {};
  for (int i = 0; i < kRows; ++i) {
    const int64_t e = base + i * kSegmentLanes;
    if (e >= job.size) break;
    Four<float> value[kLoads];
#pragma unroll
    for (int s = 0; s < kLoads; ++s)
      if (s < call.steps) value[s] = load(slots[s], e, job);
    Four<float> stack[kDepth] = {};  // the topmost first
#pragma unroll
    for (int s = 0; s < kLoads; ++s) {
      if (s >= call.steps) break;
      if (norms) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) add_square(square[s][j], value[s].v[j]);
      }
      weigh(value[s], weights[s]);
#pragma unroll
      for (int k = kDepth - 1; k > 0; --k) stack[k] = stack[k - 1];
      stack[0] = value[s];
      for (int a = 0; a < program[s].adds; ++a) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) stack[0].v[j] = stack[1].v[j] + stack[0].v[j];
#pragma unroll
        for (int k = 1; k + 1 < kDepth; ++k) stack[k] = stack[k + 1];
      }
      if (program[s].emit) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) stack[0].v[j] *= scale;
        store(out[s], e, job, stack[0]);
#pragma unroll
        for (int k = 0; k + 1 < kDepth; ++k) stack[k] = stack[k + 1];
      }
    }
  }
  if constexpr (norms) {
    __shared__ double upper[32][kFour];
#pragma unroll
    for (int s = 0; s < kLoads; ++s) {
      if (s >= call.steps) break;
      const double total = tree_of_lanes(square[s], upper);
      put(call, s, number, total, not_finite(total));  // squares of finite floats cannot overflow a double
    }
  }
}

// Any number of slots: first the norms, then the sums, of a block that the caches hold by then.
template <class T>
__device__ void two_passes(const Call& call, const SegmentJob& job, int64_t base, int64_t number) {
  __shared__ double upper[32][kFour];
  for (int s = 0; call.square != nullptr && s < call.steps; ++s) {
    double square[kFour] = {};
    bool bad = false;
    for (int i = 0; i < kRows; ++i) {
      const int64_t e = base + i * kSegmentLanes;
      if (e >= job.size) break;
      const Four<T> value = load(static_cast<const T*>(job.slots[s]), e, job);
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        bad |= not_finite(value.v[j]);
        add_square(square[j], value.v[j]);
      }
    }
    const int any = __syncthreads_or(bad);
    put(call, s, number, tree_of_lanes(square, upper), any);
  }
  const T scale = T(*call.scale);
  for (int i = 0; i < kRows; ++i) {
    const int64_t e = base + i * kSegmentLanes;
    if (e >= job.size) return;
    Four<T> stack[kSegmentDepth];
    int depth = 0, node = 0;
    for (int first = 0; first < call.steps; first += kLoads) {
      Four<T> value[kLoads];
#pragma unroll
      for (int s = 0; s < kLoads; ++s)
        if (first + s < call.steps) value[s] = load(static_cast<const T*>(job.slots[first + s]), e, job);
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        if (first + s >= call.steps) break;
        const SegmentStep step = call.program[first + s];
        weigh(value[s], call.weights[first + s]);
        stack[depth++] = value[s];
        for (int a = 0; a < step.adds; ++a) {
          --depth;
#pragma unroll
          for (int j = 0; j < kFour; ++j) stack[depth - 1].v[j] += stack[depth].v[j];
        }
        if (step.emit) {
          --depth;
#pragma unroll
          for (int j = 0; j < kFour; ++j) stack[depth].v[j] *= scale;
          store(static_cast<T*>(job.out[node++]), e, job, stack[depth]);
        }
      }
    }
  }
}

}  // namespace lrtt::cuda
