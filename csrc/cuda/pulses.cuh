// The three stages of a pulsed update on the device, shared by updates (update.cu) and transfers (transfer.cu):
// trains -> streams of bits -> pulses on cells. The bits of the longer side of an update never leave the cell kernel.
#pragma once

#include <cuda_fp16.h>

#include "common.cuh"

namespace lrtt::cuda {

constexpr int kCellThreads = 512;
constexpr int kLongLanes = 32;                          // cells of a warp lie along the longer side
constexpr int kShortRows = kCellThreads / kLongLanes;   // one warp per index of the shorter side

// A PulseJob and its scratch. Streams are [block][word][element].
struct DevicePulse {
  PulseJob job;
  int blocks;                 // of kBlockSamples samples
  int block_words;            // room for one block's stream
  int transfer;               // 1: samples are words of terms (rows), guarded by the transfer predicate
  int along_columns;          // the longer side
  int fused;                  // 1: the long side's bits are made in the cell kernel, not stored
  float eta_sign;             // transfer only; an update reads *eta
  uint32_t* maxima;           // [samples][2]
  Train* trains;              // [blocks][kBlockSamples]
  int* rows;                  // [blocks][kBlockSamples], transfer only
  int* offsets;               // [blocks][kBlockSamples + 1]
  int* words;                 // [blocks]
  uint32_t *x_bits, *x_neg, *d_bits, *d_neg;
  int64_t first_sample_warp, first_plan_block, first_word_block, first_cell_block;
};

// Scratch of one job: plans from `arena`, stored bits from `streams`; `both` stores both sides.
void reserve(DevicePulse& p, Arena& arena, Arena& streams, bool both);

// Work for the stream and the cell kernels, in units of their blocks.
int64_t word_blocks(const DevicePulse& p);
int64_t cell_blocks(const DevicePulse& p);

// The last two stages for a stored table. `fires` is null for updates.
struct Predicate {
  const TransferJob* jobs;  // one per pulse job
  int force;
};
void launch_streams_and_cells(const DevicePulse* table, int count, int64_t word_grid, int64_t cell_grid,
                              Predicate predicate, cudaStream_t stream);

__device__ __forceinline__ bool fires(const TransferJob& job, int force) {
  return force || job.state[kCounter] + job.increment >= int64_t(job.tile.transfer_every);
}

__device__ __forceinline__ float load(const Operand& v, int64_t at) {
  if (v.type == kFloat32) return static_cast<const float*>(v.p)[at];
  const uint16_t half = static_cast<const uint16_t*>(v.p)[at];
  return v.type == kBFloat16 ? from_bits(uint32_t(half) << 16) : __half2float(__ushort_as_half(half));
}

// Elements at, at + es, ... (`left` of them, at most four; zero beyond), in one access where they lie together.
__device__ __forceinline__ void load4(const Operand& v, int64_t at, int left, float (&value)[4]) {
  if (v.es == 1 && left >= 4) {
    if (v.type == kFloat32) {
      const float* p = static_cast<const float*>(v.p) + at;
      if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
        const float4 f = *reinterpret_cast<const float4*>(p);
        value[0] = f.x, value[1] = f.y, value[2] = f.z, value[3] = f.w;
        return;
      }
    } else if (v.type == kBFloat16) {
      const uint16_t* p = static_cast<const uint16_t*>(v.p) + at;
      if (reinterpret_cast<uintptr_t>(p) % 8 == 0) {
        const uint2 f = *reinterpret_cast<const uint2*>(p);
        value[0] = from_bits(f.x << 16), value[1] = from_bits(f.x & 0xffff0000u);
        value[2] = from_bits(f.y << 16), value[3] = from_bits(f.y & 0xffff0000u);
        return;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) value[k] = k < left ? load(v, at + k * v.es) : 0.0f;
}

// Offsets of a block's trains, by all kBlockSamples threads; returns the number of words.
__device__ __forceinline__ int scan_trains(int bl, int* offsets) {
  __shared__ int sums[kBlockSamples / 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int running = bl;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, running, step);
    if (lane >= step) running += other;
  }
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kBlockSamples / 32; ++w) {
    before += w < warp ? sums[w] : 0;
    total += sums[w];
  }
  offsets[threadIdx.x] = before + running - bl;
  if (threadIdx.x == kBlockSamples - 1) offsets[kBlockSamples] = total;
  __syncthreads();  // sums may be reused
  return (total + 31) / 32;
}

}  // namespace lrtt::cuda
