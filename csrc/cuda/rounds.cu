// The rounds of streams and cells after the first.
#include <cooperative_groups.h>

#include "rounds.cuh"
#include "streams.cuh"

namespace lrtt::cuda {
namespace {

template <bool any>
__device__ __noinline__ void make_round_apart(const DevicePulse* table, int count, int round,
                                              const Predicate& predicate, uint4* loads) {
  make_round<any>(table, count, round, predicate, Kept{loads});
}

// All rounds after the first in one launch, whose blocks wait for each other: only the device knows how many there are,
// and mostly there are none. Streams are made in the kernel of the cells, so there is one for all device models.
template <int how>
__global__ void __launch_bounds__(kCellThreads, kCellBlocks)
    later_rounds(const DevicePulse* table, int count, int64_t blocks, const float* levels, Predicate predicate) {
  static_assert(sizeof(uint4) * kMost * kCellThreads <= sizeof(Shared), "streams are made in the memory of cells");
  extern __shared__ uint4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  for (int round = 1; any_left(table, count, round, predicate); ++round) {
    if (round > 1) grid.sync();  // the streams before are done with
    if (table->form == kShortBits) {
      make_round_apart<false>(table, count, round, predicate, shared_memory);
    } else {
      make_round_apart<true>(table, count, round, predicate, shared_memory);
    }
    grid.sync();
    run_round(table, count, blocks, round, levels, predicate, shared, [&](const DevicePulse& p, int tile_block) {
      with_device(int(p.job.device.kind), [&](auto device) {
        using Device = decltype(device);
        if constexpr (kLinearStrength<Device>) {
          if (takes_bursts<Device>(p.job.device))
            return run_cells<Device, true, how, true>(p, tile_block, round, shared);
        }
        run_cells<Device, true, how, false>(p, tile_block, round, shared);
      });
    });
  }
}

template <int how>
void launch(const DevicePulse* table, int count, int64_t blocks, const float* levels, Predicate predicate,
            cudaStream_t stream) {
  const auto kernel = with_memory(later_rounds<how>);
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kCellThreads, sizeof(Shared)),
        "pulse kernels");
  void* arguments[] = {&table, &count, &blocks, &levels, &predicate};
  check(cudaLaunchCooperativeKernel(kernel, unsigned(resident * processors()), kCellThreads, arguments, sizeof(Shared),
                                    stream),
        "pulse kernels");
}

}  // namespace

void launch_later_rounds(const DevicePulse* table, int count, int how, int64_t blocks, const float* levels,
                         Predicate predicate, cudaStream_t stream) {
  switch (how) {
    case kNoisy: launch<kNoisy>(table, count, blocks, levels, predicate, stream); break;
    case kPair: launch<kPair>(table, count, blocks, levels, predicate, stream); break;
    default: launch<kPlain>(table, count, blocks, levels, predicate, stream);
  }
}

}  // namespace lrtt::cuda
