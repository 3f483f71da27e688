// Shared by update.cpp and transfer.cpp.
#pragma once

#include "lanes.h"

namespace lrtt::cpu {

// Lays out the trains of `plan`, generates both streams and applies them to job.w.
void apply_block(const PulseJob& job, BlockPlan& plan, void* workspace, int threads);

void count_nonfinite(int64_t* counts, int64_t step, int64_t samples);

}  // namespace lrtt::cpu
