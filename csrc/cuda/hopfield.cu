// Relaxation of a layered Hopfield network (hopfield.h) as one kernel for a whole window.
//
// A block owns kUnits units, whose weights it keeps in shared memory for all steps, and kSamples samples at a time. Its
// warps take a slice of the inputs each. States travel through the second-level cache; samples do not see each other,
// so only the blocks of the same samples wait for each other. They are all resident (a cooperative launch).
#include "common.cuh"
#include "../hopfield.h"

namespace lrtt::cuda {
namespace {

constexpr int kUnits = 32, kSamples = 16, kWarp = 32, kThreads = kWarp * kSlices;
constexpr int kSide = 4;   // a thread makes kSide x kSide products at a time
constexpr int kLine = 32;  // counters are a cache line apart

// Rows of states in shared memory are an odd multiple of 4 floats apart, so that four rows lie in different banks.
__host__ __device__ inline int row_stride(int size) { return size % 8 ? size : size + 4; }

// Floats that one warp needs for its slice of states; afterwards they hold its kSamples x kUnits sums.
__host__ __device__ inline int warp_floats(int size) {
  const int states = kSamples * row_stride(size);
  return states > kSamples * kUnits ? states : kSamples * kUnits;
}

size_t shared_bytes(int inputs) {
  const int size = slice_size(inputs);
  return sizeof(float) * kSlices * (size_t(size) * kUnits + size_t(warp_floats(size)));
}

struct Grid {
  int odd_tiles, tiles;  // of units; blocks with the same samples are neighbours
  int sample_tiles, groups;
};

Grid grid_of(const HopfieldJob& job, int64_t resident) {
  Grid g{};
  g.odd_tiles = int(blocks_of(job.odd, kUnits));
  g.tiles = g.odd_tiles + int(blocks_of(job.even, kUnits));
  g.sample_tiles = int(blocks_of(job.samples, kSamples));
  const int64_t room = resident / g.tiles;
  g.groups = int(room < g.sample_tiles ? room : g.sample_tiles);
  return g;
}

// The units of one block.
struct Tile {
  bool is_odd;
  int first, units, inputs;  // first unit, units of the group, inputs of each
};

// weights[input][unit], zeros beyond the last input or unit.
__device__ void load_weights(const HopfieldJob& job, const Tile& tile, int size, float* weights) {
#pragma unroll 16
  for (int i = threadIdx.x; i < kSlices * size * kUnits; i += kThreads) {
    // Odd units own rows of M: a warp takes 4 inputs of 8 rows, a compromise between reading and writing in order.
    const int input = tile.is_odd ? i / 128 * 4 + i / 8 % 4 : i / kUnits;
    const int unit = tile.is_odd ? i / 32 % 4 * 8 + i % 8 : i % kUnits, u = tile.first + unit;
    float w = 0.0f;
    if (input < tile.inputs && u < tile.units)
      w = tile.is_odd ? job.matrix[int64_t(u) * job.even + input] : job.matrix[int64_t(input) * job.even + u];
    weights[input * kUnits + unit] = w;
  }
}

// This warp's slice of the states of kSamples samples.
__device__ void load_states(const HopfieldJob& job, const Tile& tile, const float* states, int64_t sample0, int size,
                            float* mine) {
  const int lane = threadIdx.x % kWarp, input0 = int(threadIdx.x) / kWarp * size, stride = row_stride(size);
#pragma unroll 2
  for (int k = lane; k < size; k += kWarp) {
    float value[kSamples];
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      const bool inside = input0 + k < tile.inputs && sample0 + s < job.samples;
      value[s] = inside ? fresh(states + (sample0 + s) * tile.inputs + input0 + k) : 0.0f;
    }
#pragma unroll
    for (int s = 0; s < kSamples; ++s) mine[s * stride + k] = value[s];
  }
}

// This warp's slice of the sums of all outputs of the block, into mine[sample][unit].
__device__ void multiply(const float* weights, int size, float* mine) {
  const int lane = threadIdx.x % kWarp, unit = lane % 8 * kSide, sample = lane / 8, stride = row_stride(size);
  float acc[kSide][kSide] = {};
  for (int k = 0; k < size; k += 4) {
    float4 x[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) x[i] = *reinterpret_cast<const float4*>(mine + (sample + 4 * i) * stride + k);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const float4 w = *reinterpret_cast<const float4*>(weights + (k + kk) * kUnits + unit);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const float v = kk == 0 ? x[i].x : kk == 1 ? x[i].y : kk == 2 ? x[i].z : x[i].w;
        acc[i][0] = fma_(v, w.x, acc[i][0]);
        acc[i][1] = fma_(v, w.y, acc[i][1]);
        acc[i][2] = fma_(v, w.z, acc[i][2]);
        acc[i][3] = fma_(v, w.w, acc[i][3]);
      }
    }
  }
  __syncwarp();  // the states have been read; their place takes the sums
#pragma unroll
  for (int i = 0; i < kSide; ++i)
    *reinterpret_cast<float4*>(mine + (sample + 4 * i) * kUnits + unit) =
        make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

// Adds the slices and writes the new states of the block's units.
__device__ void finish(const HopfieldJob& job, const Tile& tile, const float* sums, int floats, int64_t sample0,
                       const float* old, float* next) {
  const int hidden = tile.units - (bool(job.outputs_are_odd) == tile.is_odd ? job.outputs : 0);
  for (int e = threadIdx.x; e < kSamples * kUnits; e += kThreads) {
    const int u = tile.first + e % kUnits;
    const int64_t n = sample0 + e / kUnits;
    if (u >= tile.units || n >= job.samples) continue;
    const float* s = sums + e;
    const float total = slices_sum(s[0], s[floats], s[2 * floats], s[3 * floats], s[4 * floats], s[5 * floats],
                                   s[6 * floats], s[7 * floats]);
    const int64_t row = n * tile.units;
    const float drive = tile.is_odd ? job.odd_drive[row + u] : job.even_drive[u];
    next[row + u] = u < hidden ? apply_rho(job.rho, total + drive)
                               : output_state(job, n, u - hidden, total + drive, old + row + hidden);
  }
}

// Until `target` blocks of the group have arrived. The counter only rises.
__device__ void wait(uint32_t* counter, uint32_t target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    uint32_t seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    hopfield_kernel(const __grid_constant__ HopfieldJob job, const Grid grid, uint32_t* counters) {
  extern __shared__ float4 shared_floats[];
  const int number = int(blockIdx.x) % grid.tiles, group = int(blockIdx.x) / grid.tiles;
  const bool is_odd = number < grid.odd_tiles;
  const Tile tile{is_odd, (is_odd ? number : number - grid.odd_tiles) * kUnits, is_odd ? job.odd : job.even,
                  is_odd ? job.even : job.odd};
  const int size = slice_size(tile.inputs), floats = warp_floats(size), warp = int(threadIdx.x) / kWarp;
  float* weights = reinterpret_cast<float*>(shared_floats);
  float* sums = weights + kSlices * size * kUnits;
  load_weights(job, tile, size, weights);
  __syncthreads();
  uint32_t arrived = 0;
  const float *odd = job.start_odd, *even = job.start_even;
  for (int step = 0; step < job.steps; ++step) {
    const bool last = (job.steps - 1 - step) % 2 == 0;
    float *next_odd = last ? job.new_odd : job.spare_odd, *next_even = last ? job.new_even : job.spare_even;
    for (int turn = 0; turn <= job.in_turn; ++turn) {
      if (!job.in_turn || is_odd == (turn == 0)) {
        const float* source = is_odd ? even : job.in_turn ? next_odd : odd;
        for (int t = group; t < grid.sample_tiles; t += grid.groups) {
          const int64_t sample0 = int64_t(t) * kSamples;
          float* mine = sums + warp * floats;
          load_states(job, tile, source, sample0, size, mine);
          __syncwarp();
          multiply(weights + warp * size * kUnits, size, mine);
          __syncthreads();
          finish(job, tile, sums, floats, sample0, is_odd ? odd : even, is_odd ? next_odd : next_even);
          __syncthreads();  // before the next states take the place of the sums
        }
      }
      if (step + 1 < job.steps || turn < job.in_turn) wait(counters + group * kLine, arrived += uint32_t(grid.tiles));
    }
    odd = next_odd;
    even = next_even;
  }
}

// Blocks of this network that are resident at a time; 0 if its weights do not fit in shared memory.
int64_t resident_blocks(int odd, int even) {
  const size_t bytes = shared_bytes(odd > even ? odd : even);
  int device = 0, most = 0, blocks = 0, cooperative = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  if (!cooperative || bytes > size_t(most)) return 0;
  check(cudaFuncSetAttribute(hopfield_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "hopfield");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, hopfield_kernel, kThreads, bytes), "hopfield");
  return int64_t(blocks) * processors();
}

}  // namespace

bool hopfield_fits(int odd, int even) {
  return resident_blocks(odd, even) >= blocks_of(odd, kUnits) + blocks_of(even, kUnits);
}

size_t hopfield_bytes(int64_t samples) { return size_t(blocks_of(samples, kSamples)) * kLine * sizeof(uint32_t); }

void hopfield_window(const HopfieldJob& job, void* workspace, Stream handle) {
  if (job.samples == 0) return;
  const cudaStream_t stream = native(handle);
  const Grid grid = grid_of(job, resident_blocks(job.odd, job.even));
  if (grid.groups < 1)
    throw std::runtime_error(
        "lightning_lrtt: hopfield_window: the weights must fit in shared memory; ask hopfield_fits");
  check(cudaMemsetAsync(workspace, 0, hopfield_bytes(job.samples), stream), "hopfield_window");
  HopfieldJob copy = job;
  uint32_t* counters = static_cast<uint32_t*>(workspace);
  Grid shape = grid;
  void* arguments[] = {&copy, &shape, &counters};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(hopfield_kernel),
                                    dim3(unsigned(grid.tiles * grid.groups)), dim3(kThreads), arguments,
                                    shared_bytes(job.odd > job.even ? job.odd : job.even), stream),
        "hopfield_window");
}

}  // namespace lrtt::cuda
