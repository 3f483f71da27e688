// CUDA entry point for pretrained weights.
#pragma once

#include "../dequantize.h"

namespace lrtt::cuda {

// Enqueues on `stream` (a cudaStream_t) and returns; pointers are the device's. Allocates nothing, never synchronises.
void dequantize(const blocks::Job& job, void* stream);

}  // namespace lrtt::cuda
