// The persistent kernels of one cell: compiled once for each, with RNNFAST_CELL and RNNFAST_KERNELS, the name of their
// table.
#include "kernels.h"

namespace rnnfast {
namespace {

template <class Arguments, class Cell, class P, class Exchange, int kTiles, int kGates, int kStates>
constexpr Persistent<Arguments> describe(void (*kernel)(Arguments)) {
  return {kernel,          kTiles, kKeptPairs<Cell, P, Exchange, kTiles>, kGates, kStates, kThreads<Cell, Exchange>,
          Exchange::kSplit};
}

// Of the forward W_hh has a tile for each gate, and h is exchanged; each element keeps h and c.
template <class Cell, class P, class Exchange>
constexpr auto forward_kernel() {
  return describe<ForwardArguments, Cell, P, Exchange, Cell::kGates, 1, 2>(forward<Cell, P, Exchange>);
}

// Of the backward W_hh^T has one, and the gradients of all gates are exchanged; each element keeps dh, dc and c.
template <class Cell, class P, class Exchange>
constexpr auto backward_kernel() {
  return describe<BackwardArguments, Cell, P, Exchange, 1, Cell::kGates, 3>(backward<Cell, P, Exchange>);
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
