// Which regime serves a layer, and how it is cut: one table, the reason beside each number.
#pragma once

#include <algorithm>
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
  Geometry geometry{};
  Launch launch{};
  int64_t groups = 0, groups_at_once = 0;  // a launch has so many at most
  std::string reason;
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Rows beyond these are other groups, which wait for their turn: past a few blocks of 8, products take longer than the
// exchange whose time they fill.
constexpr int kMostRowBlocks = 4;
// Launches, or waves of clusters, after which a step at a time is as quick: the products then have rows enough for
// cuBLAS.
constexpr int kMostWaves = 2;

// The cut with so many blocks a group, so many tiles a block and so many row blocks; or none, if a block can't be so.
template <class Arguments>
std::optional<Plan> cut(Regime regime, const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, int size,
                        int tiles, int row_blocks) {
  const int warps = tiles * k.split;
  if (warps * kWarp > k.threads) return {};
  Plan plan;
  plan.regime = regime;
  Geometry& g = plan.geometry;
  g.size = size, g.tiles = tiles, g.row_blocks = row_blocks;
  g.members = divide_up(divide_up(layer.H, kTile), tiles);
  g.direction_groups = divide_up(layer.N, int64_t(row_blocks) * kRows);
  g.gates = k.gates;
  g.gate_bytes = round_up(int64_t(g.members) * tiles * kTile * layer.value_bytes, kPairBytes);
  g.vector_bytes = g.gates * g.gate_bytes * kRows;
  g.pairs = divide_up(int64_t(g.gates) * g.gate_bytes / kPairBytes, k.split);
  g.threads = warps * kWarp;
  g.matrix_of_warp = size_t(std::max(g.pairs - k.kept, 0)) * k.tiles * kTileBytes;

  size_t end = 0;
  auto take = [&](size_t bytes) {
    const size_t at = end;
    end = round_up(end + bytes, 128);
    return at;
  };
  take(sizeof(uint64_t) * kSets * row_blocks);  // barriers
  g.vectors = take(size_t(kSets) * row_blocks * g.vector_bytes);
  g.partials = take(k.split > 1 ? sizeof(float) * warps * k.tiles * 4 * kWarp : 0);
  g.states = take(sizeof(float) * k.states * row_blocks * (4 / k.split) * g.threads);
  g.biases = take(sizeof(float) * k.tiles * tiles * kTile);
  g.lengths = take(sizeof(int) * row_blocks * kRows);
  g.matrix = take(warps * g.matrix_of_warp);
  g.shared = end;
  if (g.shared > chip.shared) return {};

  plan.groups = plan.groups_at_once = layer.D * g.direction_groups;
  plan.launch = {plan.groups * size, g.threads,    g.shared, regime == kCluster ? size : 1,
                 regime == kChip,    layer.device, 0};
  return plan;
}

template <class Arguments>
std::optional<Plan> on_multiprocessor(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, bool) {
  const int tiles = divide_up(layer.H, kTile);
  std::optional<Plan> best;
  // More rows a block only where there are more blocks than multiprocessors.
  for (int blocks = 1; blocks <= kMostRowBlocks; blocks++) {
    auto plan = cut(kMultiprocessor, k, layer, chip, 1, tiles, blocks);
    if (!plan) break;
    best = plan;
    if (plan->groups <= chip.processors) break;
  }
  return best;
}

template <class Arguments>
std::optional<Plan> in_cluster(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, bool forced) {
  if (chip.major < 9) return {};
  const int tiles = divide_up(layer.H, kTile);
  std::optional<Plan> best;
  // The smallest cluster whose registers hold W_hh: fewer blocks to send to, more clusters on the chip. If none does,
  // the largest. Forced, as in tests of small layers: one tile a block.
  for (int size = 2; size <= 16; size *= 2) {
    const int a_block = divide_up(tiles, size);
    if (forced && size < 16 && a_block > 1) continue;
    auto plan = cut(kCluster, k, layer, chip, size, a_block, 1);
    if (!plan) continue;
    const int clusters = resident_clusters(reinterpret_cast<const void*>(k.kernel), plan->launch);
    if (clusters < 1) continue;
    for (int blocks = 2; blocks <= kMostRowBlocks && plan->groups > clusters; blocks++) {
      auto more = cut(kCluster, k, layer, chip, size, a_block, blocks);
      if (!more) break;
      plan = more;
    }
    if (!forced && plan->groups > int64_t(kMostWaves) * clusters) continue;
    best = plan;
    if (plan->geometry.matrix_of_warp == 0) break;
  }
  return best;
}

template <class Arguments>
std::optional<Plan> on_chip(const Persistent<Arguments>& k, const Layer& layer, const Chip& chip, bool forced) {
  std::optional<Plan> best;
  for (int a_block = 1; a_block * k.split * kWarp <= k.threads; a_block++) {
    const int size = divide_up(divide_up(layer.H, kTile), a_block);
    for (int blocks = 1; blocks <= kMostRowBlocks; blocks++) {
      auto plan = cut(kChip, k, layer, chip, size, a_block, blocks);
      if (!plan) break;
      const int resident = resident_blocks(reinterpret_cast<const void*>(k.kernel), plan->launch);
      plan->groups_at_once = std::min<int64_t>(plan->groups, resident / size);
      if (plan->groups_at_once == 0) break;
      const int64_t launches = divide_up(plan->groups, plan->groups_at_once);
      if (!best || launches < divide_up(best->groups, best->groups_at_once)) best = plan;
      if (launches == 1) return best;
    }
  }
  if (best && !forced && divide_up(best->groups, best->groups_at_once) > kMostWaves) return {};
  return best;
}

// The plan of a layer under a regime; by the table, the first of the regimes that can serve it: the fewer blocks have
// to hear of each other the better.
template <class Arguments>
Plan make_plan(const Persistent<Arguments> (&kernels)[kStepwise], const Layer& layer, const Chip& chip, Regime forced) {
  const char* kWhere[] = {"", "multiprocessor", "cluster", "chip"};
  for (Regime regime : {kMultiprocessor, kCluster, kChip}) {
    if (forced != kByTable && forced != regime) continue;
    const auto& k = kernels[regime];
    auto plan = (regime == kMultiprocessor ? on_multiprocessor<Arguments>
                 : regime == kCluster      ? in_cluster<Arguments>
                                           : on_chip<Arguments>)(k, layer, chip, forced != kByTable);
    if (!plan) continue;
    const Geometry& g = plan->geometry;
    auto kilobytes = [](int64_t bytes) { return std::to_string(divide_up(bytes, 1024)) + " KB"; };
    const std::string where = g.members == 1 ? "one multiprocessor" : std::to_string(g.members) + " multiprocessors";
    plan->reason = std::string(kWhere[regime]) + ": W_hh, " +
                   kilobytes(k.tiles * k.gates * layer.H * layer.H * layer.value_bytes) + " a direction, stays on " +
                   where + ", in " + std::to_string(g.threads) + " threads and " + kilobytes(g.shared) + " of each";
    return *plan;
  }
  return {};
}

}  // namespace rnnfast
