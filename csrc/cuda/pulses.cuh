// The three stages of a pulsed update on the device, shared by updates (update.cu) and transfers (transfer.cu):
// trains -> streams of bits -> pulses on cells. Streams are stored for as many blocks of samples as their share of the
// scratch memory holds; the last two stages run in rounds until all blocks are done. How many blocks a round takes is
// decided on the device from the trains: short ones need one round, and the launch for all later ones returns at once
// (counted trains: two a round).
#pragma once

#include <cuda_fp16.h>

#include "common.cuh"

namespace lrtt::cuda {

constexpr int kCellThreads = 512;
constexpr int kCellBlocks = 2;  // resident on a multiprocessor
constexpr int kWordThreads = 128;
constexpr int kWordBlocks = 5;                         // resident on a multiprocessor
constexpr int kLongLanes = 32;                         // cells of a warp lie along the longer side
constexpr int kShortRows = kCellThreads / kLongLanes;  // one warp per index of the shorter side

// The train of one sample: one 16-byte load.
struct alignas(16) Planned {
  int bl;
  float sx, sd;
};

// A PulseJob and its scratch. Streams are [stream row][element]; a row is a word of slots, or of a counted train a
// sample: then bits are its counted values with the signs of the operand, and there is no neg. Signed words have none
// either: those of one sample each of at most 31 slots, whose uppermost bit is the sign.
struct DevicePulse {
  PulseJob job;
  int form;              // Form
  int samples;           // of a block; kBlockSamples of them in form kShortBits
  uint32_t first_block;  // number of block 0 in the random counters
  int blocks;
  int block_words;    // most stream rows of one block
  int most_rounds;    // room in begin
  int capacity;       // stream rows of one round, a multiple of block_words
  int neg_words;      // most rows of a block with words that are not signed
  int neg_capacity;   // of one round: such rows come first
  int transfer;       // 1: samples are words of terms (rows), guarded by the transfer predicate
  int along_columns;  // the longer side
  float eta_sign;     // transfer only; an update reads *eta
  int finds_maxima;   // update only: maxima are neither given nor found in passing
  uint32_t* maxima;   // [samples][2], where it finds them
  Planned* trains;    // [blocks][samples]
  int* rows;          // [blocks][samples], transfer only
  int* words;         // [blocks], stream rows
  int* place;         // [blocks], first stream row of a block in its round
  int* begin;         // [most_rounds + 1], round r takes blocks begin[r] .. begin[r + 1] - 1
  int* widths;        // [blocks], slots of every sample
  int rounds;         // that its blocks take; place_blocks writes it
  int planned;        // blocks whose trains are laid out; update only
  uint32_t *x_bits, *x_neg, *d_bits, *d_neg;
  int64_t first_sample_warp, first_plan_block, first_cell_block;
};

// Jobs of one kernel whose streams lie in scratch memory together: jobs first .. first + count - 1 of a table.
struct PulseSet {
  int first, count, rounds;
  int64_t word_blocks;
};

// A job whose trains follow `pulse`, without its scratch.
DevicePulse describe(const PulseJob& job, const PulseParams& pulse);

// The order in which jobs must lie in a table: those that one cell kernel serves stand together.
bool kernel_order(const PulseJob& a, const PulseJob& b);

// Gives the jobs their scratch memory and says which are run together, set after set.
std::vector<PulseSet> arrange(std::vector<DevicePulse>& jobs, Arena& arena);

// For transfers: whether a job's tile is due. `jobs` is null for updates.
struct Predicate {
  const TransferJob* jobs;  // one per pulse job
  int force;
};

// The last two stages. `jobs` is the host's copy of `table`; `levels` are the kNoiseLevels noise levels.
void apply_trains(const std::vector<DevicePulse>& jobs, const DevicePulse* table, const std::vector<PulseSet>& sets,
                  const float* levels, Predicate predicate, cudaStream_t stream);

// Blocks of the kernel that makes the streams of a round, and that kernel for the first one; `form` is that of all
// jobs.
int64_t word_blocks(const DevicePulse& p);
void launch_streams(const DevicePulse* table, int count, int form, unsigned grid, Predicate predicate,
                    cudaStream_t stream);

// All rounds after the first: streams and cells of `count` jobs that one Hold has, in one launch.
void launch_later_rounds(const DevicePulse* table, int count, int how, int64_t blocks, const float* levels,
                         Predicate predicate, cudaStream_t stream);

// Counted trains in a round: the values of `count` jobs, and the pulses of `count` jobs that one Hold has.
void launch_values(const DevicePulse* table, int count, unsigned grid, int round, Predicate predicate,
                   cudaStream_t stream);
void launch_counted_cells(const DevicePulse* table, int count, int how, int64_t blocks, unsigned grid, int round,
                          const float* levels, Predicate predicate, cudaStream_t stream);

// An integer operation on a GPU goes through a pipe of half the width of that of multiplications, and these kernels are
// made of integer operations: what can be a multiplication is written as one, in PTX where the compiler would turn it
// back.
__device__ __forceinline__ uint32_t plus(uint32_t a, uint32_t b) {
  asm("mad.lo.u32 %0, %0, 1, %1;" : "+r"(a) : "r"(b));
  return a;
}

__host__ __device__ __forceinline__ int64_t groups_of(int64_t elements) { return (elements + 3) / 4; }

constexpr uint32_t kSignBit = 0x80000000u;

__device__ __forceinline__ bool signed_words(const DevicePulse& p, int width) {
  return p.form == kShortBits && width == 32;
}

// Packs blocks of samples into rounds, by a warp; words[] is complete.
__device__ __forceinline__ void place_blocks(DevicePulse& p) {
  const int lane = int(threadIdx.x % 32);
  int round = 0, used = 0;
  if (lane == 0) p.begin[0] = 0;
  for (int first = 0; first < p.blocks; first += 32) {
    const int mine = first + lane < p.blocks ? p.words[first + lane] : 0;
    const int room = mine > 0 && !signed_words(p, p.widths[first + lane]) ? p.neg_capacity : p.capacity;
    int place = 0;
    for (int i = 0; i < 32 && first + i < p.blocks; ++i) {
      const int words = __shfl_sync(0xffffffffu, mine, i);
      if (used + words > __shfl_sync(0xffffffffu, room, i)) {
        used = 0;
        ++round;
        if (lane == 0) p.begin[round] = first + i;
      }
      if (lane == i) place = used;
      used += words;
    }
    if (first + lane < p.blocks) p.place[first + lane] = place;
  }
  for (int r = round + 1 + lane; r <= p.most_rounds; r += 32) p.begin[r] = p.blocks;
  if (lane == 0) p.rounds = round + 1;
}

// The block of a round that holds a stream row: the last one that begins at or before it.
__device__ __forceinline__ int block_of_row(const DevicePulse& p, int round, int row) {
  int block = p.begin[round];
  for (int last = p.begin[round + 1] - 1; block < last;) {
    const int middle = (block + last + 1) / 2;
    if (p.place[middle] <= row) {
      block = middle;
    } else {
      last = middle - 1;
    }
  }
  return block;
}

// Fills the noise table, by kLevelBlocks blocks of kBlockSamples threads.
constexpr int kLevelBlocks = kNoiseLevels / kBlockSamples;
__device__ __forceinline__ void fill_levels(float* levels, int block) {
  const int i = block * kBlockSamples + int(threadIdx.x);
  levels[i] = noise_level(uint32_t(i));
}

__device__ __forceinline__ bool fires(const TransferJob& job, int force) {
  return force || job.state[kCounter] + job.increment >= int64_t(job.tile.transfer_every);
}

// Whether any of the jobs has something to do in a round; all threads of a block ask together. Most launches end here.
__device__ __forceinline__ bool any_left(const DevicePulse* table, int count, int round, const Predicate& predicate) {
  bool due = false;
  for (int i = threadIdx.x; i < count; i += int(blockDim.x))
    due |= round < table[i].rounds && (!predicate.jobs || fires(predicate.jobs[i], predicate.force));
  return __syncthreads_or(due);
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

// Stream rows of a block with so many words: cells read four at once, and the rows of its neighbours lie beside.
__host__ __device__ __forceinline__ int whole_rows(int words) { return (words + 3) & ~3; }

// The slots of a block's samples, by all kBlockSamples threads (bl = 0 beyond its samples): slot_width of the longest
// train, and as many stream rows as the last train needs.
__device__ __forceinline__ void lay_out(const DevicePulse& p, int block, int bl) {
  __shared__ int longest[kBlockSamples / 32], used[kBlockSamples / 32];
  const int warp = int(threadIdx.x / 32);
  int top = int(warp_max(uint32_t(bl))), last = int(warp_max(bl > 0 ? threadIdx.x + 1 : 0u));
  if (threadIdx.x % 32 == 0) {
    longest[warp] = top;
    used[warp] = last;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kBlockSamples / 32; ++w) {
      top = max(top, longest[w]);
      last = max(last, used[w]);
    }
    const int width = slot_width(top);
    p.widths[block] = width;
    p.words[block] = top == 0 ? 0 : p.form == kCounted ? p.samples : whole_rows((last * width + 31) / 32);
  }
  __syncthreads();  // the sums may be reused
}

}  // namespace lrtt::cuda
