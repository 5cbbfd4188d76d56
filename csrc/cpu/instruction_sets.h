// The instruction sets that the library has kernels for, numbered as rnnfast/backends.py names them.
#pragma once

#include <optional>

#include "flex.h"
#include "kernels.h"

namespace rnnfast {

// The kernels of the best instruction set that the processor has, or of the one that was asked for.
const Kernels& chosen_kernels();
const FlexKernels& chosen_flex();

// The number of the instruction set in use; with `use`, after it has been changed to that. The operator cpu_isa.
int64_t instruction_set(std::optional<int64_t> use);

}  // namespace rnnfast
