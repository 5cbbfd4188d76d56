// A layer's backward pass over a cell and a storage type: a sweep over the steps makes the gradients at the gates and
// those of the states; all others are then products over the whole sequence.
#pragma once

#include "backward_sweep.h"
#include "gate_gradients.h"
#include "input_gradient.h"
#include "weight_gradients.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

template <class Cell, class Stored, class Math>
void backward_pass(const Backward& f) {
  const BackwardPass<Cell, Stored, Math> pass(f);
  BackwardSweep(pass).run();
  if (f.dx) input_gradient(pass);
  if (f.dgates) gate_gradients(pass);
  if (f.need_dw) WeightGradients(pass).run();
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
