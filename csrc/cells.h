// The cells, printed by rnnfast/codegen.py from rnnfast/cells.py: there they are to be changed.
//
// A cell is a policy over a value type F: one float on a GPU, a vector of hidden units on a CPU. The device supplies
// sigmoid(F), tanh(F), relu(F) and zero_where_not_positive(F h, F dh) beside F. Names:
//   x[g]  gate g of W_ih x + b_ih            a[g]  gate g of W_hh h + b_hh
//   s[j]  what the backward needs of a step  d[j]  gradient at the gates: d[0..kGates) are those of x[g], and
//   w[k]  a weight of the unit's own                d[hidden(g)] is that of a[g]; then what is to be added up over
//                                                  rows and steps to the gradient of w[k], d[kGrads + k]
// h and c are the states: before the step on entry, after it on return. dh is the gradient of the new h; dc that of the
// new c on entry, of the old c on return; the old h gets W_hh^T d[hidden(g)] plus what backward() returns. Where h may
// be projected output() makes it again, for the projection's gradient.
#pragma once

#ifdef __CUDACC__
#define RNNFAST_INLINE __host__ __device__ __forceinline__
#else
#define RNNFAST_INLINE inline __attribute__((always_inline))
#endif

namespace rnnfast {

struct RnnTanh {
  static constexpr const char* kMode = "RNN_TANH";
  static constexpr int kGates = 1, kSaved = 0, kGrads = 1, kUnitWeights = 0, kColumns = 1;
  static constexpr bool kHasCell = false, kHasDirect = false, kProjects = false, kIsCommon = true;
  static constexpr bool kReadsH = false, kNeedsH = true, kNeedsOldH = false;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F&, F*) {
    h = tanh(x[0] + a[0]);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F*, const F*, F h, F, F, F, F dh, F&, F* d) {
    d[0] = dh * (1 - h * h);
    return F(0);
  }
};

struct RnnRelu {
  static constexpr const char* kMode = "RNN_RELU";
  static constexpr int kGates = 1, kSaved = 0, kGrads = 1, kUnitWeights = 0, kColumns = 1;
  static constexpr bool kHasCell = false, kHasDirect = false, kProjects = false, kIsCommon = true;
  static constexpr bool kReadsH = false, kNeedsH = true, kNeedsOldH = false;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F&, F*) {
    h = relu(x[0] + a[0]);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F*, const F*, F h, F, F, F, F dh, F&, F* d) {
    d[0] = zero_where_not_positive(h, dh);
    return F(0);
  }
};

struct Lstm {
  static constexpr const char* kMode = "LSTM";
  static constexpr int kGates = 4, kSaved = 4, kGrads = 4, kUnitWeights = 0, kColumns = 4;
  static constexpr bool kHasCell = true, kHasDirect = false, kProjects = true, kIsCommon = true;
  static constexpr bool kReadsH = false, kNeedsH = false, kNeedsOldH = false;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F& c, F* s) {
    F i = s[0] = sigmoid(x[0] + a[0]);
    F f = s[1] = sigmoid(x[1] + a[1]);
    F g = s[2] = tanh(x[2] + a[2]);
    F o = s[3] = sigmoid(x[3] + a[3]);
    c = f * c + i * g;
    h = o * tanh(c);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F, F c, F old_c, F dh, F& dc, F* d) {
    F i = s[0], f = s[1], g = s[2], o = s[3];
    F tanh_c = tanh(c);
    dc = dc + dh * o * (1 - tanh_c * tanh_c);
    d[0] = dc * g * i * (1 - i);
    d[1] = dc * old_c * f * (1 - f);
    d[2] = dc * i * (1 - g * g);
    d[3] = dh * tanh_c * o * (1 - o);
    dc = dc * f;
    return F(0);
  }

  template <class F>
  static RNNFAST_INLINE F output(const F* s, F c) {
    return s[3] * tanh(c);
  }
};

struct Gru {
  static constexpr const char* kMode = "GRU";
  static constexpr int kGates = 3, kSaved = 4, kGrads = 4, kUnitWeights = 0, kColumns = 4;
  static constexpr bool kHasCell = false, kHasDirect = true, kProjects = false, kIsCommon = true;
  static constexpr bool kReadsH = true, kNeedsH = false, kNeedsOldH = true;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate == 2 ? 3 : gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F&, F* s) {
    F q = s[3] = a[2];
    F r = s[0] = sigmoid(x[0] + a[0]);
    F z = s[1] = sigmoid(x[1] + a[1]);
    F n = s[2] = tanh(x[2] + r * q);
    h = n + z * (h - n);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F old_h, F, F, F dh, F&, F* d) {
    F r = s[0], z = s[1], n = s[2], q = s[3];
    F dn = d[2] = dh * (1 - z) * (1 - n * n);
    d[0] = dn * q * r * (1 - r);
    d[1] = dh * (old_h - n) * z * (1 - z);
    d[3] = dn * r;
    return dh * z;
  }
};

struct PeepholeLstm {
  static constexpr const char* kMode = "PEEPHOLE_LSTM";
  static constexpr int kGates = 4, kSaved = 4, kGrads = 4, kUnitWeights = 3, kColumns = 7;
  static constexpr bool kHasCell = true, kHasDirect = false, kProjects = true, kIsCommon = true;
  static constexpr bool kReadsH = false, kNeedsH = false, kNeedsOldH = false;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F* w, F& h, F& c, F* s) {
    F i = s[0] = sigmoid(x[0] + a[0] + w[0] * c);
    F f = s[1] = sigmoid(x[1] + a[1] + w[1] * c);
    F g = s[2] = tanh(x[2] + a[2]);
    c = f * c + i * g;
    F o = s[3] = sigmoid(x[3] + a[3] + w[2] * c);
    h = o * tanh(c);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F* w, F, F, F c, F old_c, F dh, F& dc, F* d) {
    F i = s[0], f = s[1], g = s[2], o = s[3];
    F tanh_c = tanh(c);
    F do_ = d[3] = dh * tanh_c * o * (1 - o);
    dc = dc + dh * o * (1 - tanh_c * tanh_c) + do_ * w[2];
    F di = d[0] = dc * g * i * (1 - i);
    F df = d[1] = dc * old_c * f * (1 - f);
    d[2] = dc * i * (1 - g * g);
    d[4] = di * old_c;
    d[5] = df * old_c;
    d[6] = do_ * c;
    dc = dc * f + df * w[1] + di * w[0];
    return F(0);
  }

  template <class F>
  static RNNFAST_INLINE F output(const F* s, F c) {
    return s[3] * tanh(c);
  }
};

struct Cifg {
  static constexpr const char* kMode = "CIFG";
  static constexpr int kGates = 3, kSaved = 3, kGrads = 3, kUnitWeights = 0, kColumns = 3;
  static constexpr bool kHasCell = true, kHasDirect = false, kProjects = true, kIsCommon = false;
  static constexpr bool kReadsH = false, kNeedsH = false, kNeedsOldH = false;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F& c, F* s) {
    F f = s[0] = sigmoid(x[0] + a[0]);
    F g = s[1] = tanh(x[1] + a[1]);
    F o = s[2] = sigmoid(x[2] + a[2]);
    c = f * c + (1 - f) * g;
    h = o * tanh(c);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F, F c, F old_c, F dh, F& dc, F* d) {
    F f = s[0], g = s[1], o = s[2];
    F tanh_c = tanh(c);
    dc = dc + dh * o * (1 - tanh_c * tanh_c);
    d[0] = (-(dc * g) + dc * old_c) * f * (1 - f);
    d[1] = dc * (1 - f) * (1 - g * g);
    d[2] = dh * tanh_c * o * (1 - o);
    dc = dc * f;
    return F(0);
  }

  template <class F>
  static RNNFAST_INLINE F output(const F* s, F c) {
    return s[2] * tanh(c);
  }
};

struct ReluLstm {
  static constexpr const char* kMode = "RELU_LSTM";
  static constexpr int kGates = 4, kSaved = 4, kGrads = 4, kUnitWeights = 0, kColumns = 4;
  static constexpr bool kHasCell = true, kHasDirect = false, kProjects = true, kIsCommon = false;
  static constexpr bool kReadsH = false, kNeedsH = false, kNeedsOldH = false;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F& c, F* s) {
    F i = s[0] = sigmoid(x[0] + a[0]);
    F f = s[1] = sigmoid(x[1] + a[1]);
    F g = s[2] = relu(x[2] + a[2]);
    F o = s[3] = sigmoid(x[3] + a[3]);
    c = f * c + i * g;
    h = o * relu(c);
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F, F c, F old_c, F dh, F& dc, F* d) {
    F i = s[0], f = s[1], g = s[2], o = s[3];
    F relu_c = relu(c);
    dc = dc + zero_where_not_positive(relu_c, dh * o);
    d[0] = dc * g * i * (1 - i);
    d[1] = dc * old_c * f * (1 - f);
    d[2] = zero_where_not_positive(g, dc * i);
    d[3] = dh * relu_c * o * (1 - o);
    dc = dc * f;
    return F(0);
  }

  template <class F>
  static RNNFAST_INLINE F output(const F* s, F c) {
    return s[3] * relu(c);
  }
};

struct Janet {
  static constexpr const char* kMode = "JANET";
  static constexpr int kGates = 2, kSaved = 3, kGrads = 2, kUnitWeights = 1, kColumns = 3;
  static constexpr bool kHasCell = false, kHasDirect = true, kProjects = false, kIsCommon = false;
  static constexpr bool kReadsH = true, kNeedsH = false, kNeedsOldH = true;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F* w, F& h, F&, F* s) {
    F u = x[0] + a[0];
    F f = s[0] = sigmoid(u);
    F v = u - w[0];
    F k = s[1] = sigmoid(v);
    F g = s[2] = tanh(x[1] + a[1]);
    h = f * h + (1 - k) * g;
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F old_h, F, F, F dh, F&, F* d) {
    F f = s[0], k = s[1], g = s[2];
    F dv = -(dh * g) * k * (1 - k);
    d[0] = dh * old_h * f * (1 - f) + dv;
    d[1] = dh * (1 - k) * (1 - g * g);
    d[2] = -dv;
    return dh * f;
  }
};

struct Mgu {
  static constexpr const char* kMode = "MGU";
  static constexpr int kGates = 2, kSaved = 3, kGrads = 3, kUnitWeights = 0, kColumns = 3;
  static constexpr bool kHasCell = false, kHasDirect = true, kProjects = false, kIsCommon = false;
  static constexpr bool kReadsH = true, kNeedsH = false, kNeedsOldH = true;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate == 1 ? 2 : gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F&, F* s) {
    F q = s[2] = a[1];
    F f = s[0] = sigmoid(x[0] + a[0]);
    F n = s[1] = tanh(x[1] + f * q);
    h = (1 - f) * h + f * n;
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F old_h, F, F, F dh, F&, F* d) {
    F f = s[0], n = s[1], q = s[2];
    F dn = d[1] = dh * f * (1 - n * n);
    d[0] = (dh * n - dh * old_h + dn * q) * f * (1 - f);
    d[2] = dn * f;
    return dh * (1 - f);
  }
};

struct Ligru {
  static constexpr const char* kMode = "LIGRU";
  static constexpr int kGates = 2, kSaved = 2, kGrads = 2, kUnitWeights = 0, kColumns = 2;
  static constexpr bool kHasCell = false, kHasDirect = true, kProjects = false, kIsCommon = false;
  static constexpr bool kReadsH = true, kNeedsH = false, kNeedsOldH = true;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F*, F& h, F&, F* s) {
    F z = s[0] = sigmoid(x[0] + a[0]);
    F n = s[1] = relu(x[1] + a[1]);
    h = z * h + (1 - z) * n;
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F*, F, F old_h, F, F, F dh, F&, F* d) {
    F z = s[0], n = s[1];
    d[0] = (-(dh * n) + dh * old_h) * z * (1 - z);
    d[1] = zero_where_not_positive(n, dh * (1 - z));
    return dh * z;
  }
};

struct LeakyRnn {
  static constexpr const char* kMode = "LEAKY_RNN";
  static constexpr int kGates = 1, kSaved = 1, kGrads = 1, kUnitWeights = 1, kColumns = 2;
  static constexpr bool kHasCell = false, kHasDirect = true, kProjects = false, kIsCommon = false;
  static constexpr bool kReadsH = true, kNeedsH = false, kNeedsOldH = true;

  static constexpr RNNFAST_INLINE int hidden(int gate) { return gate; }

  template <class F>
  static RNNFAST_INLINE void forward(const F* x, const F* a, const F* w, F& h, F&, F* s) {
    F g = s[0] = tanh(x[0] + a[0]);
    h = (1 - w[0]) * h + w[0] * g;
  }
  template <class F>
  static RNNFAST_INLINE F backward(const F* s, const F* w, F, F old_h, F, F, F dh, F&, F* d) {
    F g = s[0];
    d[0] = dh * w[0] * (1 - g * g);
    d[1] = dh * g - dh * old_h;
    return dh * (1 - w[0]);
  }
};

// Calls CELL with the name of each: of the common ones, of which every backend has kernels; of CUDA's own; of all.
#define RNNFAST_COMMON_CELLS(CELL) CELL(RnnTanh) CELL(RnnRelu) CELL(Lstm) CELL(Gru) CELL(PeepholeLstm)
#define RNNFAST_CUDA_CELLS(CELL) CELL(Cifg) CELL(ReluLstm) CELL(Janet) CELL(Mgu) CELL(Ligru) CELL(LeakyRnn)
#define RNNFAST_CELLS(CELL) RNNFAST_COMMON_CELLS(CELL) RNNFAST_CUDA_CELLS(CELL)

#define RNNFAST_KIND(Cell) k##Cell,
enum CellKind { RNNFAST_CELLS(RNNFAST_KIND) kCellKinds };
#undef RNNFAST_KIND

constexpr int kCommonKinds = 5;  // the first ones

struct CellFacts {
  const char* mode;  // torch's name
  int gates, saved, grads, unit_weights;
  bool has_cell, projects;
};

#define RNNFAST_FACTS(Cell) \
  {Cell::kMode, Cell::kGates, Cell::kSaved, Cell::kGrads, Cell::kUnitWeights, Cell::kHasCell, Cell::kProjects},
constexpr CellFacts kCells[] = {RNNFAST_CELLS(RNNFAST_FACTS)};  // by kind
#undef RNNFAST_FACTS

}  // namespace rnnfast
