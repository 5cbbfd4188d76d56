// The evaluator of a traced cell: compiled once per instruction set, each time into a namespace of its own.
//
// An operation works on a strip of units of one row, which with all that the program makes stays in L1. Rows know
// nothing of each other, so each thread takes some through all steps.
#include "flex.h"
#include "gemm.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kStrip = 128;  // units: large enough that choosing the operation costs nothing

template <class Number>
RNNFAST_INLINE Vec<Number> select(typename Vec<Number>::Integers condition, Vec<Number> a, Vec<Number> b) {
  return condition ? a.v : b.v;
}

// With m in [sqrt(1/2), sqrt(2)) and s = (m - 1) / (m + 1): log(2^n m) = n ln2 + 2 (s + s^3/3 + s^5/5 + ...).
template <class Number>
RNNFAST_INLINE Vec<Number> log(Vec<Number> x) {
  using Integers = typename Vec<Number>::Integers;
  constexpr bool kFloat32 = sizeof(Number) == 4;
  constexpr int kMantissa = Exp<Number>::kMantissa;
  constexpr auto kHalfRoot = kFloat32 ? int64_t(0x3f3504f3) : int64_t(0x3fe6a09e667f3bcd);
  const Number least = kFloat32 ? Number(0x1p-126) : Number(0x1p-1022),
               scale = kFloat32 ? Number(0x1p32) : Number(0x1p64);
  const Integers small = x.v < least;  // subnormal, or nothing that has a logarithm
  const Vec<Number> normal = select(small, x * Vec<Number>(scale), x);
  const Integers bits = bit_cast<Integers>(normal);
  const Integers exponent = (bits - (Integers{} + kHalfRoot)) >> kMantissa;
  const Vec<Number> m = bit_cast<Vec<Number>>(bits - (exponent << kMantissa));
  Vec<Number> n(__builtin_convertvector(exponent, typename Vec<Number>::Vector));
  n = n - select(small, Vec<Number>(Number(kFloat32 ? 32 : 64)), Vec<Number>(0));
  const Vec<Number> s = (m - Vec<Number>(1)) / (m + Vec<Number>(1)), z = s * s;
  Vec<Number> series;
  if constexpr (kFloat32) {
    series = polynomial(z, 1 / 9.0f, 1 / 7.0f, 1 / 5.0f, 1 / 3.0f);
  } else {
    series =
        polynomial(z, 1 / 21.0, 1 / 19.0, 1 / 17.0, 1 / 15.0, 1 / 13.0, 1 / 11.0, 1 / 9.0, 1 / 7.0, 1 / 5.0, 1 / 3.0);
  }
  const Vec<Number> two_s = s + s;
  Vec<Number> y =
      n * Vec<Number>(Exp<Number>::kLn2High) + (n * Vec<Number>(Exp<Number>::kLn2Low) + two_s * z * series + two_s);
  const Number infinity = __builtin_inf();
  y = select(x.v == infinity, x, y);
  y = select(x.v == 0, Vec<Number>(-infinity), y);
  return select(!(x.v >= 0), Vec<Number>(Number(__builtin_nan(""))), y);
}

// What rounding has taken from 1 + x is put right to first order.
template <class Number>
RNNFAST_INLINE Vec<Number> log1p(Vec<Number> x) {
  const Vec<Number> u = Vec<Number>(1) + x, y = log(u) + (x - (u - Vec<Number>(1))) / u;
  return select(u.v > 0 && u.v < Number(__builtin_inf()), y, log(u));
}

template <class Number>
RNNFAST_INLINE Vec<Number> root(Vec<Number> x) {
  for (int i = 0; i < kLanes<Number>; i++)
    x.v[i] = sizeof(Number) == 4 ? __builtin_sqrtf(x.v[i]) : __builtin_sqrt(x.v[i]);
  return x;
}

// to[n] = of(a[n], b[n], c[n]); to has room for whole vectors.
template <class Number, class Of>
RNNFAST_INLINE void each(Number* to, const Number* const* args, int64_t n, const Of& of) {
  constexpr int U = kLanes<Number>;
  int64_t i = 0;
  for (; i + U <= n; i += U) store(to + i, of([&](int k) { return load(args[k] + i); }));
  if (i < n) store(to + i, of([&](int k) { return load_part(args[k] + i, n - i); }));
}

template <class Number>
void apply(int64_t op, Number* to, const Number* const* args, int64_t n) {
  using V = Vec<Number>;
  const V one(1), zero(0);
#define RNNFAST_CASE(Op, expression)         \
  case Op:                                   \
    return each(to, args, n, [&](auto arg) { \
      [[maybe_unused]] const V a = arg(0);   \
      return V(expression);                  \
    })
  switch (op) {
    RNNFAST_CASE(kAdd, a + arg(1));
    RNNFAST_CASE(kSubtract, a - arg(1));
    RNNFAST_CASE(kMultiply, a * arg(1));
    RNNFAST_CASE(kDivide, a / arg(1));
    RNNFAST_CASE(kNegate, -a.v);
    RNNFAST_CASE(kSigmoid, sigmoid(a));
    RNNFAST_CASE(kTanh, tanh(a));
    RNNFAST_CASE(kRelu, relu(a));
    RNNFAST_CASE(kExp, exp(a));
    RNNFAST_CASE(kLog, log(a));
    RNNFAST_CASE(kLog1p, log1p(a));
    RNNFAST_CASE(kSqrt, root(a));
    RNNFAST_CASE(kAbs, abs(a));
    RNNFAST_CASE(kMinimum, select(a.v < arg(1).v || a.v != a.v, a, arg(1)));  // NaN of either, as torch has it
    RNNFAST_CASE(kMaximum, select(a.v > arg(1).v || a.v != a.v, a, arg(1)));
    RNNFAST_CASE(kWhere, select(a.v != 0, arg(1), arg(2)));
    RNNFAST_CASE(kLess, select(a.v < arg(1).v, one, zero));
    RNNFAST_CASE(kLessEqual, select(a.v <= arg(1).v, one, zero));
    RNNFAST_CASE(kWherePositive, zero_where_not_positive(a, arg(1)));
  }
#undef RNNFAST_CASE
}

// Runs a program on strips: of a thread, with memory for all that the program makes.
template <class Number>
class Evaluator {
 public:
  explicit Evaluator(const Program& p) : p_(p), made_((p.numbers + p.operations) * kStrip), places_(p.places()) {
    for (int64_t k = 0; k < p.numbers; k++) {
      for (int64_t i = 0; i < kStrip; i++) made_[k * kStrip + i] = Number(p.number[k]);
    }
    for (int64_t k = 0; k < p.numbers + p.operations; k++) places_[p.inputs + k] = made_ + k * kStrip;
  }

  // Where input k of the strip lies.
  const Number*& input(int64_t k) { return places_[k]; }

  // n units.
  void run(int64_t n) {
    for (int64_t k = 0; k < p_.operations; k++) {
      const Operation& o = p_.operation[k];
      const Number* args[] = {places_[o.args[0]], places_[o.args[1]], places_[o.args[2]]};
      apply(o.op, made_ + (p_.numbers + k) * kStrip, args, n);
    }
  }

  void copy_result(int64_t k, Number* to, int64_t n) { memcpy(to, places_[p_.result[k]], n * sizeof(Number)); }

 private:
  const Program& p_;
  Buffer<Number> made_;
  Buffer<const Number*> places_;
};

// Memory of rows [n0, n1) at step t, and the loop over strips of units that lie in one head.
template <class Number>
struct Rows {
  const FlexLayer& l;
  int64_t width = l.H / l.K;

  bool valid(int64_t t, int64_t n) const { return !l.lengths || t < l.lengths[n]; }
  // Whether the state that enters step t is the initial one, for there is a border: of the reverse direction above t.
  bool cut(int64_t t, int64_t n) const {
    const int64_t at = l.reverse ? t + 1 : t;
    return l.resets && at < l.T && valid(at, n) && l.resets[at * l.N + n];
  }
  int64_t step(int64_t i) const { return l.reverse ? l.T - 1 - i : i; }

  // of(unit, its place in a row of a's gates before the gate's own, units of the strip).
  template <class Of>
  void strips(const Of& of) const {
    for (int64_t head = 0; head < l.K; head++) {
      for (int64_t u = 0; u < width; u += kStrip) {
        of(head * width + u, head * width * l.A + u, min(kStrip, width - u));
      }
    }
  }

  // The inputs that forward and backward have in common, of row `row` of [T,N].
  void set_inputs(Evaluator<Number>& evaluator, int64_t row, const Number* a, int64_t unit, int64_t of_a) const {
    const Number* x = static_cast<const Number*>(l.x_gates) + row * l.X * l.H + unit;
    for (int64_t g = 0; g < l.X; g++) evaluator.input(g) = x + g * l.H;
    for (int64_t g = 0; g < l.A; g++) evaluator.input(l.X + g) = a + of_a + g * width;
    for (int64_t k = 0; k < l.U; k++) {
      evaluator.input(l.X + l.A + l.S + k) = static_cast<const Number*>(l.units[k]) + unit;
    }
  }
};

template <class Number>
void forward(const FlexForward& f) {
  using Format = Plain<Number>;
  const Rows<Number> rows{f};
  const int64_t width = rows.width, columns = f.A * width;
  const Panels<Number> panels(columns);
  const int64_t padded = f.A ? panels.width() : 0, stride = f.K * padded;
  Buffer<Number> packed(f.K * padded * width), bias(stride);
  const Number *w_hh = static_cast<const Number*>(f.w_hh), *b_hh = static_cast<const Number*>(f.b_hh);
  for (int64_t head = 0; f.A && head < f.K; head++) {
    for (int64_t p = 0; p < panels.count(); p++) {
      pack_transposed<Format>(packed + head * padded * width, w_hh + head * columns * width, width, panels, p);
    }
    for (int64_t c = 0; c < padded; c++) {
      const int64_t gate = c / width, unit = head * width + c % width;
      bias[head * padded + c] = b_hh && c < columns ? b_hh[gate * f.H + unit] : Number(0);
    }
  }
  const int64_t tasks = max(1, min(f.N, f.threads));
  parallel(tasks, [&](int64_t task) {
    const Range ns = share(f.N, task, tasks);
    const int64_t M = ns.end - ns.begin;
    Evaluator<Number> evaluator(f.program);
    Buffer<Number> a(max(1, M * stride));
    for (int64_t i = 0; i < f.T; i++) {
      const int64_t t = rows.step(i);
      for (int64_t n = ns.begin; n < ns.end; n++) {
        for (int64_t s = 0; s < f.S; s++) {
          Number* state = static_cast<Number*>(f.states[s]) + n * f.H;
          if (rows.cut(t, n)) {
            for (int64_t u = 0; u < f.H; u++) state[u] = Number(f.initial[s]);
          }
          if (f.before) memcpy(static_cast<Number*>(f.before[s]) + (t * f.N + n) * f.H, state, f.H * sizeof(Number));
        }
      }
      const Number* h = static_cast<const Number*>(f.states[0]) + ns.begin * f.H;
      for (int64_t head = 0; f.A && head < f.K; head++) {
        for (int64_t p = 0; p < panels.count(); p++) {
          const int64_t at = head * padded + panels.start(p);
          product_in_registers<Number, Number>(h + head * width, f.H, M,
                                               packed + head * padded * width + panels.start(p) * width,
                                               panels.vectors(p), width, bias + at, 0, a + at, stride);
        }
      }
      for (int64_t n = ns.begin; n < ns.end; n++) {
        const int64_t row = t * f.N + n;
        const Number* of_row = a + (n - ns.begin) * stride;
        for (int64_t head = 0; f.a_gates && head < f.K; head++) {
          memcpy(static_cast<Number*>(f.a_gates) + row * f.A * f.H + head * columns, of_row + head * padded,
                 columns * sizeof(Number));
        }
        if (!rows.valid(t, n)) {
          for (int64_t s = 0; s < f.S; s++) {
            memset(static_cast<Number*>(f.every[s]) + row * f.H, 0, f.H * sizeof(Number));
          }
          continue;
        }
        rows.strips([&](int64_t unit, int64_t of_a, int64_t count) {
          rows.set_inputs(evaluator, row, of_row + unit / width * (padded - columns), unit, of_a);
          for (int64_t s = 0; s < f.S; s++) {
            evaluator.input(f.X + f.A + s) = static_cast<const Number*>(f.states[s]) + n * f.H + unit;
          }
          evaluator.run(count);
          for (int64_t s = 0; s < f.S; s++) {
            evaluator.copy_result(s, static_cast<Number*>(f.states[s]) + n * f.H + unit, count);
            evaluator.copy_result(s, static_cast<Number*>(f.every[s]) + row * f.H + unit, count);
          }
        });
      }
    }
  });
}

template <class Number>
void backward(const FlexBackward& b) {
  using Format = Plain<Number>;
  const Rows<Number> rows{b};
  const int64_t width = rows.width, columns = b.A * width, first_gradient = b.X + b.A + b.S + b.U;
  const Panels<Number> panels(width);
  const int64_t padded = panels.width(), stride = b.K * padded;
  Buffer<Number> packed(b.K * padded * columns);
  const Number* w_hh = static_cast<const Number*>(b.w_hh);
  for (int64_t head = 0; b.A && head < b.K; head++) {
    for (int64_t p = 0; p < panels.count(); p++) {
      pack_rows<Format>(packed + head * padded * columns, columns, Range{0, columns}, panels, p,
                        [&](int64_t k) { return w_hh + (head * columns + k) * width; });
    }
  }
  const int64_t tasks = max(1, min(b.N, b.threads));
  parallel(tasks, [&](int64_t task) {
    const Range ns = share(b.N, task, tasks);
    const int64_t M = ns.end - ns.begin;
    Evaluator<Number> evaluator(b.program);
    Buffer<Number> through(max(1, M * stride)), incoming(b.S * kStrip);
    for (int64_t i = b.T - 1; i >= 0; i--) {
      const int64_t t = rows.step(i);
      for (int64_t n = ns.begin; n < ns.end; n++) {
        const int64_t row = t * b.N + n;
        Number *dx = static_cast<Number*>(b.dx_gates) + row * b.X * b.H,
               *da = static_cast<Number*>(b.da_gates) + row * b.A * b.H,
               *du = static_cast<Number*>(b.d_units) + row * b.U * b.H;
        if (!rows.valid(t, n)) {
          memset(dx, 0, b.X * b.H * sizeof(Number));
          memset(da, 0, b.A * b.H * sizeof(Number));
          memset(du, 0, b.U * b.H * sizeof(Number));
          continue;
        }
        rows.strips([&](int64_t unit, int64_t of_a, int64_t count) {
          rows.set_inputs(evaluator, row, static_cast<const Number*>(b.a_gates) + row * b.A * b.H, unit, of_a);
          for (int64_t s = 0; s < b.S; s++) {
            evaluator.input(b.X + b.A + s) = static_cast<const Number*>(b.before[s]) + row * b.H + unit;
            const Number *d = static_cast<const Number*>(b.d_states[s]) + n * b.H + unit,
                         *more = static_cast<const Number*>(b.d_every[s]);
            if (more) {
              more += row * b.H + unit;
              for (int64_t u = 0; u < count; u++) incoming[s * kStrip + u] = d[u] + more[u];
              d = incoming + s * kStrip;
            }
            evaluator.input(first_gradient + s) = d;
          }
          evaluator.run(count);
          int64_t k = 0;
          for (int64_t g = 0; g < b.X; g++) evaluator.copy_result(k++, dx + g * b.H + unit, count);
          for (int64_t g = 0; g < b.A; g++) evaluator.copy_result(k++, da + of_a + g * width, count);
          for (int64_t s = 0; s < b.S; s++) {
            evaluator.copy_result(k++, static_cast<Number*>(b.d_states[s]) + n * b.H + unit, count);
          }
          for (int64_t j = 0; j < b.U; j++) evaluator.copy_result(k++, du + j * b.H + unit, count);
        });
      }
      const Number* da = static_cast<const Number*>(b.da_gates) + (t * b.N + ns.begin) * b.A * b.H;
      for (int64_t head = 0; b.A && head < b.K; head++) {
        for (int64_t p = 0; p < panels.count(); p++) {
          product_in_registers<Number, Number>(
              da + head * columns, b.A * b.H, M, packed + (head * padded + panels.start(p)) * columns,
              panels.vectors(p), columns, kZeros<Number>, 0, through + head * padded + panels.start(p), stride);
        }
      }
      for (int64_t n = ns.begin; n < ns.end; n++) {
        for (int64_t s = 0; s < b.S; s++) {
          Number* d = static_cast<Number*>(b.d_states[s]) + n * b.H;
          if (rows.valid(t, n) && rows.cut(t, n)) {
            memset(d, 0, b.H * sizeof(Number));
          } else if (s == 0 && b.A && rows.valid(t, n)) {
            for (int64_t u = 0; u < b.H; u++) d[u] += through[(n - ns.begin) * stride + u / width * padded + u % width];
          }
        }
      }
    }
  });
}

}  // namespace

const FlexKernels flex = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
