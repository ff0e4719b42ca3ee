// A linear layer on the CPU, x W^T: the weight is packed into panels that are read in order, x is read where it lies.

#pragma once

#include "products.h"

namespace d_emo {

constexpr int kRowBlock = 64;  // rows that are worked on together
constexpr int kDepth = 384;   // words of depth that sums stay in registers for

// A transposed weight (depth x columns) in panels of kWide<C> columns. No panel holds columns of two groups, such as
// heads: they come as counts[i] groups of sizes[i] columns, one kind after the other.
template <class S, class C>
struct Panels {
    using P = typename ProductsOf<S, C>::type;
    using Word = typename P::Word;
    int numbers, depth;  // along the depth: numbers, and words that hold them
    int counts[2], sizes[2];
    Word* packed = nullptr;

    Panels(int numbers, std::pair<int, int> counts, std::pair<int, int> sizes)
        : numbers(numbers),
          depth(P::words(numbers)),
          counts{counts.first, counts.second},
          sizes{sizes.first, sizes.second} {}
    Panels(int numbers, int columns) : Panels(numbers, {1, 0}, {columns, 1}) {}

    int64_t panel_size() const { return int64_t(round_up(depth, kLanes<Word>)) * kWide<C>; }
    int pieces(int kind) const { return (sizes[kind] + kWide<C> - 1) / kWide<C>; }
    int count() const { return counts[0] * pieces(0) + counts[1] * pieces(1); }
    int columns() const { return counts[0] * sizes[0] + counts[1] * sizes[1]; }
    size_t bytes() const { return Scratch::piece_bytes<Word>(count() * panel_size()); }
    void take(Scratch& scratch) { packed = scratch.take<Word>(count() * panel_size()); }

    const Word* panel_from(int column) const {
        const int kind = column >= counts[0] * sizes[0], place = kind ? column - counts[0] * sizes[0] : column;
        const int panel = place / sizes[kind] * pieces(kind) + place % sizes[kind] / kWide<C>;
        return packed + (kind ? counts[0] * pieces(0) + panel : panel) * panel_size();
    }
    // First column and number of columns of a panel.
    std::pair<int, int> columns_of(int panel) const {
        const int kind = panel >= counts[0] * pieces(0), number = kind ? panel - counts[0] * pieces(0) : panel;
        const int piece = number % pieces(kind) * kWide<C>;
        const int first = (kind ? counts[0] * sizes[0] : 0) + number / pieces(kind) * sizes[kind] + piece;
        return {first, std::min(kWide<C>, sizes[kind] - piece)};
    }
    // From a weight (columns x depth).
    void pack(int panel, const S* matrix) const {
        const auto [first, n] = columns_of(panel);
        const Word* rows = reinterpret_cast<const Word*>(matrix + int64_t(first) * numbers);
        transpose<Word>(n, depth, {rows, depth}, packed + panel * panel_size(), kWide<C>);
    }

    // out (rows x n, `ld` apart) = x (rows x depth) times n columns of one group, from the start of a panel on.
    void multiply(int rows, const S* x, int first, int n, C* out, int64_t ld) const {
        const Word* words = reinterpret_cast<const Word*>(x);
        for (int c = 0; c < n; c += kWide<C>) {
            const Word* panel = panel_from(first + c);
            const int width = round_up(std::min(kWide<C>, n - c), kLanes<C>);
            for (int k = 0; k < depth; k += kDepth)
                product<Word, C>(k > 0, rows, width, std::min(kDepth, depth - k), {words + k, depth}, 1,
                                 {panel + k * kWide<C>, kWide<C>}, {out + c, ld});
        }
    }
    // out (rows x columns) = x (rows x depth) times all columns, a single group; at most kRowBlock rows.
    void multiply_rows(int rows, const S* x, S* out, bool past_cache, Scratch scratch) const {
        const int n = columns(), ld = row_distance<C>(n);
        C* sums = scratch.take<C>(size_t(kRowBlock) * ld);
        multiply(rows, x, 0, n, sums, ld);
        for (int i = 0; i < rows; ++i)
            for (int k = 0; k < n; k += kLanes<C>)
                store_result<C>(out + int64_t(i) * n + k, load(sums + int64_t(i) * ld + k), n - k, past_cache);
    }
    size_t sums_bytes() const { return Scratch::piece_bytes<C>(size_t(kRowBlock) * row_distance<C>(columns())); }
};

// Whether products of this storage type are worth it: measured with AVX-512 only, and no match for AMX's products of
// bfloat16.
template <class S>
constexpr bool multiplies() {
#if defined(__AMX_BF16__) || !defined(__AVX512BF16__)
    if (std::is_same<S, bfloat16>::value) return false;
#endif
    return kVectorBytes == 64 && !std::is_same<S, double>::value;
}

}  // namespace d_emo
