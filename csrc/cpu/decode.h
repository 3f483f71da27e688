// The vector loops of dequantize.h. decode.cpp is compiled once for each instruction set, as lanes.cpp is.
#pragma once

#include "../dequantize.h"

namespace lrtt {

struct DecodeKernel {
  // Decodes blocks [first, last) of the job, counted row after row; false for an unknown type.
  bool (*decode)(const blocks::Job& job, int64_t first, int64_t last);
};

}  // namespace lrtt
