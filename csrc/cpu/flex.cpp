// The CPU operators of a direction of any cell's recurrence: checks and translates their arguments, allocates the
// results, and calls the kernels.
#include "flex.h"

#include <cstring>

#include "arguments.h"
#include "instruction_sets.h"

namespace rnnfast {
namespace {

constexpr int64_t kMost = int64_t(1) << 31;

// What forward and backward have in common, with the memory that it points to.
class Arguments {
 public:
  Arguments(const Tensor& operations, const Tensor& numbers, const Tensor& results, const char* name,
            const OptionalTensor& rows, const OptionalTensor& x, const OptionalTensor& w_ih, const OptionalTensor& w_hh,
            int64_t H, int64_t S, const std::vector<Tensor>& units, const Tensor& initial,
            const OptionalTensor& lengths, const OptionalTensor& resets, bool reverse) {
    const Tensor& known = x ? *x : *rows;
    RNNFAST_CHECK(known.defined() && known.dim() == 3, x ? "x" : name, " has to be [T, N, columns]");
    dtype = known.scalar_type();
    RNNFAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, x ? "x" : name,
                  " has to be float32 or float64");
    l.T = known.size(0), l.N = known.size(1), l.H = H, l.S = S, l.K = 1;
    RNNFAST_CHECK(H > 0, "a layer needs units");
    RNNFAST_CHECK(x.has_value() == w_ih.has_value(), "x and w_ih need each other");
    if (x) {
      l.I = x->size(2);
      RNNFAST_CHECK(w_ih->defined() && w_ih->dim() == 2 && w_ih->size(0) > 0 && w_ih->size(0) % H == 0,
                    "w_ih has to be [X*H, I]");
      l.X = w_ih->size(0) / H;
      check_tensor("w_ih", *w_ih, {l.X * H, l.I}, dtype);
    }
    if (w_hh) {
      const bool of_heads = w_hh->dim() == 3;
      l.K = of_heads ? w_hh->size(0) : 1;
      RNNFAST_CHECK((of_heads || w_hh->dim() == 2) && l.K > 0 && H % l.K == 0,
                    "w_hh has to be [A*H, H] or [K, A*H/K, H/K]");
      l.A = w_hh->size(of_heads) / (H / l.K);
      const int64_t width = H / l.K;
      check_tensor("w_hh", *w_hh, of_heads ? Shape{l.K, l.A * width, width} : Shape{l.A * H, H}, dtype);
    }
    for (const Tensor& unit : units) add_units(unit, 1);
    check_tensor("initial", initial, {l.S}, ScalarType::Double);
    l.initial = static_cast<const double*>(read(initial));
    check_tensor("lengths", lengths, {l.N}, ScalarType::Long);
    check_tensor("resets", resets, {l.T, l.N}, ScalarType::Bool);
    l.lengths = static_cast<const int64_t*>(read(lengths));
    for (int64_t n = 0; lengths && n < l.N; n++) {
      RNNFAST_CHECK(l.lengths[n] >= 0 && l.lengths[n] <= l.T, "lengths have to be between 0 and ", l.T);
    }
    l.resets = static_cast<const uint8_t*>(read(resets));
    l.reverse = reverse, l.threads = torch::stable::get_num_threads();
    l.x = read(x), l.w_ih = read(w_ih), l.w_hh = read(w_hh);

    RNNFAST_CHECK(operations.defined() && operations.dim() == 2, "operations has to be [operations, 4]");
    check_tensor("operations", operations, {operations.size(0), 4}, ScalarType::Long);
    RNNFAST_CHECK(numbers.defined() && numbers.dim() == 1, "numbers has to be a vector");
    check_tensor("numbers", numbers, {numbers.size(0)}, ScalarType::Double);
    RNNFAST_CHECK(results.defined() && results.dim() == 1, "results has to be a vector");
    check_tensor("results", results, {results.size(0)}, ScalarType::Long);
    RNNFAST_CHECK(std::max({operations.size(0), numbers.size(0), results.size(0)}) < kMost / 2048,
                  "the program is too long");
    static_assert(sizeof(Operation) == 4 * sizeof(int64_t));
    l.program = {0,
                 numbers.size(0),
                 operations.size(0),
                 results.size(0),
                 {0, 0},
                 static_cast<const double*>(read(numbers)),
                 static_cast<const Operation*>(read(operations)),
                 static_cast<const int64_t*>(read(results))};
  }

  // So many weights of units in one vector.
  void add_units(const Tensor& all, int64_t count) {
    check_tensor("a weight of units", all, {count * l.H}, dtype);
    const char* data = static_cast<const char*>(read(all));
    for (int64_t k = 0; k < count; k++) units_.push_back(data + k * l.H * all.element_size());
    l.U = units_.size(), l.units = units_.data();
  }

  // How many times H the columns of rows are, beside others.
  int64_t columns(const char* name, const Tensor& rows, int64_t others = 0) const {
    RNNFAST_CHECK(rows.defined() && rows.dim() == 3, name, " has to be [T, N, columns]");
    const int64_t count = rows.size(2) - others;
    RNNFAST_CHECK(count >= 0 && count % l.H == 0, name, " has to have columns for every unit");
    check_tensor(name, rows, {l.T, l.N, rows.size(2)}, dtype);
    return count / l.H;
  }

  // Whether a program reads only what is there before. Its first results have to be made: inputs might be written over
  // before they are read.
  void check_program(int64_t inputs, int64_t results, int64_t made) {
    Program& p = l.program;
    p.inputs = inputs;
    RNNFAST_CHECK(p.results == results, "the program has ", p.results, " results, expected ", results);
    RNNFAST_CHECK(std::max({l.T, l.N, l.I, (l.X + l.Z) * l.H, l.A * l.H, l.Y * l.H}) < kMost, "a size is 2^31 or more");
    for (int64_t k = 0; k < p.operations; k++) {
      const Operation& o = p.operation[k];
      RNNFAST_CHECK(o.op >= 0 && o.op < kOps, "the program has no operation ", o.op);
      for (int64_t place : o.args) {
        RNNFAST_CHECK(place >= 0 && place < inputs + p.numbers + k, "operation ", k, " reads place ", place);
      }
    }
    for (int64_t k = 0; k < p.results; k++) {
      const int64_t least = k < made ? inputs : 0;
      RNNFAST_CHECK(p.result[k] >= least && p.result[k] < p.places(), "result ", k, " is place ", p.result[k]);
    }
  }

  std::vector<Tensor> make(int64_t count, const Shape& shape) const {
    std::vector<Tensor> made;
    for (int64_t k = 0; k < count; k++) made.push_back(empty(shape, dtype));
    return made;
  }
  // Of tensors of a shape; null where one has no elements though the shape has.
  std::vector<const void*> pointers(const char* name, const std::vector<Tensor>& tensors, const Shape& shape,
                                    bool optional = false) {
    RNNFAST_CHECK(int64_t(tensors.size()) == l.S, "got ", tensors.size(), " ", name, ", expected ", l.S);
    std::vector<const void*> found;
    for (const Tensor& t : tensors) {
      const bool absent = optional && t.defined() && t.dim() == 1 && t.size(0) == 0;
      if (!absent) check_tensor(name, t, shape, dtype);
      found.push_back(absent ? nullptr : read(t));
    }
    return found;
  }

  Reader read;
  FlexLayer l{};
  ScalarType dtype;

 private:
  std::vector<const void*> units_;
};

int64_t hidden_of(const std::vector<Tensor>& states) {
  RNNFAST_CHECK(!states.empty() && states[0].defined() && states[0].dim() == 2, "states have to be [N, H]");
  return states[0].size(1);
}

std::vector<void*> places_of(const std::vector<Tensor>& tensors) {
  std::vector<void*> found;
  for (const Tensor& t : tensors) found.push_back(t.data_ptr());
  return found;
}

// New tensors with the values of others, or zeros.
std::vector<Tensor> copied(const Arguments& given, const std::vector<const void*>& from, const Shape& shape) {
  std::vector<Tensor> made = given.make(from.size(), shape);
  for (size_t k = 0; k < made.size(); k++) {
    const size_t bytes = made[k].numel() * made[k].element_size();
    if (bytes && from[k]) std::memcpy(made[k].data_ptr(), from[k], bytes);
    if (bytes && !from[k]) std::memset(made[k].data_ptr(), 0, bytes);
  }
  return made;
}

void flex_forward(StableIValue* values, uint64_t arguments, uint64_t results_) {
  Stack stack(values, arguments, results_);
  const Tensor operations = stack.tensor(), numbers = stack.tensor(), results = stack.tensor();
  const OptionalTensor x = stack.optional_tensor(), w_ih = stack.optional_tensor(), b_ih = stack.optional_tensor();
  const OptionalTensor z_gates = stack.optional_tensor();
  const OptionalTensor w_hh = stack.optional_tensor(), b_hh = stack.optional_tensor();
  const std::vector<Tensor> states = stack.tensors(), units = stack.tensors();
  const Tensor initial = stack.tensor();
  const OptionalTensor lengths = stack.optional_tensor(), resets = stack.optional_tensor();
  const bool reverse = stack.flag(), keep = stack.flag();
  const int64_t R = stack.number(), asked = stack.number();

  RNNFAST_CHECK(x || z_gates, "a layer needs x or z_gates");
  Arguments given(operations, numbers, results, "z_gates", z_gates, x, w_ih, w_hh, hidden_of(states), states.size(),
                  units, initial, lengths, resets, reverse);
  FlexLayer& l = given.l;
  RNNFAST_CHECK(R >= 0 && R <= l.program.results, "the program cannot have ", R, " results of rows");
  l.Z = z_gates ? given.columns("z_gates", *z_gates) : 0, l.Y = l.program.results - l.S - R, l.R = R;
  RNNFAST_CHECK(l.X + l.Z > 0, "z_gates has no gate");
  RNNFAST_CHECK(l.Y >= 0 && (keep || l.Y + R == 0), "the program has ", l.program.results, " results, of ", l.S,
                " states");
  check_tensor("b_ih", b_ih, {l.X * l.H}, given.dtype);
  given.check_program(l.X + l.Z + l.A + l.S + l.U, l.S + l.Y + R, l.S);
  check_tensor("b_hh", b_hh, {l.A * l.H}, given.dtype);
  const Shape of_state{l.N, l.H};
  const std::vector<Tensor> after = copied(given, given.pointers("states", states, of_state), of_state);
  const int64_t wanted = asked == -1 ? l.S : asked;
  RNNFAST_CHECK(0 <= wanted && wanted <= l.S && (!keep || wanted == l.S), "every step is made of ", l.S,
                " states, and of all for a backward, not of ", wanted);
  std::vector<Tensor> every = given.make(wanted, {l.T, l.N, l.H});
  const Tensor saved = empty_if(keep, {l.T, l.N, l.Y * l.H + R}, given.dtype);
  const auto to_states = places_of(after);
  auto to_every = places_of(every);
  to_every.resize(l.S);
  while (int64_t(every.size()) < l.S) every.push_back(empty({0}, given.dtype));

  FlexForward f{l};
  f.b_ih = given.read(b_ih), f.z_gates = given.read(z_gates), f.b_hh = given.read(b_hh);
  f.states = to_states.data(), f.every = to_every.data(), f.E = l.H;
  f.saved = data_if(keep, saved);
  chosen_flex().forward[given.dtype == ScalarType::Double](f);
  stack.give(after, every, saved);
}

void flex_backward(StableIValue* values, uint64_t arguments, uint64_t results_) {
  Stack stack(values, arguments, results_);
  const Tensor operations = stack.tensor(), numbers = stack.tensor(), results = stack.tensor();
  const OptionalTensor x = stack.optional_tensor(), w_ih = stack.optional_tensor(), w_hh = stack.optional_tensor();
  const std::vector<Tensor> states = stack.tensors(), every = stack.tensors(), units = stack.tensors();
  const Tensor initial = stack.tensor(), saved = stack.tensor();
  const OptionalTensor lengths = stack.optional_tensor(), resets = stack.optional_tensor();
  const std::vector<Tensor> d_every = stack.tensors(), d_final = stack.tensors();
  const int64_t Z = stack.number();
  const bool reverse = stack.flag(), need_dx = stack.flag(), need_dz = stack.flag(), need_dw = stack.flag();
  const int64_t R = stack.number();

  Arguments given(operations, numbers, results, "saved", saved, x, w_ih, w_hh, hidden_of(states), states.size(), units,
                  initial, lengths, resets, reverse);
  FlexLayer& l = given.l;
  RNNFAST_CHECK(Z >= 0 && Z < kMost / l.H, "there cannot be ", Z, " gates beside those of x");
  RNNFAST_CHECK(l.X + Z > 0, "a layer needs gates");
  RNNFAST_CHECK(R >= 0 && R < kMost, "there cannot be ", R, " numbers of rows");
  l.Z = Z, l.R = R, l.Y = given.columns("saved", saved, R);
  l.program.row_inputs[0] = l.Y, l.program.row_inputs[1] = l.Y + R;
  // Where the gradients of a's gates are those of x's first ones, too, the program has them once.
  const int64_t of_inputs = l.X + l.Z + l.S + l.U;
  const bool shares_gates = l.A <= l.X && l.K == 1 && l.program.results == of_inputs;
  const int64_t of_results = of_inputs + (shares_gates ? 0 : l.A);
  given.check_program(l.Y + R + 3 * l.S + l.U, of_results, of_results);
  const Shape of_state{l.N, l.H}, of_steps{l.T, l.N, l.H};
  const auto from_before = given.pointers("states", states, of_state);
  const auto from_after = given.pointers("every", every, of_steps);
  const auto from_every = given.pointers("d_every", d_every, of_steps, true);
  const std::vector<Tensor> d_states = copied(given, given.pointers("d_final", d_final, of_state, true), of_state);
  const auto to_states = places_of(d_states);
  const bool of_x = need_dw && l.X > 0, of_a = need_dw && l.A > 0, gives_dx = need_dx && l.X > 0;
  const Tensor dx = empty_if(gives_dx, {l.T, l.N, l.I}, given.dtype);
  const Tensor dw_ih = empty_if(of_x, {l.X * l.H, l.I}, given.dtype), db_ih = empty_if(of_x, {l.X * l.H}, given.dtype);
  const Tensor dz_gates = empty_if(need_dz, {l.T, l.N, l.Z * l.H}, given.dtype);
  const Sizes of_w_hh = of_a ? w_hh->sizes() : Sizes();
  const Shape of_b_hh(of_w_hh.slice(0, of_w_hh.size() - of_a));
  const Tensor dw_hh = empty_if(of_a, of_w_hh, given.dtype), db_hh = empty_if(of_a, of_b_hh, given.dtype);
  const Tensor d_units = empty({(l.T + kUnitSteps - 1) / kUnitSteps, l.N, l.U * l.H}, given.dtype);
  if (d_units.numel()) std::memset(d_units.data_ptr(), 0, d_units.numel() * d_units.element_size());

  FlexBackward b{l};
  b.states = from_before.data(), b.every = from_after.data(), b.saved = given.read(saved);
  b.d_every = from_every.data(), b.d_states = to_states.data(), b.shares_gates = shares_gates, b.need_dw = need_dw;
  b.dx = data_if(gives_dx, dx), b.dw_ih = dw_ih.data_ptr(), b.db_ih = db_ih.data_ptr();
  b.dz_gates = data_if(need_dz, dz_gates), b.dw_hh = dw_hh.data_ptr(), b.db_hh = db_hh.data_ptr();
  b.d_units = d_units.data_ptr();
  chosen_flex().backward[given.dtype == ScalarType::Double](b);
  stack.give(dx, dw_ih, db_ih, dz_gates, dw_hh, db_hh, d_states, d_units);
}

// ---- plain calls, as plain.cpp has them

struct PlainInputs {
  Form form;  // its kind: 2 if there are W_hh, of a matrix or a vector a gate, and 1 if there are biases
  // Operations, numbers, results and initial values, and how many gates of x and of a, and weights of units, it reads.
  std::vector<Tensor> program;
  Tensor x;                     // [T, N, I], [N, T, I], [T, I]
  std::vector<Tensor> weights;  // layer by layer, direction by direction: W_ih, W_hh, b_ih, b_hh, those of units
  std::vector<Tensor> states;   // S of [L*D, N, H], [L*D, H]; or none

  explicit PlainInputs(Stack& stack)
      : form(stack.number()),
        program(stack.tensors()),
        x(stack.tensor()),
        weights(stack.tensors()),
        states(stack.tensors()) {}
};

struct PlainOutputs {
  Tensor y;
  std::vector<Tensor> states;
};

template <class Number>
void fill(void* to, int64_t count, double value) {
  std::fill_n(static_cast<Number*>(to), count, Number(value));
}

class PlainCall {
 public:
  explicit PlainCall(const PlainInputs& in) : in_(in) {
    RNNFAST_CHECK(in.program.size() == 5, "a program is five tensors");
    const Tensor &initial = in.program[3], &reads = in.program[4];
    check_tensor("reads", reads, {3}, ScalarType::Long);
    const auto* counts = static_cast<const int64_t*>(read_(reads));
    X = counts[0], A = counts[1], U = counts[2];
    RNNFAST_CHECK(X > 0 && std::max({X, A, U}) < kMost, "the program reads no gates of x");
    RNNFAST_CHECK(initial.defined() && initial.dim() == 1, "initial has to be a vector");
    S = initial.size(0);
    RNNFAST_CHECK(S > 0 && S < kMost / 2048, "a layer cannot have ", S, " states");
    RNNFAST_CHECK(in.x.defined() && (in.x.dim() == 2 || in.x.dim() == 3), "x has to have 2 or 3 dimensions");
    dtype_ = in.x.scalar_type(), acc_ = accumulated(dtype_);
    const auto& [layers, kind, layout, directions] = in.form;
    each_ = layers > 0 ? in.weights.size() / (layers * directions) : 0;
    RNNFAST_CHECK(layout < kCell && kind < 4, "there is no such form");
    RNNFAST_CHECK(each_ > 0 && int64_t(in.weights.size()) == layers * directions * each_,
                  "the layers have unlike weights");
    const Tensor& w_ih = in.weights[0];
    RNNFAST_CHECK(w_ih.defined() && w_ih.dim() == 2 && w_ih.size(0) / X > 0 && w_ih.size(0) < kMost,
                  "w_ih has to be [X*H, I]");
    H = w_ih.size(0) / X;
  }

  PlainOutputs run() {
    const auto& [layers, kind, layout, directions] = in_.form;
    const bool batched = in_.x.dim() == 3, turned = batched && layout == kBatchFirst;
    PlainOutputs out;
    out.y = turned ? torch::stable::transpose(in_.x, 0, 1) : batched ? in_.x : torch::stable::unsqueeze(in_.x, 1);
    const int64_t T = out.y.size(0), N = out.y.size(1);
    RNNFAST_CHECK(T > 0 && std::max(T, N) < kMost, "x has no steps, or a size is 2^31 or more");
    out.states = states_before(batched ? Shape{layers * directions, N, H} : Shape{layers * directions, H});
    for (int64_t k = 0; k < layers; k++) {
      const Tensor x = in_sums(out.y);  // lives until the layer has read it
      for (int64_t d = 0; d < directions; d++) {
        std::vector<void*> states;
        for (const Tensor& of : out.states) states.push_back(at(of, (k * directions + d) * N * H));
        run_direction(x, k * directions + d, d, states.data(), out.y);
      }
      out.y = stored(out.y);
    }
    if (!batched) out.y = torch::stable::squeeze(out.y, 1);
    if (turned) out.y = torch::stable::transpose(out.y, 0, 1);
    for (Tensor& of : out.states) of = stored(of);
    return out;
  }

 private:
  // In the type of sums, and as it is returned.
  Tensor in_sums(const Tensor& t) const {
    RNNFAST_CHECK(t.defined() && t.scalar_type() == dtype_, "all have to be of x's dtype");
    Reader::check_memory(t);
    return dtype_ == acc_ ? t : torch::stable::to(t, acc_);
  }
  Tensor stored(const Tensor& t) const { return dtype_ == acc_ ? t : torch::stable::to(t, dtype_); }
  bool is_double() const { return acc_ == ScalarType::Double; }
  static void* at(const Tensor& t, int64_t element) {
    return static_cast<char*>(t.data_ptr()) + element * t.element_size();
  }

  std::vector<Tensor> states_before(const Shape& shape) {
    RNNFAST_CHECK(in_.states.empty() || int64_t(in_.states.size()) == S, "got ", in_.states.size(), " states");
    check_tensor("initial", in_.program[3], {S}, ScalarType::Double);
    const auto* initial = static_cast<const double*>(read_(in_.program[3]));
    std::vector<Tensor> made;
    for (int64_t s = 0; s < S; s++) {
      if (!in_.states.empty()) check_tensor("states", in_.states[s], shape, dtype_);
      made.push_back(empty(shape, acc_));
      const int64_t count = made[s].numel();
      if (in_.states.empty()) {
        (is_double() ? fill<double> : fill<float>)(made[s].data_ptr(), count, initial[s]);
      } else if (count) {
        std::memcpy(made[s].data_ptr(), read_(in_sums(in_.states[s])), count * made[s].element_size());
      }
    }
    return made;
  }

  // Direction d of a layer, with its weights, which makes its columns of y, and the first one y itself.
  void run_direction(const Tensor& x, int64_t index, int64_t d, void* const* states, Tensor& y) const {
    const bool biased = in_.form.kind & 1, has_hh = in_.form.kind & 2;
    RNNFAST_CHECK(each_ >= (1 + has_hh) * (1 + biased), "a direction lacks weights");
    const Tensor *weight = &in_.weights[index * each_], *end = weight + each_;
    const auto next = [&](bool given) { return given ? OptionalTensor(in_sums(*weight++)) : std::nullopt; };
    const OptionalTensor w_ih = next(true), w_hh = next(has_hh), b_ih = next(biased), b_hh = next(biased && has_hh);
    std::vector<Tensor> units;
    while (weight < end) units.push_back(in_sums(*weight++));
    const bool by_unit = A == 0;  // each unit sees its own h, or none
    Arguments given(in_.program[0], in_.program[1], in_.program[2], "x", x, x, w_ih, by_unit ? std::nullopt : w_hh, H,
                    S, units, in_.program[3], std::nullopt, std::nullopt, d == 1);
    const int64_t of_a = (U - int64_t(units.size())) / (1 + biased);
    if (by_unit && w_hh) given.add_units(*w_hh, of_a);
    if (by_unit && b_hh) given.add_units(*b_hh, of_a);
    const FlexLayer& l = given.l;
    RNNFAST_CHECK(l.X == X && l.A == A && l.U == U, "the program reads other weights");
    given.check_program(X + A + S + U, S, S);
    check_tensor("b_ih", b_ih, {X * H}, acc_);
    if (!by_unit) check_tensor("b_hh", b_hh, {A * H}, acc_);

    const int64_t columns = in_.form.D * H;
    if (d == 0) y = empty({l.T, l.N, columns}, acc_);
    std::vector<void*> every(S);
    every[0] = at(y, d * H);
    FlexForward f{l};
    f.b_ih = given.read(b_ih), f.b_hh = by_unit ? nullptr : given.read(b_hh);
    f.states = states, f.every = every.data(), f.E = columns;
    chosen_flex().forward[is_double()](f);
  }

  const PlainInputs& in_;
  Reader read_;
  ScalarType dtype_, acc_;  // of the tensors, and of sums
  int64_t H, S, X, A, U;
  int64_t each_;  // weights of a direction
};

void flex_plain(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const PlainInputs in(stack);
  PlainOutputs out;
  try {
    out = PlainCall(in).run();
  } catch (const std::exception&) {
  }
  stack.give(out.y, out.states);
}

// Of tensors that lie elsewhere, however few.
void not_flex_plain(StableIValue* values, uint64_t arguments, uint64_t results) {
  Stack stack(values, arguments, results);
  const PlainInputs in(stack);
  stack.give(Tensor(), std::vector<Tensor>());
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "cpu_flex_forward(Tensor operations, Tensor numbers, Tensor results, Tensor? x, Tensor? w_ih, Tensor? b_ih, "
      "Tensor? z_gates, Tensor? w_hh, Tensor? b_hh, Tensor[] states, Tensor[] units, Tensor initial, Tensor? lengths, "
      "Tensor? resets, bool reverse, bool keep, int R=0, int wanted=-1) -> "
      "(Tensor[] states_after, Tensor[] every, Tensor saved)");
  m.def(
      "cpu_flex_backward(Tensor operations, Tensor numbers, Tensor results, Tensor? x, Tensor? w_ih, Tensor? w_hh, "
      "Tensor[] states, Tensor[] every, Tensor[] units, Tensor initial, Tensor saved, Tensor? lengths, "
      "Tensor? resets, Tensor[] d_every, Tensor[] d_final, int Z, bool reverse, bool need_dx, bool need_dz, "
      "bool need_dw, int R=0) -> "
      "(Tensor dx, Tensor dw_ih, Tensor db_ih, Tensor dz_gates, Tensor dw_hh, Tensor db_hh, Tensor[] d_states, Tensor "
      "d_units)");
  m.def(
      "cpu_flex_plain(int form, Tensor[] program, Tensor x, Tensor[] weights, Tensor[] states) -> (Tensor y, Tensor[] "
      "states_after)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("cpu_flex_forward", rnnfast::flex_forward);
  m.impl("cpu_flex_backward", rnnfast::flex_backward);
  m.impl("cpu_flex_plain", rnnfast::flex_plain);
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) { m.impl("cpu_flex_plain", rnnfast::not_flex_plain); }
