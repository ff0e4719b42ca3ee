// Vectors of the CPU kernels: as wide as the machine's registers, loads and stores that convert, exp and GELU.
//
// Storage S is float, double or bfloat16; arithmetic C is float (for float and bfloat16) or double.
// GCC's and Clang's vector extensions let the same source serve AVX-512, AVX2 and NEON; two x86 instructions are behind
// #if.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace d_emo {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
struct VectorOf {
    typedef C type __attribute__((vector_size(kVectorBytes)));
    static constexpr int lanes = kVectorBytes / sizeof(C);
};
template <class C>
using Vec = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = VectorOf<C>::lanes;

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- storage types -------------------------------------------------------------------------------------------------

struct bfloat16 {
    uint16_t bits;
};
// The type that numbers stored as S are computed in.
template <class S>
using ArithmeticOf = std::conditional_t<std::is_same<S, double>::value, double, float>;

inline float to_arithmetic(float x) { return x; }
inline double to_arithmetic(double x) { return x; }
inline uint32_t to_arithmetic(uint32_t x) { return x; }
inline float to_arithmetic(bfloat16 x) {
    const uint32_t wide = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}

inline void from_arithmetic(float x, float* y) { *y = x; }
inline void from_arithmetic(double x, double* y) { *y = x; }
inline void from_arithmetic(float x, bfloat16* y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Round to nearest even; a NaN keeps its quiet bit instead of rounding into infinity.
    y->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class C>
inline Vec<C> broadcast(C x) {
    return x - Vec<C>{};
}

// Whole vectors ...
template <class C>
inline Vec<C> load(const C* p) {
    Vec<C> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t SignedWords __attribute__((vector_size(kVectorBytes)));
inline Vec<float> load(const bfloat16* p) {
    HalfWords half;
    std::memcpy(&half, p, sizeof half);
    return (Vec<float>)(__builtin_convertvector(half, Words) << 16);
}
template <class C>
inline void store(C* p, Vec<C> v) {
    std::memcpy(p, &v, sizeof v);
}
inline HalfWords to_halves(Vec<float> v) {
#if defined(__AVX512BF16__)
    return (HalfWords)_mm512_cvtneps_pbh((__m512)v);
#else
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(v != v ? quiet : rounded, HalfWords);
#endif
}
inline void store(bfloat16* p, Vec<float> v) {
    const HalfWords half = to_halves(v);
    std::memcpy(p, &half, sizeof half);
}
// ... and the first n lanes of one; the others are read as zero and not written. The uncommon case is kept out of line,
// or its indexing would send every vector through memory.
template <class C, class S>
__attribute__((noinline, cold)) Vec<C> load_tail(const S* p, int n) {
    C lanes[kLanes<C>] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_arithmetic(p[i]);
    return load(lanes);
}
template <class C, class S>
__attribute__((noinline, cold)) void store_tail(S* p, Vec<C> v, int n) {
    for (int i = 0; i < n; ++i) from_arithmetic(C(v[i]), p + i);
}
template <class C, class S>
inline Vec<C> load_lanes(const S* p, int n) {
    return n >= kLanes<C> ? load(p) : load_tail<C>(p, n);
}
template <class C, class S>
inline void store_lanes(S* p, Vec<C> v, int n) {
    if (n >= kLanes<C>) {
        store(p, v);
    } else {
        store_tail<C>(p, v, n);
    }
}

// m rows of n numbers, `ld` apart, into rows `step` apart of a tensor.
template <class C, class S>
inline void store_rows(int m, int n, const C* rows, int64_t ld, S* out, int64_t step) {
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < n; k += kLanes<C>) store_lanes<C>(out + i * step + k, load(rows + i * ld + k), n - k);
}

// ---- functions -----------------------------------------------------------------------------------------------------

template <class C, class F>
inline Vec<C> by_lane(Vec<C> x, F function) {
    for (int i = 0; i < kLanes<C>; ++i) x[i] = function(x[i]);
    return x;
}

// The larger and the smaller of x and a bound; a NaN stays. Compilers make two instructions of x < bound ? bound : x.
inline Vec<float> at_least(Vec<float> x, float bound) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_max_ps((__m512)broadcast(bound), (__m512)x);
#elif defined(__AVX__)
    return (Vec<float>)_mm256_max_ps((__m256)broadcast(bound), (__m256)x);
#else
    return x < bound ? broadcast(bound) : x;
#endif
}
inline Vec<float> at_most(Vec<float> x, float bound) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_min_ps((__m512)broadcast(bound), (__m512)x);
#elif defined(__AVX__)
    return (Vec<float>)_mm256_min_ps((__m256)broadcast(bound), (__m256)x);
#else
    return x > bound ? broadcast(bound) : x;
#endif
}

// The polynomial of these coefficients, the highest power's first.
template <class C, size_t n>
inline Vec<C> polynomial(Vec<C> x, const C (&coefficients)[n]) {
    Vec<C> sum = broadcast(coefficients[0]);
#pragma GCC unroll 8
    for (size_t i = 1; i < n; ++i) sum = sum * x + coefficients[i];
    return sum;
}

// exp to 1e-7 relative: x = n ln 2 + r, a polynomial in r (Cephes' expf, S. Moshier), n added to the exponent.
// Arguments are held within [-87.3, 88.3], where the result is a normal number. Adding 1.5 * 2^23 rounds to a whole
// number and leaves it in the low bits; this file must not be compiled with -ffast-math.
inline Vec<float> exp(Vec<float> x) {
    x = at_least(at_most(x, 88.3f), -87.3f);
    const Vec<float> shifted = x * 1.44269504088896341f + 12582912.0f, whole = shifted - 12582912.0f;
    const Vec<float> r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    const Vec<float> p = polynomial<float>(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                               1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f});
    return (Vec<float>)((SignedWords)p + ((SignedWords)shifted << 23));
}
inline Vec<double> exp(Vec<double> x) {
    return by_lane<double>(x, [](double y) { return std::exp(y); });
}

// 1 / x for finite x; AVX-512's estimate and one Newton step are faster than its division.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
    const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)x);
    return estimate + estimate * (1.0f - x * estimate);
#else
    return 1.0f / x;
#endif
}
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// GELU (exact form) and, if asked for, its derivative. In float the normal distribution function is a quotient of
// polynomials, fitted for the least largest error (7e-9) up to kNormalEnd; beyond, its value at the end stands. The
// results are within 3e-7 of |x|, as PyTorch's are.
constexpr float kNormalEnd = 5.5f;
inline Vec<float> gelu(Vec<float> x, Vec<float>* derivative = nullptr) {
    const Vec<float> from_end = at_least(x, -kNormalEnd), within = at_most(from_end, kNormalEnd);
    const Vec<float> square = within * within;
    const Vec<float> p = polynomial<float>(square, {2.274931833e-8f, 6.352133675e-6f, 1.688272760e-4f, 4.677270447e-3f,
                                                    3.385279854e-2f, 3.989422346e-1f});
    const Vec<float> q = polynomial<float>(square, {1.197503723e-6f, 7.364804087e-5f, 1.884453885e-3f,
                                                    2.864595984e-2f, 2.515223003e-1f, 1.0f});
    const Vec<float> cdf = within * p * reciprocal(q) + 0.5f;
    if (derivative) *derivative = cdf + within * 0.39894228040143268f * exp(square * -0.5f);
    return from_end * cdf;
}
inline Vec<double> gelu(Vec<double> x, Vec<double>* derivative = nullptr) {
    const Vec<double> cdf = by_lane<double>(x, [](double y) { return 0.5 * std::erfc(-y * 0.70710678118654752); });
    if (derivative) *derivative = cdf + x * exp(x * x * -0.5) * 0.39894228040143268;
    return x * cdf;
}

template <class C>
inline Vec<C> sigmoid(Vec<C> x) {
    return reciprocal(C(1) + exp(-x));
}

// Joins the lanes of a vector by a commutative operation, halves first.
template <class V, class F, size_t... I>
inline V join_halves(V v, F operation, std::index_sequence<I...>) {
    constexpr int n = sizeof...(I);
    if constexpr (n >= 16) v = operation(v, __builtin_shufflevector(v, v, (int(I) ^ 8)...));
    if constexpr (n >= 8) v = operation(v, __builtin_shufflevector(v, v, (int(I) ^ 4)...));
    if constexpr (n >= 4) v = operation(v, __builtin_shufflevector(v, v, (int(I) ^ 2)...));
    return operation(v, __builtin_shufflevector(v, v, (int(I) ^ 1)...));
}
template <class C>
inline C sum_lanes(Vec<C> v) {
    return join_halves(v, [](Vec<C> a, Vec<C> b) { return a + b; }, std::make_index_sequence<kLanes<C>>())[0];
}
template <class C>
inline C largest_lane(Vec<C> v) {
    return join_halves(v, [](Vec<C> a, Vec<C> b) { return a > b ? a : b; }, std::make_index_sequence<kLanes<C>>())[0];
}

// ---- a thread's state ----------------------------------------------------------------------------------------------

// Reads and writes numbers below 1e-38 as zero while it lives: softmax and gradients make many, and each costs an x86
// processor a hundred cycles.
class FlushDenormals {
   public:
#if defined(__SSE__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

   private:
    unsigned saved_;
#endif
};

// A thread's own memory, kept from call to call and handed out in aligned pieces. What lives at the same time as
// another Scratch of its thread has another slot.
class Scratch {
 public:
    explicit Scratch(size_t bytes, int slot = 0) {
        struct Memory {
            std::unique_ptr<char, decltype(&std::free)> start{nullptr, &std::free};
            size_t size = 0;
        };
        thread_local Memory memories[2];
        Memory& memory = memories[slot];
        if (bytes > memory.size) {
            memory.start.reset();
            memory.size = (bytes + 4095) / 4096 * 4096;
            memory.start.reset(static_cast<char*>(std::aligned_alloc(4096, memory.size)));
            if (!memory.start) std::abort();
        }
        next_ = memory.start.get();
    }
    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(next_);
        next_ += piece_bytes<T>(count);
        return piece;
    }
    template <class T>
    static constexpr size_t piece_bytes(size_t count) {
        return (count * sizeof(T) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    }

 private:
    char* next_;
};

}  // namespace d_emo
