// csrc/cuda/blas.h without a GPU. With -DFAKE this is a library that stands for cuBLAS, column-major as that is;
// otherwise a program that loads it from the path given, multiplies operands in every layout, and says what is wrong.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef FAKE

extern "C" {
int cublasCreate_v2(void** handle) { return *handle = std::malloc(1), 0; }
int cublasSetStream_v2(void*, void* stream) { return stream == reinterpret_cast<void*>(13); }
int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }

int cublasGemmEx(void*, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int, int lda,
                 const void* b, int, int ldb, const void* beta, void* c, int type, int ldc, int compute, int) {
  if (type != 0 || compute != 68 || *static_cast<const float*>(alpha) != 1) return 1;
  const float *x = static_cast<const float*>(a), *y = static_cast<const float*>(b);
  for (int i = 0; i < m; i++) {
    for (int j = 0; j < n; j++) {
      float& out = static_cast<float*>(c)[i + j * ldc];
      float sum = *static_cast<const float*>(beta) * out;
      for (int l = 0; l < k; l++) sum += x[op_a ? l + i * lda : i + l * lda] * y[op_b ? j + l * ldb : l + j * ldb];
      out = sum;
    }
  }
  return 0;
}
}

#else

#include "../csrc/cuda/blas.h"

using rnnfast::Blas;
using rnnfast::BlasType;
using rnnfast::Operand;

int main(int, char** argv) {
  if (!argv[1]) return Blas::find() != nullptr;  // without the library there is none
  if (!dlopen(argv[1], RTLD_NOW | RTLD_LOCAL)) return std::puts(dlerror()), 1;
  Blas* blas = Blas::find();
  if (!blas) return std::puts("the library was not found"), 1;
  const Blas::Handle handle(*blas, 0, 0, nullptr);
  int layout = 0;
  constexpr int kM = 3, kN = 5, kK = 4, kPad = 2;
  for (int layouts = 0; layouts < 8; layouts++) {
    const bool of_a = layouts & 1, of_b = layouts & 2, accumulate = layouts & 4;
    std::vector<float> a(100), b(100), out(100, 7);
    for (int i = 0; i < 100; i++) a[i] = i % 7, b[i] = i % 5;
    const Operand x = {a.data(), of_a ? 1 : kK + kPad, of_a ? kM + kPad : 1};
    const Operand y = {b.data(), of_b ? 1 : kN + kPad, of_b ? kK + kPad : 1}, z = {out.data(), kN + kPad, 1};
    if (!handle.multiply(z, x, y, kM, kN, kK, BlasType::kFloat, accumulate, false)) return 2;
    for (int i = 0; i < kM; i++) {
      for (int j = 0; j < kN; j++) {
        float sum = accumulate ? 7 : 0;
        for (int k = 0; k < kK; k++) sum += a[i * x.row + k * x.column] * b[k * y.row + j * y.column];
        if (out[i * z.row + j] != sum) return std::printf("layouts %d, at %d, %d\n", layouts, i, j), 3;
      }
    }
    if (out[kN] != 7) return std::puts("wrote beyond a row"), 4;
  }
  // Strides of one row and of one column, and of what lies together in neither way.
  for (const auto& [m, n, row, column] :
       {std::array{1, 4, 1, 1}, {4, 1, 1, 1}, {1, 4, 9, 1}, {4, 1, 9, 7}, {1, 4, 3, 7}}) {
    const auto of = rnnfast::operand_of(&layout, m, n, row, column);
    if (!of || of->stride() < (of->is_transposed() ? m : n)) return std::printf("%d x %d\n", m, n), 7;
    if (m > 1 && (of->is_transposed() ? 1 : of->stride()) != row) return std::printf("rows of %d x %d\n", m, n), 8;
    if (n > 1 && (of->is_transposed() ? of->stride() : 1) != column)
      return std::printf("columns of %d x %d\n", m, n), 9;
  }
  if (rnnfast::operand_of(&layout, 3, 4, 9, 2) || rnnfast::operand_of(&layout, 3, 4, 0, 1)) return 10;
  // What cuBLAS refuses is said.
  float one = 1;
  const Operand scalar = {&one, 1, 1};
  if (handle.multiply(scalar, scalar, scalar, 1, 1, 1, BlasType::kFloat, false, true)) return 5;
  const Blas::Handle unbound(*blas, 0, 13, nullptr);
  if (unbound.multiply(scalar, scalar, scalar, 1, 1, 1, BlasType::kFloat, false, false)) return 6;
}

#endif
