// Matrix products of operands in the cache, and the forms in which they take them.
//
// An operand holds words along a product's depth. In `Exact` a word is one number of the arithmetic type. In `Halves`
// it is two bfloat16 numbers, which the processor multiplies and adds in one instruction: a row of numbers is as it
// lies in memory, a column of words comes from two rows (`zip`). Sums are always in the arithmetic type.

#pragma once

#include "vectors.h"

namespace d_emo {

constexpr int kAhead = 8;  // rows of a tensor that are fetched before they are read

// The distance between rows of n words: an odd number of whole vectors, since rows a power of two apart would compete
// for the same few lines of the first-level cache.
template <class T>
inline int row_distance(int n) {
    return (round_up(n, kLanes<T>) / kLanes<T> | 1) * kLanes<T>;
}

// A matrix whose rows lie at p + rows[i] * ld, or at p + i * ld if `rows` is null.
template <class T>
struct Rows {
    T* p;
    int64_t ld;
    const int* rows = nullptr;
    T* row(int i) const { return p + (rows ? rows[i] : i) * ld; }

    template <int M>
    struct Tile {  // M rows
        T* at[M];
        T word(int i, int64_t k) const { return at[i][k]; }
    };
    template <int M>
    Tile<M> tile(int first) const {
        Tile<M> tile;
        for (int i = 0; i < M; ++i) tile.at[i] = row(first + i);
        return tile;
    }
};

// A matrix whose columns lie at p + k * ld.
template <class T>
struct Columns {
    T* p;
    int64_t ld;

    template <int M>
    struct Tile {
        T* p;
        int64_t ld;
        T word(int i, int64_t k) const { return p[k * ld + i]; }
    };
    template <int M>
    Tile<M> tile(int first) const {
        return {p + first, ld};
    }
};

// ---- the product ---------------------------------------------------------------------------------------------------

inline Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline Vec<float> multiply_add(Vec<float> sum, Words a, Words b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

constexpr int kShallow = 128;  // words of depth

template <class T, class C, int M, int V, bool add, class Tile>
inline void product_tile(int depth, const Tile& a, const Rows<const T>& b, int column, C* const* c) {
    // b's first column is the tile's
    constexpr int lanes = kLanes<C>;
    Vec<C> sum[M][V];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[i][j] = Vec<C>{};
    const auto add_words = [&](auto row) {
#pragma GCC unroll 4
        for (int k = 0; k < depth; ++k) {
            Vec<T> right[V];
            for (int j = 0; j < V; ++j) right[j] = load(row(k) + j * lanes);
            for (int i = 0; i < M; ++i) {
                const Vec<T> left = broadcast<T>(a.word(i, k));
                for (int j = 0; j < V; ++j) sum[i][j] = multiply_add(sum[i][j], left, right[j]);
            }
        }
    };
    if (b.rows) {
        add_words([&](int k) { return b.p + b.rows[k] * b.ld; });
    } else {
        add_words([&](int k) { return b.p + k * b.ld; });
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
            C* place = c[i] + column + j * lanes;
            store(place, add ? load(place) + sum[i][j] : sum[i][j]);
        }
}

// Rows from i on, M at a time as far as they go; the first that is left.
template <class T, class C, int M, int V, bool add, class Left>
inline int product_rows(int i, int m, int depth, const Left& a, Rows<const T> b, int column, Rows<C> c) {
    for (; i + M <= m; i += M)
        product_tile<T, C, M, V, add>(depth, a.template tile<M>(i), b, column,
                                      c.template tile<M>(i).at);
    return i;
}

template <class T, class C, int V, bool add, class Left>
inline void product_columns(int m, int depth, const Left& a, Rows<const T> b, int column, Rows<C> c) {
    constexpr int M = V > 2 || kVectorBytes < 64 ? 4 : 8, lanes = kLanes<C>;
    constexpr int kDense = 8192 / (V * kVectorBytes);  // rows that fill a quarter of the first-level cache
    alignas(kVectorBytes) T dense[kDense * V * lanes];
    b.p += column;
    if (b.rows && depth <= kDense && m > 2 * M) {  // rows that are used often, side by side
        for (int k = 0; k < depth; ++k)
            for (int j = 0; j < V * lanes; j += lanes) store(dense + k * V * lanes + j, load(b.row(k) + j));
        b = {dense, V * lanes};
    }
    int i = 0;
    if constexpr (V == 4)  // taller tiles share a word of the right operand, which may lie in the second-level cache
        if (depth > kShallow || m % 6 == 0)
            i = product_rows<T, C, 6, V, add>(i, m, depth, a, b, column, c);
    i = product_rows<T, C, M, V, add>(i, m, depth, a, b, column, c);
    product_rows<T, C, 1, V, add>(i, m, depth, a, b, column, c);
}

// Columns of a product that are worked on together.
template <class C>
constexpr int kWide = (kVectorBytes == 64 ? 4 : 2) * kLanes<C>;

// c (m x n) = [c +] a (m x depth) b (depth x n), a as Rows or Columns; n in whole vectors.
template <class T, class C, bool add, class Left>
inline void product(int m, int n, int depth, const Left& a, Rows<const T> b, Rows<C> c) {
    constexpr int lanes = kLanes<C>;
    int column = 0;
    for (; column + kWide<C> <= n; column += kWide<C>)
        product_columns<T, C, kWide<C> / lanes, add>(m, depth, a, b, column, c);
    for (; column + 2 * lanes <= n; column += 2 * lanes)
        product_columns<T, C, 2, add>(m, depth, a, b, column, c);
    if (column < n) product_columns<T, C, 1, add>(m, depth, a, b, column, c);
}

template <class T, class C, class Left>
inline void product(bool add, int m, int n, int depth, const Left& a, Rows<const T> b, Rows<C> c) {
    add ? product<T, C, true>(m, n, depth, a, b, c) : product<T, C, false>(m, n, depth, a, b, c);
}

// ---- operands ------------------------------------------------------------------------------------------------------

template <class V, size_t... I>
inline void interleave(V a, V b, V* low, V* high, std::index_sequence<I...>) {
    constexpr int n = sizeof...(I);
    *low = __builtin_shufflevector(a, b, (int(I) % 2 * n + int(I) / 2)...);
    *high = __builtin_shufflevector(a, b, (int(I) % 2 * n + int(I) / 2 + n / 2)...);
}

// t (columns x m, rows `ld` apart) = transpose of a (m x columns words, or numbers that become words); t has room for
// whole vectors either way, and words past m are zero.
template <class T, class S = const T>
inline void transpose(int m, int columns, Rows<S> a, T* t, int64_t ld) {
    constexpr int lanes = kLanes<T>;
    for (int i = 0; i < m; i += lanes)
        for (int j = 0; j < columns; j += lanes) {
            Vec<T> block[lanes], next[lanes];
            for (int r = 0; r < lanes; ++r)
                block[r] = i + r < m ? load_lanes<T>(a.row(i + r) + j, columns - j) : Vec<T>{};
            for (int half = 1; half < lanes; half *= 2) {  // a perfect shuffle of the rows, log2(lanes) times
                for (int r = 0; r < lanes / 2; ++r)
                    interleave(block[r], block[r + lanes / 2], &next[2 * r], &next[2 * r + 1],
                               std::make_index_sequence<lanes>());
                std::copy(next, next + lanes, block);
            }
            for (int r = 0; r < lanes; ++r) store(t + (j + r) * ld + i, block[r]);
        }
}

// Products in the arithmetic type, whose operands are taken where they lie.
template <class C>
struct Exact {
    using Word = C;
    static int words(int n) { return n; }
    static void put(Word* row, int column, Vec<C> v) { store(row + column, v); }
    // From sums, in place, to rows that a product takes on its left.
    static void narrow(int, int, C*, int) {}
    // Rows of operands or of sums (depth x n) as columns of words; `place` may hold them, rows `ld` apart.
    static Rows<const C> zip(int, int, Rows<const C> a, C*, int64_t) { return a; }
    static Rows<const C> zip_sums(int, int, Rows<const C> a, C*, int64_t) { return a; }
    // The same from stored numbers, which are always copied, in panels of `width` columns (whole vectors), one after
    // the other.
    template <class S>
    static void pack(int depth, int n, Rows<const S> a, Word* place, int width) {
        for (int i = 0; i < depth; ++i)
            for (int first = 0; first < n; first += width)
                for (int k = first; k < std::min(n, first + width); k += kLanes<C>) {
                    const S* from = a.row(i) + k;
                    __builtin_prefetch(from + kAhead * a.ld);
                    store(place + int64_t(first) * depth + i * width + k - first, load_lanes<C>(from, n - k));
                }
    }
};

#if defined(__AVX512BF16__)
struct Halves {
    using Word = uint32_t;
    static int words(int n) { return (n + 1) / 2; }
    static void put(Word* row, int column, Vec<float> v) { store(reinterpret_cast<bfloat16*>(row) + column, v); }

    static void narrow(int rows, int n, float* a, int ld) {
        for (int i = 0; i < rows; ++i)
            for (int k = 0; k < n; k += kLanes<float>) {
                float* row = a + int64_t(i) * ld;
                store(reinterpret_cast<bfloat16*>(row) + k, load(row + k));
            }
    }
    static Rows<const Word> zip(int depth, int n, Rows<const Word> a, Word* place, int64_t ld) {
        return zipped(depth, n, place, ld, [&](int i, int k) {
            return widened(reinterpret_cast<const bfloat16*>(a.row(i)) + k);
        });
    }
    static Rows<const Word> zip_sums(int depth, int n, Rows<const float> a, Word* place, int64_t ld) {
        return zipped(depth, n, place, ld, [&](int i, int k) { return rounded(load(a.row(i) + k)); });
    }
    static void pack(int depth, int n, Rows<const bfloat16> a, Word* place, int width) {
        for (int first = 0; first < n; first += width)
            zipped(depth, std::min(width, n - first), place + int64_t(first) * words(depth), width, [&](int i, int k) {
                return (Words)load_lanes<float>(a.row(i) + first + k, n - first - k) >> 16;
            });
    }

   private:
    // number(i, k): a vector of bfloat16 numbers, each in the low half of a word.
    template <class F>
    static Rows<const Word> zipped(int depth, int n, Word* place, int64_t ld, F number) {
        for (int i = 0; i < depth; i += 2)
            for (int k = 0; k < n; k += kLanes<Word>) {
                const Words low = number(i, k), high = i + 1 < depth ? number(i + 1, k) : Words{};
                store(place + i / 2 * ld + k, low | high << 16);
            }
        return {place, ld};
    }
    static Words widened(const bfloat16* p) {
        HalfWords half;
        std::memcpy(&half, p, sizeof half);
        return __builtin_convertvector(half, Words);
    }
    static Words rounded(Vec<float> v) { return __builtin_convertvector(to_halves(v), Words); }
};
#endif

// How products are made from numbers that are stored as S.
template <class S, class C>
struct ProductsOf {
    using type = Exact<C>;
};
#if defined(__AVX512BF16__)
template <>
struct ProductsOf<bfloat16, float> {
    using type = Halves;
};
#endif

}  // namespace d_emo
