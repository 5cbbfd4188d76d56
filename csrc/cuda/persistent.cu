// The persistent kernels of one cell: compiled once for each, with RNNFAST_CELL and RNNFAST_KERNELS, the name of their
// table.
#include "kernels.h"

namespace rnnfast {
namespace {

template <class Cell, class P, class Exchange>
constexpr Persistent<ForwardArguments> forward_kernel() {
  constexpr int kM = Cell::kGates;
  return {forward<Cell, P, Exchange>,
          kM,
          kKeptPairs<Cell, P, Exchange, kM>,
          1,
          2,
          kThreads<Cell, Exchange>,
          Exchange::kSplit};
}

template <class Cell, class P, class Exchange>
constexpr Persistent<BackwardArguments> backward_kernel() {
  return {backward<Cell, P, Exchange>,
          1,
          kKeptPairs<Cell, P, Exchange, 1>,
          Cell::kGates,
          3,
          kThreads<Cell, Exchange>,
          Exchange::kSplit};
}

#define RNNFAST_REGIMES(kernel, P) {{}, kernel<Cell, P, Local>(), kernel<Cell, P, Cluster>(), kernel<Cell, P, Grid>()}
#define RNNFAST_ARITHMETICS(kernel)                                                      \
  {RNNFAST_REGIMES(kernel, Products<BFloat16>), RNNFAST_REGIMES(kernel, Products<Half>), \
   RNNFAST_REGIMES(kernel, Products<float>), RNNFAST_REGIMES(kernel, ExactProducts)}

using Cell = RNNFAST_CELL;
using ExactProducts = Products<float, true>;

}  // namespace

const CellKernels RNNFAST_KERNELS = {RNNFAST_ARITHMETICS(forward_kernel), RNNFAST_ARITHMETICS(backward_kernel)};

}  // namespace rnnfast
