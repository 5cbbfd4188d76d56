// Which regime serves a layer, and how it is cut: one table, the reason beside each number.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>

#include "kernels.h"

namespace rnnfast {

struct Layer {
  CellKind cell;
  Arithmetic arithmetic;
  int value_bytes;
  int64_t N, H, D;
  int device;
};

struct Plan {
  Regime regime = kStepwise;
  const void* kernel = nullptr;
  Geometry geometry{};
  Launch launch{};
  int64_t groups = 0, groups_at_once = 0;  // a launch has so many at most
  double cycles = 0;                       // of a step, by estimate
  std::string reason;
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Estimates, for comparison with each other. Of a persistent kernel the cycles of a step, from the counts of what it does
// and from measurements on an H200 (1.98 GHz), all of 8 rows and some:
struct Costs {
  static constexpr double kStep = 700;               // barriers, latencies of products and of the cell
  static constexpr double kProduct = 8;              // of an mma.sync on one of a multiprocessor's four schedulers
  static constexpr double kElement = 60;             // a warp's instructions for one element of each thread
  static constexpr double kSharedBytes = 128;        // a cycle
  static constexpr double kCluster = 500;            // from a store to a peer until the peer goes on
  static constexpr double kClusterBytes = 32;        // a cycle
  static constexpr double kChip = 1500;              // from a store to L2 until another block has polled it
  static constexpr double kChipBytes = 40;           // a cycle, of words that are half data
  static constexpr double kLaunch = 2000;            // of further launches, spread over the steps
};
// A step by torch's products: two or three launches, which the host needs longer for than a small product takes.
constexpr double kStepwiseCycles = 20000;

// The cut with so many blocks a group, so many tiles a block and so many row blocks; or none, if a block can't be so.
template <class Arguments>
std::optional<Plan> cut(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, int size, int tiles,
                        int blocking) {
  const int warps = tiles * k.split, row_blocks = 1 << blocking;
  if (warps * kWarp > k.threads || !k.kernels[blocking]) return {};
  Plan plan;
  plan.regime = k.regime;
  Geometry& g = plan.geometry;
  g.size = size, g.tiles = tiles, g.row_blocks = row_blocks;
  g.members = divide_up(divide_up(layer.H, kTile), tiles);
  g.direction_groups = divide_up(layer.N, int64_t(row_blocks) * kRows);
  g.gates = k.gates, g.parts = k.gates * row_blocks;
  g.gate_bytes = round_up(int64_t(g.members) * tiles * kTile * layer.value_bytes, kPairBytes);
  g.vector_bytes = g.gates * g.gate_bytes * kRows;
  g.set_bytes = row_blocks * g.vector_bytes;
  g.pairs = divide_up(int64_t(g.gates) * g.gate_bytes / kPairBytes, k.split);
  g.threads = warps * kWarp;
  g.matrix_of_warp = size_t(std::max(g.pairs - k.kept[blocking], 0)) * k.tiles * kTileBytes;

  size_t end = 0;
  auto take = [&](size_t bytes) {
    const size_t at = end;
    end = round_up(end + bytes, 128);
    return at;
  };
  const int together = k.tiles > 2 ? 4 : k.tiles;  // sums of an element that are handed over, as Block has them
  take(sizeof(uint64_t) * kSets);                  // barriers
  g.vectors = take(size_t(kSets) * g.set_bytes);
  g.partials = take(k.split > 1 ? sizeof(float) * warps * row_blocks * 4 * together * kWarp : 0);
  g.lengths = take(sizeof(int) * row_blocks * kRows);
  g.matrix = take(warps * g.matrix_of_warp);
  g.shared = end;
  if (g.shared > chip.shared) return {};

  plan.kernel = reinterpret_cast<const void*>(k.kernels[blocking]);
  plan.groups = layer.D * g.direction_groups;
  plan.launch = {plan.groups * size,     g.threads,    g.shared, k.regime == kCluster ? size : 1,
                 k.regime == kChip, layer.device, 0};
  // Groups that the device holds at once: the others wait, or are another launch.
  const int64_t held = k.regime == kCluster ? resident_clusters(plan.kernel, plan.launch)
                                            : resident_blocks(plan.kernel, plan.launch) / size;
  if (held == 0) return {};
  plan.groups_at_once = k.regime == kChip ? std::min(plan.groups, held) : plan.groups;

  const double products = double(g.pairs) * 2 * k.tiles * row_blocks * (layer.arithmetic == kOfExact ? 3 : 1);
  const double elements = k.split == 1 ? 4 : std::max(1.0, 4.0 * row_blocks / k.split);
  const double read = warps * row_blocks * (double(g.matrix_of_warp) + double(g.pairs) * kPair);
  const double others = double(g.set_bytes) * (g.members - 1) / g.members;
  const double blocks_of_one = std::min<double>(divide_up(plan.groups * size, chip.processors), held * size / chip.processors);
  double cycles = products * g.threads / (4 * kWarp) * Costs::kProduct + read / Costs::kSharedBytes;
  cycles += elements * k.tiles * Costs::kElement / 4 * g.threads / (4 * kWarp);
  cycles = Costs::kStep + cycles * std::max(1.0, blocks_of_one);
  if (k.regime == kCluster) cycles += Costs::kCluster + others / Costs::kClusterBytes;
  if (k.regime == kChip) cycles += Costs::kChip + 2 * others / Costs::kChipBytes;
  plan.cycles = divide_up(plan.groups, held) * cycles;
  return plan;
}

// All cuts of a layer under a regime. Forced to it, as in tests of small layers: into as many blocks as can be.
template <class Arguments, class Use>
void each_cut(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, bool forced, const Use& use) {
  const int tiles = divide_up(layer.H, kTile);
  for (int blocking = 0; blocking < kBlockings; blocking++) {
    if (k.regime == kMultiprocessor) {
      use(cut(k, layer, chip, 1, tiles, blocking));
    } else if (k.regime == kCluster) {
      for (int size = 2; chip.major >= 9 && size <= 16; size *= 2) {
        const int a_block = divide_up(tiles, size);
        if (!forced || size == 16 || a_block == 1) use(cut(k, layer, chip, size, a_block, blocking));
      }
    } else {
      for (int a_block = 1; a_block * k.split * kWarp <= k.threads; a_block++) {
        use(cut(k, layer, chip, divide_up(tiles, a_block), a_block, blocking));
      }
    }
  }
}

// The plan of a layer: the cheapest of all, or of a regime, or the regime's cut of that number.
template <class Arguments>
Plan make_plan(const Persistent<Arguments> (&variants)[kVariants], const Layer& layer, const Chip& chip, Regime forced,
               std::optional<int> only) {
  Plan best;
  int number = 0;
  best.cycles = forced == kByTable ? kStepwiseCycles : std::numeric_limits<double>::infinity();
  for (const auto& k : variants) {
    if (forced != kByTable && forced != k.regime) continue;
    each_cut(k, layer, chip, forced != kByTable && !only, [&](const std::optional<Plan>& plan) {
      const bool asked_for = !only || *only == number;
      number++;
      if (!plan || plan->cycles >= best.cycles || !asked_for) return;
      best = *plan;
      const Geometry& g = best.geometry;
      const char* kWhere[] = {"", "multiprocessor", "cluster", "chip"};
      auto kilobytes = [](int64_t bytes) { return std::to_string(divide_up(bytes, 1024)) + " KB"; };
      const std::string where =
          g.members == 1 ? "one multiprocessor" : std::to_string(g.members) + " multiprocessors";
      best.reason = std::string(kWhere[k.regime]) + ": W_hh, " +
                    kilobytes(k.tiles * k.gates * layer.H * layer.H * layer.value_bytes) + " a direction, stays on " +
                    where + ", in " + std::to_string(g.threads) + " threads and " + kilobytes(g.shared) +
                    " of each, for " + std::to_string(g.row_blocks * kRows) + " rows";
    });
  }
  return best;
}

}  // namespace rnnfast
