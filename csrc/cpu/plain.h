// Inference of whole stacks of layers, and of cells, each in one call of an operator: plain.cpp.
#pragma once

#include "../stack.h"

namespace rnnfast {

void plain_stack(StableIValue* values, uint64_t arguments, uint64_t results);
void plain_cell(StableIValue* values, uint64_t arguments, uint64_t results);

}  // namespace rnnfast
