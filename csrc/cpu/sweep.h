// Sweeps over a sequence: who takes which rows and units, and what a row of a group is.
//
// The policy: a group is some batch rows of one direction, and a thread takes a group through the whole sequence with
// no barrier, its states in scratch of its own. Where rows are too few for that, the threads share the hidden units of
// every step instead.
#pragma once

#include "gemm.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kThreadWork = 1 << 18;  // multiply-adds worth a thread

template <class A>
constexpr A kZeros[kMaxVectors * kLanes<A>] = {};

// How the work of a sweep over the sequence is dealt to threads.
struct Teams {
  int64_t N;
  int D;
  int64_t groups_per_direction, parts;

  // A step of one row costs `weights` multiply-adds, and reading the weights as much as kTraffic rows. A thread with
  // rows of its own reads all weights; one with units of its own reads its share but has to wait for the others, worth
  // it for a clear gain only.
  template <class T>
  Teams(const Layer& l, const Panels<T>& gates) : N(l.steps.N), D(l.D), parts(1) {
    constexpr int64_t kWait = 1 << 16;
    const int64_t weights = gates.width() * l.P, kTraffic = weights * sizeof(T) > (1 << 20) ? 12 : 4;
    const int64_t threads = min(l.threads, max(1, (l.R + l.steps.T * kTraffic) * D * weights / kThreadWork));
    groups_per_direction = max(1, min(threads % D ? threads : threads / D, N));
    const int64_t by_rows = (ceil_div(N, groups_per_direction) + kTraffic) * weights, all = (N + kTraffic) * weights;
    const int64_t units = min(threads / D, min(gates.count(), all / kWait));
    if (N > 0 && units > 1 && (all / units + kWait) * 9 / 8 < by_rows) groups_per_direction = 1, parts = units;
  }
  int64_t groups() const { return D * groups_per_direction; }
  int64_t rows() const { return ceil_div(N, groups_per_direction); }

  // Takes sweep(each) through all groups, where each(stage) has to call stage(group, part, parts).
  template <class Sweep>
  void run(const Sweep& sweep) const {
    if (parts == 1) {
      parallel(groups(), [&](int64_t g) { sweep([&](const auto& stage) { stage(g, 0, 1); }); });
    } else {
      Crew(groups() * parts).run([&](int64_t begin, int64_t end, const auto& barrier) {
        sweep([&](const auto& stage) {
          for (int64_t task = begin; task < end; task++) stage(task / parts, task % parts, parts);
          barrier();
        });
      });
    }
  }
};

// A group's rows are the ranks first, first + stride, ...: round-robin, so that ragged work balances.
struct Group {
  const Steps& steps;
  int d;
  int64_t first, stride, rows;

  Group(const Layer& l, const Teams& teams, int64_t g)
      : steps(l.steps),
        d(g / teams.groups_per_direction),
        first(g % teams.groups_per_direction),
        stride(teams.groups_per_direction),
        rows(alive(teams.N)) {}
  int64_t alive(int64_t ranks) const { return max(0, ceil_div(ranks - first, stride)); }
  int64_t alive_at(int64_t t) const { return alive(steps.active[t]); }
  int64_t rank(int64_t i) const { return first + i * stride; }
  int64_t batch_row(int64_t i) const { return steps.order[rank(i)]; }
  int64_t row(int64_t t, int64_t i) const { return steps.row(t, rank(i)); }
  int64_t time(int64_t s) const { return d ? steps.T - 1 - s : s; }
};

template <class S, class A>
void read_row(A* to, const S* from, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<A>) store(to + k, from ? load(from + k, min(kLanes<A>, n - k)) : Vec<A>(0));
}

template <class S, class A>
void write_row(S* to, const A* from, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes<A>) store(to + k, load(from + k), min(kLanes<A>, n - k));
}

template <class T>
const T* row_of(const void* base, int64_t row, int64_t width) {
  return base ? static_cast<const T*>(base) + row * width : nullptr;
}

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
