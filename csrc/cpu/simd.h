// Vectors of one register: Vec<float> and Vec<double> over the compilers' vector extensions, with intrinsics only where
// an instruction set has what the extensions cannot say. Everything has internal linkage or a namespace of its own
// instruction set, so that no function built for a larger set can be linked into code for a smaller one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../cells.h"

namespace rnnfast {
namespace RNNFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class Stored>
struct Types {
  using Sum = Stored;  // what products and states are held in
};
template <>
struct Types<BFloat16> {
  using Sum = float;
};
template <>
struct Types<Half> {
  using Sum = float;
};
template <class Stored>
using SumOf = typename Types<Stored>::Sum;

template <class Number>
constexpr int kLanes = kVectorBytes / sizeof(Number);

template <class Number>
struct Raw;
template <>
struct Raw<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Lanes16 __attribute__((vector_size(kVectorBytes / 2)));  // as many 16-bit lanes
};
template <>
struct Raw<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
};

template <class Number>
struct Vec {
  using Vector = typename Raw<Number>::Vector;
  using Integers = typename Raw<Number>::Integers;
  Vector v;

  Vec() = default;
  RNNFAST_INLINE Vec(Vector v) : v(v) {}
  RNNFAST_INLINE Vec(Number s) : v(s - Vector{}) {}
  RNNFAST_INLINE Vec(int s) : Vec(Number(s)) {}

  friend RNNFAST_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend RNNFAST_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend RNNFAST_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend RNNFAST_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
};

// ---- loads and stores: n lanes, the others zero; converting where storage is 16 bits wide

template <class Number>
RNNFAST_INLINE Vec<Number> load(const Number* p) {
  Vec<Number> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class Number>
RNNFAST_INLINE void store(Number* p, Vec<Number> v) {
  memcpy(p, &v, sizeof v);
}

using Bits = Raw<float>::Integers;
using Bits16 = Raw<float>::Lanes16;
typedef uint32_t UBits __attribute__((vector_size(kVectorBytes)));

template <class To, class From>
RNNFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

RNNFAST_INLINE Vec<float> widen(BFloat16, Bits16 h) {
  return bit_cast<Vec<float>>(__builtin_convertvector(h, UBits) << 16);
}

RNNFAST_INLINE Bits16 narrow(BFloat16, Vec<float> v) {
  UBits u = bit_cast<UBits>(v);
  UBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(v.v != v.v ? (u >> 16) | 0x40 : rounded, Bits16);  // a NaN stays one
}

RNNFAST_INLINE Vec<float> widen(Half, Bits16 h) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(h)));
#elif defined(__F16C__)
  return Vec<float>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  UBits u = __builtin_convertvector(h, UBits);
  UBits sign = (u & 0x8000) << 16, magnitude = (u & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias and makes subnormals normal; infinities and NaN are put right after.
  UBits scaled = bit_cast<UBits>(bit_cast<Vec<float>>(magnitude) * Vec<float>(0x1p112f));
  return bit_cast<Vec<float>>(((u & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : scaled) | sign);
#endif
}

RNNFAST_INLINE Bits16 narrow(Half, Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Bits16>(_mm512_maskz_cvtps_ph(0xffff, (__m512)v.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<Bits16>(_mm256_cvtps_ph((__m256)v.v, _MM_FROUND_TO_NEAREST_INT));
#else
  UBits u = bit_cast<UBits>(v), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  UBits normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
  // Below 2^-14, adding 0.5 leaves the subnormal's bits, rounded by the hardware, at the bottom of the sum.
  UBits subnormal = bit_cast<UBits>(bit_cast<Vec<float>>(u) + Vec<float>(0.5f)) - 0x3f000000;
  UBits infinite = u > 0x7f800000 ? UBits{} + 0x7e00 : UBits{} + 0x7c00;
  UBits result = u < (113u << 23) ? subnormal : normal;
  return __builtin_convertvector((u >= 0x477ff000 ? infinite : result) | sign, Bits16);
#endif
}

template <class Stored>
RNNFAST_INLINE Vec<float> load16(const Stored* p) {
  Bits16 h;
  memcpy(&h, p, sizeof h);
  return widen(Stored{}, h);
}
template <class Stored>
RNNFAST_INLINE void store16(Stored* p, Vec<float> v) {
  Bits16 h = narrow(Stored{}, v);
  memcpy(p, &h, sizeof h);
}
RNNFAST_INLINE Vec<float> load(const BFloat16* p) { return load16(p); }
RNNFAST_INLINE Vec<float> load(const Half* p) { return load16(p); }
RNNFAST_INLINE void store(BFloat16* p, Vec<float> v) { store16(p, v); }
RNNFAST_INLINE void store(Half* p, Vec<float> v) { store16(p, v); }

template <class Stored>
RNNFAST_INLINE Vec<SumOf<Stored>> load_part(const Stored* p, int n) {
  Stored lanes[kLanes<SumOf<Stored>>] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class Stored>
RNNFAST_INLINE void store_part(Stored* p, Vec<SumOf<Stored>> v, int n) {
  Stored lanes[kLanes<SumOf<Stored>>];
  store(lanes, v);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}
#if defined(__AVX512F__)
RNNFAST_INLINE Vec<float> load_part(const float* p, int n) {
  return Vec<float>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
}
RNNFAST_INLINE Vec<double> load_part(const double* p, int n) {
  return Vec<double>(_mm512_maskz_loadu_pd((1u << n) - 1, p));
}
RNNFAST_INLINE void store_part(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v.v); }
RNNFAST_INLINE void store_part(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v.v);
}
#elif defined(__AVX2__)
RNNFAST_INLINE __m256i first_lanes(int n, __m256i lane) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane); }
RNNFAST_INLINE __m256i mask32(int n) { return first_lanes(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
RNNFAST_INLINE __m256i mask64(int n) { return first_lanes(n, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)); }
RNNFAST_INLINE Vec<float> load_part(const float* p, int n) { return Vec<float>(_mm256_maskload_ps(p, mask32(n))); }
RNNFAST_INLINE Vec<double> load_part(const double* p, int n) { return Vec<double>(_mm256_maskload_pd(p, mask64(n))); }
RNNFAST_INLINE void store_part(float* p, Vec<float> v, int n) { _mm256_maskstore_ps(p, mask32(n), (__m256)v.v); }
RNNFAST_INLINE void store_part(double* p, Vec<double> v, int n) { _mm256_maskstore_pd(p, mask64(n), (__m256d)v.v); }
#endif

template <class Stored>
RNNFAST_INLINE Vec<SumOf<Stored>> load(const Stored* p, int n) {
  return n >= kLanes<SumOf<Stored>> ? load(p) : load_part(p, n);
}
template <class Stored>
RNNFAST_INLINE void store(Stored* p, Vec<SumOf<Stored>> v, int n) {
  if (n >= kLanes<SumOf<Stored>>) {
    store(p, v);
  } else {
    store_part(p, v, n);
  }
}

// v as a reader of storage type Stored sees it.
template <class Stored, class Number>
RNNFAST_INLINE Vec<Number> rounded(Vec<Number> v) {
  if constexpr (sizeof(Stored) == 2) {
    return widen(Stored{}, narrow(Stored{}, v));
  } else {
    return v;
  }
}

// ---- lane shuffles

template <int kStep, class Number, size_t... kLane>
RNNFAST_INLINE void swap_lanes(Vec<Number>& a, Vec<Number>& b, std::index_sequence<kLane...>) {
  constexpr int U = sizeof...(kLane);
  auto low = __builtin_shufflevector(a.v, b.v, (kLane & kStep ? int(U + (kLane ^ kStep)) : int(kLane))...);
  auto high = __builtin_shufflevector(a.v, b.v, (kLane & kStep ? int(U + kLane) : int(kLane ^ kStep))...);
  a.v = low, b.v = high;
}

// Transposes a square of U = kLanes<Number> rows in log2(U) rounds.
template <class Number, int kStep = 1>
RNNFAST_INLINE void transpose(Vec<Number>* rows) {
  constexpr int U = kLanes<Number>;
  if constexpr (kStep < U) {
#pragma GCC unroll 16
    for (int i = 0; i < U; i++) {
      if (!(i & kStep)) swap_lanes<kStep>(rows[i], rows[i | kStep], std::make_index_sequence<U>());
    }
    transpose<Number, 2 * kStep>(rows);
  }
}

// The sum of each of U rows, in its lane: a transposition of which only the sums are made.
template <class Number, int kStep = 1>
RNNFAST_INLINE Vec<Number> sums_of_rows(Vec<Number>* rows) {
  constexpr int U = kLanes<Number>;
  if constexpr (kStep == U) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < U; i += 2 * kStep) {
      swap_lanes<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<U>());
      rows[i] = rows[i] + rows[i + kStep];
    }
    return sums_of_rows<Number, 2 * kStep>(rows);
  }
}

// ---- functions, to about 4 units in the last place; NaN propagates

template <class Number>
RNNFAST_INLINE Vec<Number> abs(Vec<Number> x) {
  using Integers = typename Vec<Number>::Integers;
  return bit_cast<Vec<Number>>(bit_cast<Integers>(x) & ~bit_cast<Integers>(Vec<Number>(Number(-0.0))));
}

template <class Number>
RNNFAST_INLINE Vec<Number> relu(Vec<Number> x) {
  return x.v < 0 ? Vec<Number>(0).v : x.v;  // this way round a NaN stays
}

template <class Number>
RNNFAST_INLINE Vec<Number> zero_where_not_positive(Vec<Number> h, Vec<Number> dh) {
  return h.v <= 0 ? Vec<Number>(0).v : dh.v;
}

template <class Number, class... Rest>
RNNFAST_INLINE Vec<Number> polynomial(Vec<Number> x, Number lead, Rest... rest) {
  Vec<Number> p = lead;
  ((p = p * x + Vec<Number>(Number(rest))), ...);
  return p;
}

// Constants of exp: x = n ln2 + r. Adding kMagic leaves n in the low bits of the sum, so no conversion is needed.
template <class Number>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float kMagic = 0x1.8p23f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kMin = -87.3f, kMax = 88.37f;  // beyond: 0 and infinity
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000;
  static RNNFAST_INLINE Vec<float> reduced(Vec<float> r) {
    return polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                      5.0000001201e-1f) *
               (r * r) +
           r + 1;
  }
};
template <>
struct Exp<double> {
  static constexpr double kMagic = 0x1.8p52, kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kMin = -708.0, kMax = 709.4;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static RNNFAST_INLINE Vec<double> reduced(Vec<double> r) {  // Taylor: |r| < 0.35, so r^14/14! is below 2^-57
    return polynomial(r, 1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                      1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5) *
               (r * r) +
           r + 1;
  }
};

template <class Number>
RNNFAST_INLINE Vec<Number> exp(Vec<Number> x) {
  using Constants = Exp<Number>;
  using Integers = typename Vec<Number>::Integers;
  Vec<Number> shifted = x * Vec<Number>(Number(1.4426950408889634074)) + Vec<Number>(Constants::kMagic);
  Vec<Number> n = shifted - Vec<Number>(Constants::kMagic);
  Vec<Number> r = x - n * Vec<Number>(Constants::kLn2High) - n * Vec<Number>(Constants::kLn2Low);
  Vec<Number> power = bit_cast<Vec<Number>>((bit_cast<Integers>(shifted) << Constants::kMantissa) + Constants::kOne);
  Vec<Number> e = Constants::reduced(r) * power;
  e = x.v > Constants::kMax ? Vec<Number>(Number(__builtin_inf())).v : e.v;
  return x.v < Constants::kMin ? Vec<Number>(0).v : e.v;
}

template <class Number>
RNNFAST_INLINE Vec<Number> reciprocal(Vec<Number> x) {
  return Vec<Number>(1) / x;
}
template <class Number>
RNNFAST_INLINE Vec<Number> sigmoid(Vec<Number> x) {
  return reciprocal(Vec<Number>(1) + exp(Vec<Number>(0) - x));
}

// x P(x^2) near zero, where 1 - 2 / (e^2x + 1) would cancel (coefficients from Cephes).
RNNFAST_INLINE Vec<float> tanh_near_zero(Vec<float> x, Vec<float> z) {
  return polynomial(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                    -3.33332819422e-1f) *
             z * x +
         x;
}
RNNFAST_INLINE Vec<double> tanh_near_zero(Vec<double> x, Vec<double> z) {
  Vec<double> p = polynomial(z, -9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3);
  Vec<double> q = polynomial(z, 1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3);
  return p / q * z * x + x;
}

// tanh of x, whose absolute value is size, of e^2size + 1.
template <class Number>
RNNFAST_INLINE Vec<Number> tanh_of(Vec<Number> x, Vec<Number> size, Vec<Number> power_and_one) {
  using Integers = typename Vec<Number>::Integers;
  Vec<Number> near = tanh_near_zero(x, x * x), far = Vec<Number>(1) - Vec<Number>(2) * reciprocal(power_and_one);
  Integers sign = bit_cast<Integers>(x) ^ bit_cast<Integers>(size);
  far = bit_cast<Vec<Number>>(bit_cast<Integers>(far) | sign);
  return size.v < Number(0.625) ? near.v : far.v;
}
template <class Number>
RNNFAST_INLINE Vec<Number> tanh(Vec<Number> x) {
  const Vec<Number> size = abs(x);
  return tanh_of(x, size, exp(size + size) + Vec<Number>(1));
}

#if defined(__AVX2__)

// In float: half the instructions of the above, and half the latency, by a table in a register.

// 2^(x (scale + rest)) as s 2^r, with s from a table of as many parts of an octave as a register has lanes, and
// |r| < 0.52 of such a part.
struct Power {
  Vec<float> s, r;

#if defined(__AVX512F__)
  RNNFAST_INLINE Power(Vec<float> x, float scale, float rest) {
    alignas(64) static constexpr float kTable[] = {0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f,
                                                   0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
                                                   0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                                                   0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};
    // The logarithms of these floats are that much more than sixteenths.
    alignas(64) static constexpr float kMore[] = {
        0x0.000000p+0f,  -0x1.1ecccap-24f, 0x1.293ab8p-26f,  -0x1.2512a4p-24f, -0x1.8bbfd2p-25f, -0x1.c0bec4p-25f,
        0x1.800eaep-25f, 0x1.728d0ep-27f,  -0x1.a82ebcp-26f, 0x1.79b05ep-25f,  -0x1.036b6ep-27f, -0x1.2ec1d4p-27f,
        0x1.6cd47cp-26f, 0x1.04ae88p-27f,  0x1.2fc81cp-27f,  -0x1.fda57cp-28f};
    const Vec<float> kParts(0x1.8p19f);  // a sum with it ends at sixteenths, and the low bits count them
    const Vec<float> shifted = x * Vec<float>(scale) + kParts, n = shifted - kParts;
    const __m512i index = bit_cast<__m512i>(shifted);
    r = x * Vec<float>(scale) - n;
    r = r - Vec<float>(_mm512_maskz_permutexvar_ps(kAll, index, _mm512_load_ps(kMore)));
    if (rest != 0) r = x * Vec<float>(rest) + r;
    s = Vec<float>(_mm512_maskz_scalef_ps(kAll, _mm512_maskz_permutexvar_ps(kAll, index, _mm512_load_ps(kTable)),
                                          (__m512)n.v));  // by 2^floor(n)
  }
  static constexpr __mmask16 kAll = 0xffff;

  RNNFAST_INLINE Vec<float> growth() const {  // 2^r - 1
    return polynomial(r, 0x1.c6b34ap-5f, 0x1.ebff94p-3f, 0x1.62e430p-1f) * r;
  }
#else
  RNNFAST_INLINE Power(Vec<float> x, float scale, float rest) {
    // Eighths, each less what the count of eighths adds when it is shifted to where the octaves lie.
    alignas(32) static constexpr int32_t kTable[] = {
        0x3f800000,
        0x3f8b95c2 - (1 << 20),
        0x3f9837f0 - (2 << 20),
        0x3fa5fed7 - (3 << 20),
        0x3fb504f3 - (4 << 20),
        0x3fc5672a - (5 << 20),
        0x3fd744fd - (6 << 20),
        0x3feac0c7 - (7 << 20),
    };
    // The logarithms of these floats are that much more than eighths.
    alignas(32) static constexpr float kMore[] = {0x0.000000p+0f,  0x1.293ab8p-26f,  -0x1.8bbfd2p-25f,
                                                  0x1.800eaep-25f, -0x1.a82ebcp-26f, -0x1.036b6ep-27f,
                                                  0x1.6cd47cp-26f, 0x1.2fc81cp-27f};
    const Vec<float> kParts(0x1.8p20f);  // a sum with it ends at eighths, and the low bits count them
    const Vec<float> shifted = x * Vec<float>(scale) + kParts, n = shifted - kParts;
    const __m256i index = bit_cast<__m256i>(shifted);
    r = x * Vec<float>(scale) - n;
    r = r - Vec<float>(_mm256_permutevar8x32_ps(_mm256_load_ps(kMore), index));
    if (rest != 0) r = x * Vec<float>(rest) + r;
    const __m256i of_table = _mm256_permutevar8x32_epi32(*reinterpret_cast<const __m256i*>(kTable), index);
    s = bit_cast<Vec<float>>(_mm256_add_epi32(of_table, _mm256_slli_epi32(index, 20)));
  }

  RNNFAST_INLINE Vec<float> growth() const {  // 2^r - 1
    return polynomial(r, 0x1.c6baa8p-5f, 0x1.ec0c80p-3f, 0x1.62e430p-1f) * r;
  }
#endif

  RNNFAST_INLINE Vec<float> and_one() const { return s * growth() + s + 1; }
};

// Within [low, high]; NaN stays, as the second operand of both instructions.
RNNFAST_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 above = _mm512_maskz_max_ps(Power::kAll, (__m512)Vec<float>(low).v, (__m512)x.v);
  return Vec<float>(_mm512_maskz_min_ps(Power::kAll, (__m512)Vec<float>(high).v, above));
#else
  const __m256 above = _mm256_max_ps((__m256)Vec<float>(low).v, (__m256)x.v);
  return Vec<float>(_mm256_min_ps((__m256)Vec<float>(high).v, above));
#endif
}

// a / b, to about a unit in the last place.
RNNFAST_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const Vec<float> r(_mm512_maskz_rcp14_ps(Power::kAll, (__m512)b.v)), y = a * r;  // r to 14 bits
  return (a - y * b) * r + y;
#else
  return a / b;  // an estimate would be AMD's or Intel's
#endif
}

// Below kLow it is 0. From 17 on it is 1, but far beyond that s r would be a denormal, which is slow.
RNNFAST_INLINE Vec<float> sigmoid(Vec<float> x) {
  constexpr float kLow = -87, kHigh = 40;
  const Power e(clamp(x, kLow, kHigh), -1.44269502f, -1.92596299e-8f);  // e^-x
  const Vec<float> y = quotient(1, e.and_one());
  return x.v < kLow ? Vec<float>(0).v : y.v;  // this way round a NaN stays
}

RNNFAST_INLINE Vec<float> tanh(Vec<float> x) {
#if defined(__AVX512F__)
  // (e^2x - 1) / (e^2x + 1), with the numerator exact where it is small; it is 1 from 9.02 on.
  const Power e(clamp(x, -9.1f, 9.1f), 2.88539004f, 0);
  const Vec<float> q =
      polynomial(e.r, 0x1.3b2c4cp-7f, 0x1.c6b34ap-5f, 0x1.ebfbe0p-3f, 0x1.62e430p-1f) * e.r;  // 2^r - 1
  const Vec<float> m = e.s * q + (e.s - 1);
  return quotient(m, m + 2);
#else
  // With eighths that would be off by up to 4 units.
  const Vec<float> size = abs(x);
  return tanh_of(x, size, Power(clamp(size, 0, 9.1f), 2.88539004f, 0).and_one());
#endif
}

#endif

}  // namespace
}  // namespace RNNFAST_ISA
}  // namespace rnnfast
