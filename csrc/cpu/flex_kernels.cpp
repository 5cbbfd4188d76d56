// The evaluator of a traced cell: compiled once per instruction set, each time into a namespace of its own.
//
// An operation works on a strip of vectors, which with all that the program makes stays in L1. A step takes some blocks
// of units at a time, right from the product with W_hh through the program. W_ih x is made for a stretch of steps at a
// time, and the gradients of the weights and of x after the sweep, as for the built-in cells. A program with means over
// the units of a row runs in segments, each on all units of some rows before the next.
#include "flex.h"
#include "sweep.h"
#include "transposed_product.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

constexpr int64_t kStrip = 16;  // vectors: as many as make the choice of an operation cheap, and values stay in L1

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

// Vectors of units that a program runs on at once: some blocks of U units of some rows.
struct Strip {
  int64_t row, rows, block, blocks;
  int64_t pass_row;     // its first row among those of the pass
  int64_t unit, place;  // its first unit in a row of a tensor, and in one of a buffer
  int lanes;            // of a block that a head ends in there may be fewer than U; it is a strip's only one
};

// Where a value lies, how far apart its rows are, and its blocks. A number is the same in all.
template <class Number>
struct Operand {
  const Number* data;
  int64_t row, block;
};

// Of an operation that reads a, or a and b, or all three.
template <class Number>
RNNFAST_INLINE Vec<Number> result_of(int op, Vec<Number> a, Vec<Number> b, Vec<Number> c) {
  const Vec<Number> one(1), zero(0);
  switch (op) {
    case kAdd:
      return a + b;
    case kSubtract:
      return a - b;
    case kMultiply:
      return a * b;
    case kDivide:
      return a / b;
    case kNegate:
      return -a.v;
    case kSigmoid:
      return sigmoid(a);
    case kTanh:
      return tanh(a);
    case kRelu:
      return relu(a);
    case kExp:
      return exp(a);
    case kLog:
      return log(a);
    case kLog1p:
      return log1p(a);
    case kSqrt:
      return root(a);
    case kAbs:
      return abs(a);
    case kMinimum:  // NaN of either, as torch has it
      return select(a.v < b.v || a.v != a.v, a, b);
    case kMaximum:
      return select(a.v > b.v || a.v != a.v, a, b);
    case kWhere:
      return select(a.v != 0, b, c);
    case kLess:
      return select(a.v < b.v, one, zero);
    case kLessEqual:
      return select(a.v <= b.v, one, zero);
    case kWherePositive:
      return zero_where_not_positive(a, b);
    case kSigmoidOfSum:
      return sigmoid(a + b);
    case kTanhOfSum:
      return tanh(a + b);
    case kMultiplyAdd:
      return a * b + c;
    case kSubtractProduct:
      return c - a * b;
    case kMultiplyDifference:
      return (a - b) * c;
    case kMultiplyTwice:
      return a * b * c;
  }
  return a;
}

// An operation with where it reads and writes: to[row][block], with rows so far apart.
template <class Number>
struct Instruction {
  void (*apply)(const Instruction&, int64_t rows, int64_t blocks);
  const Operand<Number>* args[3];
  Number* to;
  int64_t stride;
  bool of_row;  // it makes one number for all units of a row
};

template <class Number, int op>
void apply(const Instruction<Number>& i, int64_t rows, int64_t blocks) {
  Operand<Number> a = *i.args[0], b = *i.args[1], c = *i.args[2];
  Number* to = i.to;
  for (const int64_t stride = i.stride; rows > 0; rows--) {
    for (int64_t j = 0; j < blocks; j++) {
      store(to + j * kLanes<Number>,
            result_of(op, load(a.data + j * a.block), load(b.data + j * b.block), load(c.data + j * c.block)));
    }
    to += stride, a.data += a.row, b.data += b.row, c.data += c.row;
  }
}

template <class Number, size_t... op>
constexpr auto applies_of(std::index_sequence<op...>) {
  struct {
    decltype(Instruction<Number>::apply) at[sizeof...(op)];
  } found = {{apply<Number, op>...}};
  return found;
}
template <class Number>
constexpr auto kApply = applies_of<Number>(std::make_index_sequence<kOps>());  // by operation

// How rows of units lie, [K][H/K] in tensors, and in buffers with each head padded to whole blocks; and which rows and
// units belong to a step.
template <class Number>
struct Rows {
  static constexpr int U = kLanes<Number>;
  const FlexLayer& l;
  int64_t width = l.H / l.K, blocks = ceil_div(width, U), padded = l.K * blocks * U;

  int64_t time(int64_t step) const { return l.reverse ? l.T - 1 - step : step; }
  bool valid(int64_t t, int64_t n) const { return !l.lengths || t < l.lengths[n]; }
  // From the first valid row to the last one.
  Range valid(int64_t t, Range ns) const {
    while (ns.begin < ns.end && !valid(t, ns.begin)) ns.begin++;
    while (ns.begin < ns.end && !valid(t, ns.end - 1)) ns.end--;
    return ns;
  }
  // Whether the state that enters step t is the initial one, for there is a border: of the reverse direction above t.
  bool cut(int64_t t, int64_t n) const {
    const int64_t at = l.reverse ? t + 1 : t;
    return l.resets && at < l.T && valid(at, n) && l.resets[at * l.N + n];
  }

  // of(where a block lies in a row of a tensor, where in one of a buffer, its lanes)
  template <class Of>
  void each_block(const Of& of) const {
    for (int64_t head = 0; head < l.K; head++) {
      for (int64_t b = 0; b < blocks; b++) of(head * width + b * U, (head * blocks + b) * U, min(U, width - b * U));
    }
  }
  void to_buffer(Number* to, const void* tensor, int64_t row) const {
    const Number* from = static_cast<const Number*>(tensor) + row * l.H;
    each_block([&](int64_t unit, int64_t place, int lanes) { store(to + place, load(from + unit, lanes)); });
  }
  void to_tensor(void* tensor, int64_t row, const Number* from) const {
    Number* to = static_cast<Number*>(tensor) + row * l.H;
    each_block([&](int64_t unit, int64_t place, int lanes) { store(to + unit, load(from + place), lanes); });
  }

  // Calls of(strip) for these blocks of a head, at most kStrip, in these rows.
  template <class Of>
  void strips(int64_t head, Range bs, Range ns, const Of& of) const {
    const int64_t whole = min(bs.end, width / U);
    const auto some = [&](Range bs) {
      const int64_t count = bs.end - bs.begin, at_once = count ? kStrip / count : 0;
      const int lanes = min(U, width - bs.begin * U);
      for (int64_t n = ns.begin; count && n < ns.end; n += at_once) {
        of(Strip{n, min(at_once, ns.end - n), bs.begin, count, n - ns.begin, head * width + bs.begin * U,
                 (head * blocks + bs.begin) * U, lanes});
      }
    };
    some({bs.begin, max(bs.begin, whole)});
    some({max(bs.begin, whole), bs.end});
  }
};

// Whether a step on a unit reads others of its row, beside their product with W_hh.
inline bool sees_rows(const Program& p) {
  bool found = false;
  for (int64_t k = 0; k < p.operations; k++) found |= p.operation[k].op == kMean;
  return found;
}

// As of a layer of these sizes. What a program does to a unit costs as much as a weight an operation. Where it sees
// rows the threads share these alone.
template <class Number>
Teams teams_of(const FlexLayer& l, const Rows<Number>& rows) {
  Layer like{};
  like.steps.T = l.T, like.steps.N = l.N, like.R = l.T * l.N, like.D = 1, like.threads = l.threads;
  like.P = (l.A ? rows.width : l.I) + l.program.operations;
  Teams teams(like, Panels<Number>(l.H, max(1, l.A ? l.A : l.X)), Cost::of<Plain<Number>>());
  if (teams.parts > 1 && sees_rows(l.program)) teams.groups_per_direction = min(l.N, teams.parts), teams.parts = 1;
  return teams;
}

// The units of all heads in pieces that a step takes at a time, shared by the parts of a team. They begin with a panel.
template <class Number>
struct Pieces {
  struct Piece {
    int64_t head;
    Range blocks;
  };
  int64_t size, of_head, count;
  int64_t at_once;  // all of a row, where a step sees them

  Pieces(const Rows<Number>& rows, const Teams& teams, int64_t per_panel)
      : size(min(kStrip, round_up(ceil_div(rows.l.K * rows.blocks, teams.parts), per_panel))),
        of_head(ceil_div(rows.blocks, size)),
        count(rows.l.K * of_head),
        at_once(sees_rows(rows.l.program) ? count : 1),
        pieces_(count) {
    for (int64_t k = 0; k < count; k++) {
      pieces_[k] = {k / of_head, {k % of_head * size, min(rows.blocks, (k % of_head + 1) * size)}};
    }
  }
  const Piece& operator[](int64_t k) const { return pieces_[k]; }

  // Calls of(pieces) for a part's share of them, those that are taken at once.
  template <class Of>
  void each(int64_t part, int64_t parts, int64_t step, const Of& of) const {
    to_and_fro(share(at_once > 1 ? 1 : count, part, parts), step,
               [&](int64_t i) { of(Range{i * at_once, (i + 1) * at_once}); });
  }

 private:
  Buffer<Piece> pieces_;
};

// When the operations of a program run, and where what they make lies.
class Schedule {
 public:
  struct Step {
    int64_t slot;  // among those of its kind
    bool of_row;   // one number for all units of a row
    bool is_kept;  // beyond its segment, for the whole row
  };

  explicit Schedule(const Program& p) : steps_(p.operations), ends_(p.operations + 1) {
    const int64_t first = p.inputs + p.numbers;
    Buffer<int64_t> from(p.places()), last_segment(p.places()), last(p.places()), free_slots(p.operations);
    Buffer<bool> of_row(p.places());
    for (int64_t place = 0; place < first; place++) {
      from[place] = 0;
      of_row[place] = place >= p.inputs || (place >= p.row_inputs[0] && place < p.row_inputs[1]);
    }
    for (int64_t place = 0; place < p.places(); place++) last_segment[place] = 0;
    const auto each_arg = [&](int64_t k, const auto& of) {
      for (int64_t i = 0; i < arity(p.operation[k].op); i++) of(p.operation[k].args[i]);
    };
    // A segment ends before the first operation that reads a mean of it.
    int64_t segment = 0;
    for (int64_t k = 0; k < p.operations; k++) {
      const bool is_mean = p.operation[k].op == kMean;
      int64_t needs = segment;
      bool is_of_row = true;
      each_arg(k, [&](int64_t place) { needs = max(needs, from[place]), is_of_row &= of_row[place]; });
      for (; segment < needs; segment++) ends_[segment] = k;
      each_arg(k, [&](int64_t place) { last_segment[place] = segment, last[place] = k; });
      from[first + k] = segment + is_mean, of_row[first + k] = is_mean || is_of_row;
      segments = max(segments, from[first + k] + 1);
    }
    for (; segment < segments; segment++) ends_[segment] = p.operations;
    for (int64_t k = 0; k < p.results; k++) last_segment[p.result[k]] = segments - 1, last[p.result[k]] = p.operations;
    // Memory of a strip is dealt anew after the last use of what was there; but not of a number for a row, for what
    // reads it last may be written to more than that.
    int64_t free = 0;
    for (int64_t k = 0; k < p.operations; k++) {
      const int64_t place = first + k;
      each_arg(k, [&](int64_t arg) {
        if (arg < first || last[arg] != k) return;
        last[arg] = -1;
        if (is_dealt_anew(p, arg - first)) free_slots[free++] = steps_[arg - first].slot;
      });
      Step& step = steps_[k];
      step.of_row = of_row[place], step.is_kept = last_segment[place] > from[place];
      if (p.operation[k].op == kMean) {
        step.slot = means++;
      } else if (step.is_kept) {
        step.slot = kept++;
      } else {
        step.slot = free ? free_slots[--free] : slots++;
      }
    }
  }

  const Step& operator[](int64_t k) const { return steps_[k]; }
  Range operations(int64_t segment) const { return {segment ? ends_[segment - 1] : 0, ends_[segment]}; }

  int64_t segments = 1, slots = 0, kept = 0, means = 0;

  static int arity(int64_t op) {
    switch (op) {
      case kWhere:
      case kMultiplyAdd:
      case kSubtractProduct:
      case kMultiplyDifference:
      case kMultiplyTwice:
        return 3;
      case kAdd:
      case kSubtract:
      case kMultiply:
      case kDivide:
      case kMinimum:
      case kMaximum:
      case kLess:
      case kLessEqual:
      case kWherePositive:
      case kSigmoidOfSum:
      case kTanhOfSum:
        return 2;
      default:
        return 1;
    }
  }

 private:
  bool is_dealt_anew(const Program& p, int64_t k) const {
    return p.operation[k].op != kMean && !steps_[k].is_kept && !steps_[k].of_row;
  }

  Buffer<Step> steps_;
  Buffer<int64_t> ends_;  // by segment
};

// Runs a program on strips: of a thread, with memory for all that the program makes.
template <class Number>
class Evaluator {
  static constexpr int U = kLanes<Number>;

 public:
  Evaluator(const Program& p, const Rows<Number>& rows)
      : p_(p),
        rows_(rows),
        schedule_(p),
        pass_rows_(max(1, kStrip / min(kStrip, rows.blocks))),
        numbers_(p.numbers * U),
        ends_(p.inputs * kStrip * U),
        made_(schedule_.slots * kStrip * U),
        kept_(schedule_.kept * pass_rows_ * rows.padded),
        totals_(schedule_.means * pass_rows_ * U),
        means_(schedule_.means * pass_rows_ * U),
        places_(p.places()),
        code_(p.operations) {
    for (int64_t k = 0; k < p.numbers; k++) {
      store(numbers_ + k * U, Vec<Number>(Number(p.number[k])));
      places_[p.inputs + k] = {numbers_ + k * U, 0, 0};
    }
    for (int64_t k = 0; k < p.operations; k++) {
      const Operation& o = p.operation[k];
      code_[k] = {kApply<Number>.at[o.op]};
      for (int i = 0; i < 3; i++) code_[k].args[i] = places_ + o.args[i];
    }
    clear(totals_, schedule_.means * pass_rows_ * U * sizeof(Number));
  }

  // Calls of(strip, k) for strips of all of these pieces in these rows, segment by segment: it has the inputs read and
  // the segment run, and in the last one the results written.
  template <class Of>
  void passes(const Pieces<Number>& pieces, Range ks, Range ns, const Of& of) {
    const int64_t at_once = schedule_.segments > 1 ? pass_rows_ : ns.end - ns.begin;
    for (int64_t n = ns.begin; n < ns.end; n += at_once) {
      const Range of_pass{n, min(ns.end, n + at_once)};
      for (segment_ = 0; segment_ < schedule_.segments; segment_++) {
        for (int64_t k = ks.begin; k < ks.end; k++) {
          rows_.strips(pieces[k].head, pieces[k].blocks, of_pass, [&](const Strip& strip) { of(strip, k); });
        }
        finish_means(of_pass.end - of_pass.begin);
      }
    }
  }
  bool is_first() const { return segment_ == 0; }
  bool is_last() const { return segment_ == schedule_.segments - 1; }

  // Where input k lies: in rows of a buffer, or the same for all rows.
  void read(int64_t k, Operand<Number> operand) { places_[k] = operand; }
  // In rows of a tensor, of which `rows` is the strip's first. The end of a head is copied: behind it there may be
  // nothing.
  void read(int64_t k, const void* rows, int64_t stride, const Strip& strip) {
    const Number* from = static_cast<const Number*>(rows);
    if (strip.lanes == U) return read(k, {from + strip.unit, stride, U});
    read_each(k, strip, [&](int64_t i) { return from + i * stride; });
  }
  // In rows wherever they lie.
  template <class RowAt>
  void read_each(int64_t k, const Strip& strip, const RowAt& row_at) {
    Number *to = ends_ + k * kStrip * U, *next = to;
    for (int64_t i = 0; i < strip.rows; i++) {
      const Number* from = row_at(i) + strip.unit;
      for (int64_t j = 0; j < strip.blocks; j++, next += U) store(next, load(from + j * U, strip.lanes));
    }
    read(k, {to, strip.blocks * U, U});
  }

  // Numbers of rows, so far apart.
  void read_of_rows(int64_t k, const Number* from, int64_t stride, const Strip& strip) {
    Number* to = ends_ + k * kStrip * U;
    for (int64_t i = 0; i < strip.rows; i++) store(to + i * U, Vec<Number>(from[i * stride]));
    read(k, {to, U, 0});
  }

  void run(const Strip& strip) {
    if (strip.blocks != blocks_) place(strip.blocks);
    const Range operations = schedule_.operations(segment_);
    for (int64_t k = 0; k < operations.begin; k++) {
      const bool is_mean = p_.operation[k].op == kMean;
      if (is_mean || schedule_[k].is_kept) made(k) = is_mean ? mean(k, strip) : kept(k, strip);
    }
    for (int64_t k = operations.begin; k < operations.end; k++) {
      Instruction<Number>& i = code_[k];
      if (p_.operation[k].op == kMean) {
        add_up(k, *i.args[0], strip);
        continue;
      }
      if (schedule_[k].is_kept) i.to = kept_at(k, strip), made(k) = kept(k, strip);
      i.apply(i, strip.rows, i.of_row ? 1 : strip.blocks);
    }
  }

  // Writes result k to a place in the strip's first row, of those rows of the strip that are valid.
  template <class Valid>
  void write(int64_t k, Number* to, int64_t stride, const Strip& strip, int lanes, const Valid& valid) const {
    Operand<Number> from = places_[p_.result[k]];
    for (int64_t i = 0; i < strip.rows; i++, to += stride, from.data += from.row) {
      if (!valid(strip.row + i)) continue;
      for (int64_t j = 0; j < strip.blocks; j++) store(to + j * U, load(from.data + j * from.block), lanes);
    }
  }
  template <class Valid>
  void write_of_rows(int64_t k, Number* to, int64_t stride, const Strip& strip, const Valid& valid) const {
    const Operand<Number> from = places_[p_.result[k]];
    for (int64_t i = 0; i < strip.rows; i++) {
      if (valid(strip.row + i)) to[i * stride] = from.data[i * from.row];
    }
  }
  // As write, but adds it to what is there.
  template <class Valid>
  void add(int64_t k, Number* to, int64_t stride, const Strip& strip, const Valid& valid) const {
    Operand<Number> from = places_[p_.result[k]];
    for (int64_t i = 0; i < strip.rows; i++, to += stride, from.data += from.row) {
      if (!valid(strip.row + i)) continue;
      for (int64_t j = 0; j < strip.blocks; j++) {
        store(to + j * U, load(to + j * U, strip.lanes) + load(from.data + j * from.block), strip.lanes);
      }
    }
  }

 private:
  Operand<Number>& made(int64_t k) { return places_[p_.inputs + p_.numbers + k]; }
  // Deals out the memory for what is made of strips of so many blocks.
  void place(int64_t blocks) {
    blocks_ = blocks;
    for (int64_t k = 0; k < p_.operations; k++) {
      const auto& step = schedule_[k];
      Instruction<Number>& i = code_[k];
      i.of_row = step.of_row, i.stride = step.is_kept ? rows_.padded : step.of_row ? U : blocks * U;
      if (step.is_kept || p_.operation[k].op == kMean) continue;
      i.to = made_ + step.slot * kStrip * U;
      made(k) = {i.to, i.stride, step.of_row ? 0 : U};
    }
  }
  // What stays beyond its segment lies in a pass's rows as in a buffer's.
  Number* kept_at(int64_t k, const Strip& strip) const {
    const auto& step = schedule_[k];
    return kept_ + (step.slot * pass_rows_ + strip.pass_row) * rows_.padded + (step.of_row ? 0 : strip.place);
  }
  Operand<Number> kept(int64_t k, const Strip& strip) const {
    return {kept_at(k, strip), rows_.padded, schedule_[k].of_row ? 0 : U};
  }
  Operand<Number> mean(int64_t k, const Strip& strip) const {
    return {means_ + (schedule_[k].slot * pass_rows_ + strip.pass_row) * U, U, 0};
  }
  // A strip by itself first, for accuracy; and no lane behind the end of a head.
  void add_up(int64_t k, Operand<Number> from, const Strip& strip) {
    Number* total = totals_ + (schedule_[k].slot * pass_rows_ + strip.pass_row) * U;
    for (int64_t i = 0; i < strip.rows; i++, total += U, from.data += from.row) {
      Vec<Number> sum(0);
      for (int64_t j = 0; j < strip.blocks; j++) sum = sum + load(from.data + j * from.block, strip.lanes);
      store(total, load(total) + sum);
    }
  }
  void finish_means(int64_t rows) {
    const Range operations = schedule_.operations(segment_);
    for (int64_t k = operations.begin; k < operations.end; k++) {
      if (p_.operation[k].op != kMean) continue;
      for (int64_t i = 0; i < rows; i++) {
        const int64_t at = (schedule_[k].slot * pass_rows_ + i) * U;
        double sum = 0;
        for (int64_t lane = 0; lane < U; lane++) sum += totals_[at + lane], totals_[at + lane] = 0;
        store(means_ + at, Vec<Number>(Number(sum / rows_.l.H)));
      }
    }
  }

  const Program& p_;
  const Rows<Number>& rows_;
  const Schedule schedule_;
  const int64_t pass_rows_;  // as many as make a strip
  int64_t segment_ = 0, blocks_ = 0;
  Buffer<Number> numbers_, ends_, made_, kept_, totals_, means_;
  Buffer<Operand<Number>> places_;
  Buffer<Instruction<Number>> code_;
};

// All panels of W^T; w [gates*units,K].
template <class Number>
void pack_weights(Number* packed, const Number* w, int64_t K, const Panels<Number>& panels, int64_t threads) {
  parallel_for(panels.count(), min(threads, 1 + panels.width() * K / kThreadWork),
               [&](int64_t p) { pack_transposed<Plain<Number>>(packed, w, K, panels, p); });
}

// W_ih and its bias, packed unless there are too few rows.
template <class Number>
class InputGates {
  static constexpr int U = kLanes<Number>;

 public:
  explicit InputGates(const FlexForward& f)
      : panels(f.X * f.H),
        I_(f.I),
        w_(static_cast<const Number*>(f.w_ih)),
        packed_(pays_to_pack(f.T * f.N, f.I) ? panels.width() * f.I : 0),
        bias_(panels.width()) {
    pack_vector<Number, Number>(bias_, static_cast<const Number*>(f.b_ih), panels);
    if (packed_) pack_weights<Number>(packed_, w_, I_, panels, f.threads);
  }

  // Gates of some panels, of rows of x: to [rows][width].
  void multiply(const Number* x, int64_t rows, Range ps, Number* to) const {
    for (int64_t p = ps.begin; p < ps.end; p++) {
      const int64_t at = panels.start(p);
      if (packed_) {
        product_in_registers<Number, Number>(x, I_, rows, packed_ + at * I_, panels.vectors(p), I_, bias_ + at, 0,
                                             to + at, panels.width());
      } else {
        product_unpacked({x, I_, 0}, rows, w_, panels, p, I_, bias_ + at, to + at, panels.width());
      }
    }
  }

  const Panels<Number> panels;

 private:
  const int64_t I_;
  const Number* const w_;
  const Buffer<Number> packed_, bias_;  // [panel][I][vector][U], [panel][vector][U]
};

// W_hh and its bias, for products that make all gates of some blocks; packed unless there are too few rows. A panel has
// all gates of one block, in groups of up to four, or four blocks of a single gate.
template <class Number>
class Gates {
  static constexpr int U = kLanes<Number>;

 public:
  Gates(const FlexForward& f, const Rows<Number>& rows)
      : A(f.A),
        width(rows.width),
        blocks(rows.blocks),
        per_panel(A == 1 ? kMaxVectors : 1),
        w_(static_cast<const Number*>(f.w_hh)),
        packed_(pays_to_pack(f.T * f.N, width) ? A * rows.padded * width : 0),
        bias_(A * rows.padded) {
    const Number* b = static_cast<const Number*>(f.b_hh);
    Buffer<Number> of_group(A * width);
    for (int64_t head = 0; head < f.K; head++) {
      each_group([&](Range gs, const Panels<Number>& panels) {
        for (int64_t g = gs.begin; b && g < gs.end; g++) {
          memcpy(of_group + (g - gs.begin) * width, b + g * f.H + head * width, width * sizeof(Number));
        }
        const int64_t at = start(head, gs);
        pack_vector(bias_ + at, b ? static_cast<const Number*>(of_group) : nullptr, panels);
        if (packed_) pack_weights<Number>(packed_ + at * width, weights(head, gs), width, panels, f.threads);
      });
    }
  }

  // Of blocks that begin with a panel's first, for the rows of h from `h` on: sums [rows][block][gate][U].
  void multiply(const Number* h, int64_t stride, int64_t rows, int64_t head, Range bs, Number* sums) const {
    for (int64_t b = bs.begin; b < bs.end; b += per_panel) {
      each_group([&](Range gs, const Panels<Number>& panels) {
        const int64_t p = b / per_panel, at = start(head, gs) + panels.start(p);
        const int64_t next = (bs.end - bs.begin) * A * U;
        Number* to = sums + ((b - bs.begin) * A + gs.begin) * U;
        if (packed_) {
          product_in_registers<Number, Number>(h, stride, rows, packed_ + at * width, panels.vectors(p), width,
                                               bias_ + at, 0, to, next);
        } else {
          product_unpacked({h, stride, 0}, rows, weights(head, gs), panels, p, width, bias_ + at, to, next);
        }
      });
    }
  }

  const int64_t A, width, blocks, per_panel;

 private:
  template <class Of>
  void each_group(const Of& of) const {
    const int64_t groups = ceil_div(A, kMaxVectors);
    for (int64_t i = 0; i < groups; i++) {
      const Range gs = share(A, i, groups);
      of(gs, Panels<Number>(width, gs.end - gs.begin));
    }
  }
  int64_t start(int64_t head, Range gs) const { return (head * A + gs.begin) * blocks * U; }
  const Number* weights(int64_t head, Range gs) const { return w_ + (head * A + gs.begin) * width * width; }

  const Number* const w_;
  const Buffer<Number> packed_, bias_;  // [head][group][panel][width][vector][U], [head][group][panel][vector][U]
};

// The units' weights in a buffer's rows.
template <class Number>
class Units {
 public:
  Units(const FlexLayer& l, const Rows<Number>& rows) : l_(l), padded_(rows.padded), packed_(l.U * rows.padded) {
    for (int64_t k = 0; k < l.U; k++) rows.to_buffer(packed_ + k * padded_, l.units[k], 0);
  }
  void read(Evaluator<Number>& evaluator, int64_t first, const Strip& strip) const {
    for (int64_t k = 0; k < l_.U; k++) {
      evaluator.read(first + k, {packed_ + k * padded_ + strip.place, 0, kLanes<Number>});
    }
  }

 private:
  const FlexLayer& l_;
  const int64_t padded_;
  Buffer<Number> packed_;
};

template <class Number>
Number* row_at(void* tensor, int64_t row, int64_t columns) {
  return static_cast<Number*>(tensor) + row * columns;
}
template <class Number>
const Number* row_at(const void* tensor, int64_t row, int64_t columns) {
  return static_cast<const Number*>(tensor) + row * columns;
}

// As Teams::run, of a sweep over each(stage) that calls stage(rows of the batch, part, parts).
template <class Sweep>
void run_rows(const Teams& teams, const Sweep& sweep) {
  teams.run([&](const auto& each) {
    sweep([&](const auto& stage) {
      each([&](int64_t g, int64_t part, int64_t parts) { stage(share(teams.N, g, teams.groups()), part, parts); });
    });
  });
}

template <class Number>
class ForwardSweep {
  static constexpr int U = kLanes<Number>;

 public:
  explicit ForwardSweep(const FlexForward& f)
      : f(f),
        rows{f},
        gates(f, rows),
        x_gates(f),
        units(f, rows),
        teams(teams_of(f, rows)),
        pieces(rows, teams, gates.per_panel),
        H(f.H),
        P(rows.padded),
        of_x(x_gates.panels.width()),
        of_saved(f.Y * H + f.R),
        of_piece(kBlockRows * pieces.size * f.A * U),
        chunk(chunk_steps(f.T, teams.rows(), of_x * sizeof(Number))),
        states((f.S + 1) * f.N * P),
        xs(f.N * chunk * f.I),
        projections(f.N * chunk * of_x) {}

  void run() const {
    run_rows(teams, [&](const auto& each) {
      Evaluator<Number> evaluator(f.program, rows);
      const Buffer<Number> sums(pieces.at_once * of_piece);
      each([&](Range ns, int64_t part, int64_t) {
        for (int64_t n = ns.begin; part == 0 && n < ns.end; n++) {
          for (int64_t s = 0; s < f.S; s++) rows.to_buffer(state(s, n, 0), f.states[s], n);
        }
      });
      for (int64_t s0 = 0; s0 < f.T; s0 += chunk) {
        const int64_t s1 = min(s0 + chunk, f.T);
        each([&](Range ns, int64_t part, int64_t parts) { gather(ns, s0, s1, part, parts); });
        each([&](Range ns, int64_t part, int64_t parts) {
          x_gates.multiply(xs + ns.begin * chunk * f.I, (ns.end - ns.begin) * (s1 - s0),
                           share(f.X ? x_gates.panels.count() : 0, part, parts), projection(ns, 0));
        });
        for (int64_t step = s0; step < s1; step++) {
          if (f.lengths || f.resets) {
            each([&](Range ns, int64_t part, int64_t) {
              if (part == 0) cut_and_end(ns, step);
            });
          }
          each([&](Range ns, int64_t part, int64_t parts) {
            const Number* x = projection(ns, step - s0);
            pieces.each(part, parts, step, [&](Range ks) { take(evaluator, sums, ks, ns, step, x); });
          });
        }
      }
      each([&](Range ns, int64_t part, int64_t) {
        for (int64_t n = ns.begin; part == 0 && n < ns.end; n++) {
          for (int64_t s = 0; s < f.S; s++) rows.to_tensor(f.states[s], n, state(s, n, f.T));
        }
      });
    });
  }

 private:
  // While a step lasts h is read by other units, so a new one goes elsewhere.
  Number* state(int64_t s, int64_t n, int64_t step) const {
    return states + ((s || step % 2 == 0 ? s : f.S) * f.N + n) * P;
  }
  // Of these rows in a step of the chunk.
  Number* projection(Range ns, int64_t step) const {
    return projections + (ns.begin * chunk + (ns.end - ns.begin) * step) * of_x;
  }

  void gather(Range ns, int64_t s0, int64_t s1, int64_t part, int64_t parts) const {
    const size_t bytes = (ns.end - ns.begin) * f.I * sizeof(Number);
    for (int64_t s = s0 + part; bytes && s < s1; s += parts) {
      memcpy(xs + (ns.begin * chunk + (ns.end - ns.begin) * (s - s0)) * f.I,
             row_at<Number>(f.x, rows.time(s) * f.N + ns.begin, f.I), bytes);
    }
  }

  // Gives states their initial value at a border, and those beyond a row's end on to the next step.
  void cut_and_end(Range ns, int64_t step) const {
    const int64_t t = rows.time(step);
    for (int64_t n = ns.begin; n < ns.end; n++) {
      const bool cut = rows.cut(t, n), valid = rows.valid(t, n);
      for (int64_t s = 0; s < f.S; s++) {
        Number* const old = state(s, n, step);
        for (int64_t u = 0; cut && u < P; u++) old[u] = Number(f.initial[s]);
        if (!valid && f.every[s]) clear(row_at<Number>(f.every[s], t * f.N + n, f.E), H * sizeof(Number));
      }
      if (!valid) memcpy(state(0, n, step + 1), state(0, n, step), P * sizeof(Number));
    }
  }

  // Some pieces of a step: the product, and the program on what it makes, some rows at a time.
  void take(Evaluator<Number>& evaluator, Number* sums, Range ks, Range ns, int64_t step, const Number* x) const {
    const int64_t t = rows.time(step), first = t * f.N;
    const auto valid = [&](int64_t n) { return rows.valid(t, n); };
    const auto sums_of = [&](int64_t k) { return sums + (k - ks.begin) * of_piece; };
    const Range live = rows.valid(t, ns);
    for (int64_t n = live.begin; n < live.end; n += kBlockRows) {
      const Range of_block{n, min(live.end, n + kBlockRows)};
      to_and_fro(ks, step, [&](int64_t k) {
        const auto& piece = pieces[k];
        gates.multiply(state(0, n, step) + piece.head * rows.blocks * U, P, of_block.end - n, piece.head, piece.blocks,
                       sums_of(k));
      });
      evaluator.passes(pieces, ks, of_block, [&](const Strip& strip, int64_t piece) {
        const Range bs = pieces[piece].blocks;
        const int64_t row = first + strip.row, of_row = (bs.end - bs.begin) * f.A * U;
        const Number *of_strip = x + (strip.row - ns.begin) * of_x, *z = row_at<Number>(f.z_gates, row, f.Z * H),
                     *a = sums_of(piece) + (strip.row - n) * of_row + (strip.block - bs.begin) * f.A * U;
        int64_t k = 0;
        for (int64_t g = 0; g < f.X; g++) evaluator.read(k++, of_strip + g * H, of_x, strip);
        for (int64_t g = 0; g < f.Z; g++) evaluator.read(k++, z + g * H, f.Z * H, strip);
        for (int64_t g = 0; g < f.A; g++) evaluator.read(k++, {a + g * U, of_row, f.A * U});
        for (int64_t s = 0; s < f.S; s++) evaluator.read(k++, {state(s, strip.row, step) + strip.place, P, U});
        units.read(evaluator, k, strip);
        evaluator.run(strip);
        if (!evaluator.is_last()) return;
        Number* saved = row_at<Number>(f.saved, row, of_saved);
        for (int64_t y = 0; y < f.Y; y++) {
          evaluator.write(f.S + y, saved + y * H + strip.unit, of_saved, strip, strip.lanes, valid);
        }
        for (int64_t r = 0; r < f.R; r++) {
          evaluator.write_of_rows(f.S + f.Y + r, saved + f.Y * H + r, of_saved, strip, valid);
        }
        for (int64_t s = 0; s < f.S; s++) {
          evaluator.write(s, state(s, strip.row, step + 1) + strip.place, P, strip, U, valid);
          if (!f.every[s]) continue;
          evaluator.write(s, row_at<Number>(f.every[s], row, f.E) + strip.unit, f.E, strip, strip.lanes, valid);
        }
      });
    }
  }

  const FlexForward& f;
  const Rows<Number> rows;
  const Gates<Number> gates;
  const InputGates<Number> x_gates;
  const Units<Number> units;
  const Teams teams;
  const Pieces<Number> pieces;
  const int64_t H, P, of_x, of_saved, of_piece;
  const int64_t chunk;  // steps
  const Buffer<Number> states, xs, projections;
};

// The states before a step: those after the one before it, unless there is none or a border.
template <class Number>
class StatesBefore {
 public:
  StatesBefore(const FlexBackward& b, const Rows<Number>& rows)
      : b_(b), rows_(rows), initial_(b.resets ? b.S * b.H : 0) {
    for (int64_t i = 0; b.resets && i < b.S * b.H; i++) initial_[i] = Number(b.initial[i / b.H]);
  }
  // [H] of row n; where step t lies beyond its end anything.
  const Number* operator()(int64_t s, int64_t t, int64_t n) const {
    if (rows_.cut(t, n)) return initial_ + s * b_.H;
    const int64_t before = b_.reverse ? t + 1 : t - 1;
    const bool is_first = before < 0 || before >= b_.T || (b_.reverse && !rows_.valid(before, n));
    return is_first ? row_at<Number>(b_.states[s], n, b_.H) : row_at<Number>(b_.every[s], before * b_.N + n, b_.H);
  }
  // Whether those of a step lie in different tensors.
  bool are_scattered() const { return b_.resets || (b_.lengths && b_.reverse); }

 private:
  const FlexBackward& b_;
  const Rows<Number>& rows_;
  const Buffer<Number> initial_;  // [S][H]
};

// From the last step to the first: the gradients at the gates, which stay, and those of the states.
template <class Number>
class BackwardSweep {
  static constexpr int U = kLanes<Number>;

 public:
  explicit BackwardSweep(const FlexBackward& b)
      : b(b),
        rows{b},
        before(b, rows),
        of_x(b.X * b.H),
        of_a(b.shares_gates ? of_x : b.A * b.H),
        dx_gates(b.T * b.N * of_x + U),
        own_da(b.shares_gates ? 0 : b.T * b.N * of_a + U),
        da_gates(b.shares_gates ? dx_gates : own_da),
        units(b, rows),
        teams(teams_of(b, rows)),
        pieces(rows, teams, 1),
        H(b.H),
        P(rows.padded),
        width(rows.width),
        columns(b.A * width),
        of_saved(b.Y * H + b.R),
        panels(width),
        w_hh(b.K * panels.width() * columns),
        d_states(b.S * b.N * P) {
    const int64_t count = panels.count();
    parallel_for(b.A ? b.K * count : 0, min(b.threads, 1 + b.A * H * width / kThreadWork), [&](int64_t k) {
      pack_rows<Plain<Number>>(packed(k / count), columns, Range{0, columns}, panels, k % count,
                               [&](int64_t row) { return row_at<Number>(b.w_hh, k / count * columns + row, width); });
    });
  }

  void run() const {
    run_rows(teams, [&](const auto& each) {
      Evaluator<Number> evaluator(b.program, rows);
      each([&](Range ns, int64_t part, int64_t) {
        for (int64_t n = ns.begin; part == 0 && n < ns.end; n++) {
          for (int64_t s = 0; s < b.S; s++) rows.to_buffer(d_state(s, n), b.d_states[s], n);
        }
      });
      for (int64_t step = b.T - 1; step >= 0; step--) {
        const int64_t t = rows.time(step);
        each([&](Range ns, int64_t part, int64_t parts) {
          const Range live = rows.valid(t, ns);
          if (b.lengths && part == 0) clear_ends(ns, t);
          pieces.each(part, parts, step, [&](Range ks) { take(evaluator, ks, live, t); });
        });
        if (b.A) {
          each([&](Range ns, int64_t part, int64_t parts) {
            const Range live = rows.valid(t, ns);
            to_and_fro(share(b.K * panels.count(), part, parts), step, [&](int64_t k) { carry(live, t, k); });
          });
        }
        if (b.resets) {
          each([&](Range ns, int64_t part, int64_t) {
            for (int64_t n = ns.begin; part == 0 && n < ns.end; n++) {
              if (!rows.valid(t, n) || !rows.cut(t, n)) continue;
              for (int64_t s = 0; s < b.S; s++) memset(d_state(s, n), 0, P * sizeof(Number));
            }
          });
        }
      }
      each([&](Range ns, int64_t part, int64_t) {
        for (int64_t n = ns.begin; part == 0 && n < ns.end; n++) {
          for (int64_t s = 0; s < b.S; s++) rows.to_tensor(b.d_states[s], n, d_state(s, n));
        }
      });
    });
  }

  const FlexBackward& b;
  const Rows<Number> rows;
  const StatesBefore<Number> before;
  const int64_t of_x, of_a;               // in a row of dx_gates, and of da_gates: [T*N][X*H], [T*N][K*columns]
  const Buffer<Number> dx_gates, own_da;  // a vector at a row's end may end beyond it
  Number* const da_gates;

 private:
  Number* packed(int64_t head) const { return w_hh + head * panels.width() * columns; }
  Number* d_state(int64_t s, int64_t n) const { return d_states + (s * b.N + n) * P; }

  void clear_ends(Range ns, int64_t t) const {
    for (int64_t n = ns.begin; n < ns.end; n++) {
      if (rows.valid(t, n)) continue;
      const int64_t row = t * b.N + n;
      clear(dx_gates + row * of_x, of_x * sizeof(Number));
      if (!b.shares_gates) clear(da_gates + row * of_a, of_a * sizeof(Number));
      if (b.dz_gates) clear(row_at<Number>(b.dz_gates, row, b.Z * H), b.Z * H * sizeof(Number));
    }
  }

  // Some pieces of a step, back through the program.
  void take(Evaluator<Number>& evaluator, Range ks, Range live, int64_t t) const {
    const auto valid = [&](int64_t n) { return rows.valid(t, n); };
    evaluator.passes(pieces, ks, live, [&](const Strip& strip, int64_t piece) {
      const int64_t row = t * b.N + strip.row;
      const Number* saved = row_at<Number>(b.saved, row, of_saved);
      int64_t k = 0;
      for (int64_t y = 0; y < b.Y; y++) evaluator.read(k++, saved + y * H, of_saved, strip);
      for (int64_t r = 0; r < b.R; r++) evaluator.read_of_rows(k++, saved + b.Y * H + r, of_saved, strip);
      for (int64_t s = 0; s < b.S; s++, k++) {
        if (before.are_scattered()) {
          evaluator.read_each(k, strip, [&](int64_t i) { return before(s, t, strip.row + i); });
        } else {
          evaluator.read(k, before(s, t, strip.row), H, strip);
        }
      }
      for (int64_t s = 0; s < b.S; s++) evaluator.read(k++, row_at<Number>(b.every[s], row, H), H, strip);
      units.read(evaluator, k, strip);
      k += b.U;
      for (int64_t s = 0; s < b.S; s++) {
        Number* const d = d_state(s, strip.row) + strip.place;
        for (int64_t i = 0; evaluator.is_first() && b.d_every[s] && i < strip.rows; i++) {
          if (!valid(strip.row + i)) continue;
          const Number* more = row_at<Number>(b.d_every[s], row + i, H) + strip.unit;
          for (int64_t j = 0; j < strip.blocks * U; j += U) {
            store(d + i * P + j, load(d + i * P + j) + load(more + j, strip.lanes));
          }
        }
        evaluator.read(k++, {d, P, U});
      }
      evaluator.run(strip);
      if (evaluator.is_last()) write(evaluator, strip, piece, t, valid);
    });
  }

  template <class Valid>
  void write(const Evaluator<Number>& evaluator, const Strip& strip, int64_t piece, int64_t t,
             const Valid& valid) const {
    const int64_t row = t * b.N + strip.row;
    int64_t result = 0;
    const auto write = [&](Number* to, int64_t stride) {
      evaluator.write(result++, to, stride, strip, strip.lanes, valid);
    };
    for (int64_t g = 0; g < b.X; g++) write(dx_gates + row * of_x + g * H + strip.unit, of_x);
    for (int64_t g = 0; b.dz_gates && g < b.Z; g++) {
      write(row_at<Number>(b.dz_gates, row, b.Z * H) + g * H + strip.unit, b.Z * H);
    }
    result = b.X + b.Z;
    for (int64_t g = 0; !b.shares_gates && g < b.A; g++) {
      write(da_gates + row * of_a + pieces[piece].head * columns + g * width + strip.block * U, of_a);
    }
    for (int64_t s = 0; s < b.S; s++) {
      evaluator.write(result++, d_state(s, strip.row) + strip.place, P, strip, U, valid);
    }
    Number* du = row_at<Number>(b.d_units, t / kUnitSteps * b.N + strip.row, b.U * H) + strip.unit;
    for (int64_t j = 0; j < b.U; j++) evaluator.add(result++, du + j * H, b.U * H, strip, valid);
  }

  // Adds what comes through a panel of W_hh to the gradient of h.
  void carry(Range live, int64_t t, int64_t k) const {
    const int64_t head = k / panels.count(), p = k % panels.count();
    Number* d = d_state(0, live.begin) + head * rows.blocks * U + panels.start(p);
    product_in_registers<Number, Number>(da_gates + (t * b.N + live.begin) * of_a + head * columns, of_a,
                                         live.end - live.begin, packed(head) + panels.start(p) * columns,
                                         panels.vectors(p), columns, d, P, d, P);
  }

  const Units<Number> units;
  const Teams teams;
  const Pieces<Number> pieces;
  const int64_t H, P, width, columns, of_saved;
  const Panels<Number> panels;
  const Buffer<Number> w_hh, d_states;  // [head][panel][columns][vector][U], [S][N][P]
};

// The products that follow a sweep: the gradients of x, of W_ih, W_hh and the biases, of those at the gates.
template <class Number>
class GateProducts {
  static constexpr int U = kLanes<Number>;
  using Product = TransposedProduct<Number, Plain<Number>, Plain<Number>>;

 public:
  explicit GateProducts(const BackwardSweep<Number>& sweep) : sweep(sweep), b(sweep.b) {}

  void inputs() const {
    const Panels<Number> panels(b.I);
    const int64_t depth = b.X * b.H;
    const Buffer<Number> packed(panels.width() * depth);
    parallel_for(panels.count(), threads(1, b.I), [&](int64_t p) {
      pack_rows<Plain<Number>>(packed, depth, {0, depth}, panels, p,
                               [&](int64_t k) { return row_at<Number>(b.w_ih, k, b.I); });
    });
    parallel_for(ceil_div(rows, kBlockRows) * panels.count(), threads(rows, b.I), [&](int64_t task) {
      const int64_t p = task % panels.count(), q0 = task / panels.count() * kBlockRows;
      const int64_t count = min(kBlockRows, rows - q0), next = panels.vectors(p) * U;
      Number sums[kBlockRows * kMaxVectors * U];
      product_in_registers<Number, Number>(sweep.dx_gates + q0 * depth, depth, count, packed + panels.start(p) * depth,
                                           panels.vectors(p), depth, kZeros<Number>, 0, sums, next);
      for (int64_t i = 0; i < count; i++) {
        Number* to = row_at<Number>(b.dx, q0 + i, b.I);
        for (int v = 0; v < panels.vectors(p); v++) {
          store(to + panels.column(p, v), load(sums + i * next + v * U), panels.lanes(p, v));
        }
      }
    });
  }

  void weights() const {
    const int64_t width = b.H / b.K, stretches = max(1, ceil_div(rows, kStretch)), heads = b.A ? b.K : 0;
    const Panels<Number> of_x(b.X * b.H), of_h(b.A * width);
    const Buffer<Number> x(stretches * kStretch * b.I), h(stretches * kStretch * b.H);
    const auto head = [&](int64_t k) { return h + k * stretches * kStretch * width; };
    parallel_for(ceil_div(rows, U), b.threads, [&](int64_t block) {
      const int64_t q0 = block * U;
      const auto put = [&](Number* to, int64_t size, const auto& row_of) {
        const Number* of_rows[U] = {};
        for (int64_t q = q0; q < min(q0 + U, rows); q++) of_rows[q - q0] = row_of(q);
        Product::put_rows(to, q0, size, of_rows);
      };
      if (b.X) put(x, b.I, [&](int64_t q) { return row_at<Number>(b.x, q, b.I); });
      for (int64_t k = 0; k < heads; k++) {
        put(head(k), width, [&](int64_t q) -> const Number* {
          const int64_t t = q / b.N, n = q % b.N;
          return sweep.rows.valid(t, n) ? sweep.before(0, t, n) + k * width : nullptr;
        });
      }
    });
    const Buffer<Product> products(1 + heads);
    int64_t count = 0;
    if (b.X) products[count++] = {x, b.I, sweep.dx_gates, b.X * b.H, &of_x, {}, 0, b.dw_ih, b.db_ih};
    for (int64_t k = 0; k < heads; k++) {
      const int64_t first = k * b.A * width;
      products[count++] = {head(k),
                           width,
                           sweep.da_gates + first,
                           sweep.of_a,
                           &of_h,
                           {},
                           0,
                           row_at<Number>(b.dw_hh, first, width),
                           row_at<Number>(b.db_hh, first, 1)};
    }
    multiply<Product>(products, count, rows, threads(rows, b.I + width));
  }

 private:
  // For a product of so many rows of gates with so many columns.
  int64_t threads(int64_t count, int64_t columns) const {
    return min(b.threads, 1 + count * max(b.X, b.A) * b.H * columns / kThreadWork);
  }

  const BackwardSweep<Number>& sweep;
  const FlexBackward& b;
  const int64_t rows = b.T * b.N;
};

template <class Number>
void forward(const FlexForward& f) {
  ForwardSweep<Number>(f).run();
}

template <class Number>
void backward(const FlexBackward& b) {
  const BackwardSweep<Number> sweep(b);
  sweep.run();
  const GateProducts<Number> products(sweep);
  if (b.dx) products.inputs();
  if (b.need_dw) products.weights();
}

}  // namespace

const FlexKernels flex = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
