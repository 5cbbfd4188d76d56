// The persistent kernels of one cell: compiled once for each, with RNNFAST_CELL and RNNFAST_TABLE, the name of their
// table.
#include "kernels.h"

namespace rnnfast {
namespace {

// The forward: W_hh has a tile for each gate, or one tile with all gates, and the blocks exchange h.
template <class Cell, class Math>
struct Forward {
  using Arguments = ForwardArguments;
  template <class Exchange>
  static constexpr int kTiles = kMixesGates<Cell, Exchange> ? 1 : Cell::kGates;
  template <class Exchange>
  static constexpr int kShares = kMixesGates<Cell, Exchange> ? 1 : Exchange::kSplit;
  static constexpr int kGates = 1;
  template <class Exchange, int kBlocks>
  static constexpr auto kKernel = &forward<Cell, Math, Exchange, kBlocks>;
};

// The backward: W_hh^T has one tile, and the blocks exchange the gradients of all gates.
template <class Cell, class Math>
struct Backward {
  using Arguments = BackwardArguments;
  template <class Exchange>
  static constexpr int kTiles = 1;
  template <class Exchange>
  static constexpr int kShares = Exchange::kSplit;
  static constexpr int kGates = Cell::kGates;
  template <class Exchange, int kBlocks>
  static constexpr auto kKernel = &backward<Cell, Math, Exchange, kBlocks>;
};

using Cell = RNNFAST_CELL;

template <class Pass, class Math, class Exchange, int kBlocking>
constexpr void describe(Persistent<typename Pass::Arguments>& k) {
  constexpr int kBlocks = 1 << kBlocking;
  k.kernels[kBlocking] = Pass::template kKernel<Exchange, kBlocks>;
  k.kept[kBlocking] = kKeptPairs<Cell, Math, Exchange, kBlocks, Pass::template kTiles<Exchange>>;
}

template <class Pass, class Math, class Exchange>
constexpr Persistent<typename Pass::Arguments> describe(Regime regime) {
  Persistent<typename Pass::Arguments> k = {};
  // Cells that are CUDA's own have fewer kernels, for the time that it takes to compile them: blocks of 8 rows, and of
  // the two ways on a multiprocessor the quicker one.
  if constexpr (Cell::kIsCommon || !std::is_same<Exchange, Local<1>>::value) describe<Pass, Math, Exchange, 0>(k);
  if constexpr (Cell::kIsCommon && !std::is_same<Exchange, Local<Exchange::kSplit>>::value) {
    // A multiprocessor that has all of W_hh takes another block for other rows.
    describe<Pass, Math, Exchange, 1>(k), describe<Pass, Math, Exchange, 2>(k);
  }
  k.regime = regime, k.tiles = Pass::template kTiles<Exchange>, k.gates = Pass::kGates;
  k.threads = kThreads<Cell, Exchange>, k.split = Exchange::kSplit, k.shares = Pass::template kShares<Exchange>;
  return k;
}

#define RNNFAST_VARIANTS(Pass, Math)                                                                                 \
  {describe<Pass<Cell, Math>, Math, Local<1>>(kMultiprocessor),                                                      \
   describe<Pass<Cell, Math>, Math, Local<4>>(kMultiprocessor), describe<Pass<Cell, Math>, Math, Cluster>(kCluster), \
   describe<Pass<Cell, Math>, Math, Grid>(kChip)}
#define RNNFAST_ARITHMETICS(Pass)                                                      \
  {RNNFAST_VARIANTS(Pass, Products<BFloat16>), RNNFAST_VARIANTS(Pass, Products<Half>), \
   RNNFAST_VARIANTS(Pass, Products<float>), RNNFAST_VARIANTS(Pass, ExactProducts)}

using ExactProducts = Products<float, true>;

}  // namespace

const CellKernels RNNFAST_TABLE = {RNNFAST_ARITHMETICS(Forward), RNNFAST_ARITHMETICS(Backward)};

}  // namespace rnnfast
