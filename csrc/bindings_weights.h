// Adds the decoders of pretrained weights to the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_weights(pybind11::module_& m);
