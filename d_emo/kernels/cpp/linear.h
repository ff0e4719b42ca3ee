// Linear layers on the CPU: x W^T, and the gradients of both. A product's right operand is packed into panels that are
// read in order; rows on its left are taken where they lie, or widened to the arithmetic type a block at a time.
//
// What it gains: the rows "@reference" in docs/speed.md, which are without all kernels.

#pragma once

#include "products.h"

namespace d_emo {

constexpr int kRowBlock = kVectorBytes == 64 ? 96 : 64;  // rows that are worked on together, at most
constexpr int kColumnBlock = 384;                        // columns whose sums are kept together
constexpr int kDepth = 384;                              // words of depth that sums stay in registers for

// Whether products of stored numbers S are made of wider copies of them.
template <class S, class C>
constexpr bool kWidens = !std::is_same<S, C>::value && std::is_same<typename ProductsOf<S, C>::type, Exact<C>>::value;

// x (rows x numbers) as words on the left of a product; `place` holds them where they must be widened.
template <class S, class C, class Word>
inline Rows<const Word> left_words(int rows, int numbers, const S* x, Word* place) {
    if constexpr (kWidens<S, C>) {
        const int ld = row_distance<C>(numbers);
        Exact<C>::pack(rows, numbers, Rows<const S>{x, numbers}, place, ld);
        return {place, ld};
    } else {
        return {reinterpret_cast<const Word*>(x), ProductsOf<S, C>::type::words(numbers)};
    }
}
template <class S, class C>
inline size_t left_count(int rows, int numbers) {
    return kWidens<S, C> ? size_t(rows) * row_distance<C>(numbers) : 0;
}

// ---- a weight ------------------------------------------------------------------------------------------------------

// A product's right operand (depth x columns) in panels of kWide<C> columns. No panel holds columns of two groups, such
// as heads: they come as counts[i] groups of sizes[i] columns, one kind after the other.
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
    // From a matrix that is stored as (columns x depth), as weights are, or else as (depth x columns).
    void pack(int panel, const S* matrix, bool by_column = true) const {
        const auto [first, n] = columns_of(panel);
        Word* place = packed + panel * panel_size();
        if (!by_column) return P::pack(numbers, n, Rows<const S>{matrix + first, columns()}, place, kWide<C>);
        const S* rows = matrix + int64_t(first) * numbers;
        if constexpr (kWidens<S, C>) {
            transpose(n, depth, Rows<const S>{rows, numbers}, place, kWide<C>);
        } else {
            transpose(n, depth, Rows<const Word>{reinterpret_cast<const Word*>(rows), depth}, place, kWide<C>);
        }
    }

    // out (rows x n, `ld` apart) = x (rows x depth) times n columns of one group, from the start of a panel on.
    void multiply(int rows, Rows<const Word> x, int first, int n, C* out, int64_t ld) const {
        for (int k = 0; k < depth; k += kDepth)  // outside: rows of this depth stay in the cache
            for (int c = 0; c < n; c += kWide<C>) {
                const int width = round_up(std::min(kWide<C>, n - c), kLanes<C>);
                product<Word, C>(k > 0, rows, width, std::min(kDepth, depth - k), Rows<const Word>{x.p + k, x.ld},
                                 {panel_from(first + c) + k * kWide<C>, kWide<C>}, {out + c, ld});
            }
    }
    // out (rows x columns) = x (rows x numbers) times all columns, a single group, + bias; at most kRowBlock rows.
    void multiply_rows(int rows, const S* x, const C* bias, S* out, Scratch scratch) const {
        constexpr int ld = kColumnBlock + kLanes<C>;
        C* sums = scratch.take<C>(kRowBlock * ld);
        const auto left = left_words<S, C>(rows, numbers, x, scratch.take<Word>(left_count<S, C>(rows, numbers)));
        for (int first = 0; first < columns(); first += kColumnBlock) {
            const int n = std::min(kColumnBlock, columns() - first);
            multiply(rows, left, first, n, sums, ld);
            for (int k = 0; bias && k < n; k += kLanes<C>) {
                const Vec<C> summand = load_lanes<C>(bias + first + k, n - k);
                for (int i = 0; i < rows; ++i) store(sums + i * ld + k, load(sums + i * ld + k) + summand);
            }
            store_rows(rows, n, sums, ld, out + first, columns());
        }
    }
    size_t row_bytes() const {
        return Scratch::piece_bytes<C>(kRowBlock * (kColumnBlock + kLanes<C>)) +
               Scratch::piece_bytes<Word>(left_count<S, C>(kRowBlock, numbers));
    }
    // Rows that are worked on together, so that every thread has some.
    static int row_block(int64_t rows, int threads) {
        int block = kRowBlock;
        while (block > 16 && rows < int64_t(2) * threads * block) block /= 2;
        return block;
    }
};

// ---- the layer -----------------------------------------------------------------------------------------------------

struct LinearShape {
    int32_t rows, inputs, outputs;
    int32_t by_column;  // the weight is stored as (outputs x inputs), or else as (inputs x outputs)
};

// out (rows x outputs) = x (rows x inputs) times the weight, + bias unless that is null.
template <class S, class C>
void linear_forward(const LinearShape& s, const S* x, const S* weight, const C* bias, S* out, int threads) {
    Panels<S, C> panels(s.inputs, s.outputs);
    Scratch shared(panels.bytes(), 1);
    panels.take(shared);
    const int block = panels.row_block(s.rows, threads);
#pragma omp parallel num_threads(threads)
    {
        const FlushDenormals flush;
        const Scratch own(panels.row_bytes());
#pragma omp for schedule(dynamic)
        for (int panel = 0; panel < panels.count(); ++panel) panels.pack(panel, weight, s.by_column);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < s.rows; row += block)
            panels.multiply_rows(int(std::min<int64_t>(block, s.rows - row)), x + row * s.inputs, bias,
                                 out + row * s.outputs, own);
    }
}

// out (outputs x inputs) = grad (rows x outputs), transposed, times x (rows x inputs); grad_bias (outputs) = sums of
// grad's columns unless it is null. Every number is the sum of its summands in the same order, however many threads there are.
template <class S, class C>
void linear_weight_gradient(const LinearShape& s, const S* grad, const S* x, S* out, C* grad_bias, int threads) {
    using P = typename ProductsOf<S, C>::type;
    using Word = typename P::Word;
    constexpr int kRows = 128;                  // numbers of depth that are packed together
    constexpr int strip = 48, wide = kWide<C>;  // columns of grad and of x that lie together
    const int depth = P::words(kRows), across = std::min(384, round_up(s.inputs, wide));
    const int parts = (s.inputs + across - 1) / across;
    int down = 384;
    while (down > 24 && (s.outputs + down - 1) / down * parts < 2 * threads) down /= 2;
    const size_t left_count = size_t(depth) * round_up(down, strip);
    const size_t panel_count = size_t(depth) * round_up(across, wide);
    const size_t bytes = Scratch::piece_bytes<C>(size_t(down) * across) + Scratch::piece_bytes<Word>(left_count) +
                         Scratch::piece_bytes<Word>(panel_count);
    const int units = (s.outputs + down - 1) / down * parts;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < units; ++unit) {
        const FlushDenormals flush;
        Scratch scratch(bytes);
        C* sums = scratch.take<C>(size_t(down) * across);
        Word* left = scratch.take<Word>(left_count);
        Word* panels = scratch.take<Word>(panel_count);
        const int first = unit / parts * down, m = std::min(down, s.outputs - first);
        const int column = unit % parts * across, n = std::min(across, s.inputs - column);
        for (int64_t row = 0; row < s.rows; row += kRows) {
            const int rows = int(std::min<int64_t>(kRows, s.rows - row)), words = P::words(rows);
            const S* grads = grad + row * s.outputs + first;
            P::pack(rows, m, Rows<const S>{grads, s.outputs}, left, strip);
            for (int i = 0; grad_bias && column == 0 && i < rows; ++i)
                for (int k = 0; k < m; k += kLanes<C>) {
                    const Vec<C> v = load_lanes<C>(grads + int64_t(i) * s.outputs + k, m - k);
                    C* sum = grad_bias + first + k;
                    store_lanes<C>(sum, row + i ? load_lanes<C>(sum, m - k) + v : v, m - k);
                }
            P::pack(rows, n, Rows<const S>{x + row * s.inputs + column, s.inputs}, panels, wide);
            for (int c = 0; c < n; c += wide)
                for (int i = 0; i < m; i += strip)
                    product<Word, C>(row > 0, std::min(strip, m - i), round_up(std::min(wide, n - c), kLanes<C>), words,
                                     Columns<const Word>{left + int64_t(i) * words, strip},
                                     {panels + int64_t(c) * words, wide}, {sums + int64_t(c) * down + i * wide, wide});
        }
        for (int i = 0; i < m; ++i)
            for (int k = 0; k < n; k += kLanes<C>)
                store_lanes<C>(out + int64_t(first + i) * s.inputs + column + k,
                               load(sums + int64_t(k / wide) * wide * down + i * wide + k % wide), n - k);
    }
}

}  // namespace d_emo
