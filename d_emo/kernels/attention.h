// Spanning window attention on the CPU: GELU of the values, softmax(q k^T) v in the neighborhood and the remote windows
// of one set of projections, the sum of both. Nothing is permuted in memory: a window is a list of token numbers.
//
// The unit of work is one head of one image. Shapes: N tokens, T tokens in a window, d channels of a query or key,
// e of a value; dp and tp are d and T in whole vectors, dl and tl the distances of such rows. Probabilities are
// computed again in the backward pass.

#pragma once

#include "vectors.h"

namespace d_emo {

struct AttentionShape {
    int32_t batch, height, width, heads, head_dim, value_dim, window_height, window_width;
    int32_t neighborhood, remote;  // which kinds of window take part
    double weight;                 // of each kind's result

    int tokens() const { return height * width; }
    int window() const { return window_height * window_width; }
    int windows() const { return tokens() / window(); }
    int64_t row() const { return int64_t(heads) * (2 * head_dim + value_dim); }
    int64_t key_offset() const { return int64_t(heads) * head_dim; }
    int64_t value_offset() const { return 2 * key_offset(); }
};

// The distance between rows of n elements: an odd number of whole vectors, since rows a power of two apart would
// compete for the same few lines of the first-level cache.
template <class C>
inline int row_distance(int n) {
    return (round_up(n, kLanes<C>) / kLanes<C> | 1) * kLanes<C>;
}

// Token numbers of every window, one kind after the other.
inline std::vector<int> window_tokens(const AttentionShape& s) {
    const int rows = s.height / s.window_height, columns = s.width / s.window_width;
    std::vector<int> tokens;
    tokens.reserve(2 * s.tokens());
    for (int kind = 0; kind < 2; ++kind) {
        if (!(kind ? s.remote : s.neighborhood)) continue;
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < columns; ++j)
                for (int y = 0; y < s.window_height; ++y)
                    for (int x = 0; x < s.window_width; ++x)
                        tokens.push_back(kind ? (y * rows + i) * s.width + x * columns + j
                                              : (i * s.window_height + y) * s.width + j * s.window_width + x);
    }
    return tokens;
}

// ---- small matrix products -----------------------------------------------------------------------------------------

// A matrix whose rows lie at p + rows[i] * ld, or at p + i * ld if `rows` is null.
template <class T>
struct Rows {
    T* p;
    int ld;
    const int* rows = nullptr;
    T* row(int i) const { return p + int64_t(rows ? rows[i] : i) * ld; }
};

template <class C, int M, int V, bool add>
inline void product_tile(int depth, const C* const* a, int a_step, const Rows<const C>& b, int column, C* const* c) {
    constexpr int lanes = kLanes<C>;
    Vec<C> sum[M][V];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[i][j] = add ? load(c[i] + column + j * lanes) : Vec<C>{};
    for (int k = 0; k < depth; ++k) {
        const C* b_row = b.row(k) + column;
        Vec<C> right[V];
        for (int j = 0; j < V; ++j) right[j] = load(b_row + j * lanes);
        for (int i = 0; i < M; ++i) {
            const Vec<C> left = broadcast(a[i][int64_t(k) * a_step]);
            for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) store(c[i] + column + j * lanes, sum[i][j]);
}

template <class C, int V, bool add>
inline void product_columns(int m, int depth, Rows<const C> a, int a_step, Rows<const C> b, int column, Rows<C> c) {
    int i = 0;
    for (; i + 4 <= m; i += 4) {
        const C* left[4] = {a.row(i), a.row(i + 1), a.row(i + 2), a.row(i + 3)};
        C* out[4] = {c.row(i), c.row(i + 1), c.row(i + 2), c.row(i + 3)};
        product_tile<C, 4, V, add>(depth, left, a_step, b, column, out);
    }
    for (; i < m; ++i) {
        const C* left[1] = {a.row(i)};
        C* out[1] = {c.row(i)};
        product_tile<C, 1, V, add>(depth, left, a_step, b, column, out);
    }
}

// c (m x n) = [c +] a (m x depth) b (depth x n); element (i, k) of a is a.row(i)[k * a_step]; n in whole vectors.
template <class C, bool add>
inline void product(int m, int n, int depth, Rows<const C> a, int a_step, Rows<const C> b, Rows<C> c) {
    constexpr int lanes = kLanes<C>, wide = kVectorBytes == 64 ? 4 : 2;
    int column = 0;
    for (; column + wide * lanes <= n; column += wide * lanes)
        product_columns<C, wide, add>(m, depth, a, a_step, b, column, c);
    for (; column < n; column += lanes) product_columns<C, 1, add>(m, depth, a, a_step, b, column, c);
}

template <class C>
inline void product(bool add, int m, int n, int depth, Rows<const C> a, int a_step, Rows<const C> b, Rows<C> c) {
    add ? product<C, true>(m, n, depth, a, a_step, b, c) : product<C, false>(m, n, depth, a, a_step, b, c);
}

template <class V, size_t... I>
inline void interleave(V a, V b, V* low, V* high, std::index_sequence<I...>) {
    constexpr int n = sizeof...(I);
    *low = __builtin_shufflevector(a, b, (int(I) % 2 * n + int(I) / 2)...);
    *high = __builtin_shufflevector(a, b, (int(I) % 2 * n + int(I) / 2 + n / 2)...);
}

// t (columns x m, leading dimension ld) = transpose of a (m x columns, whole vectors); columns of t past m are zero.
template <class C>
inline void transpose(int m, int columns, Rows<const C> a, C* t, int ld) {
    constexpr int lanes = kLanes<C>;
    for (int i = 0; i < m; i += lanes)
        for (int j = 0; j < columns; j += lanes) {
            Vec<C> block[lanes], next[lanes];
            for (int r = 0; r < lanes; ++r) block[r] = i + r < m ? load(a.row(i + r) + j) : Vec<C>{};
            for (int half = 1; half < lanes; half *= 2) {  // a perfect shuffle of the rows, log2(lanes) times
                for (int r = 0; r < lanes / 2; ++r)
                    interleave(block[r], block[r + lanes / 2], &next[2 * r], &next[2 * r + 1],
                               std::make_index_sequence<lanes>());
                std::copy(next, next + lanes, block);
            }
            for (int r = 0; r < lanes; ++r) store(t + int64_t(j + r) * ld + i, block[r]);
        }
}

// ---- one head of one image -----------------------------------------------------------------------------------------

// Rows of storage, `n` channels each plus bias, through f into rows `ld` apart, zeros up to a whole vector.
template <class S, class C, class F>
inline void gather(int tokens, int n, const S* source, int64_t step, const C* bias, C* out, int ld, F f) {
    constexpr int lanes = kLanes<C>;
    for (int i = 0; i < tokens; ++i)
        for (int c = 0; c < n; c += lanes) {
            Vec<C> v = load_lanes<C>(source + i * step + c, n - c);
            if (bias) v += load_lanes<C>(bias + c, n - c);
            store(out + int64_t(i) * ld + c, f(v, int64_t(i) * ld + c));
        }
}

template <class C>
inline void softmax_rows(int rows, int n, C* scores, int ld, C weight) {
    constexpr int lanes = kLanes<C>;
    const int columns = round_up(n, lanes);
    for (int i = 0; i < rows; ++i) {
        C* row = scores + int64_t(i) * ld;
        std::fill(row + n, row + columns, row[0]);
        Vec<C> highest = load(row);
        for (int c = lanes; c < columns; c += lanes) highest = load(row + c) > highest ? load(row + c) : highest;
        const C top = largest_lane<C>(highest);
        for (int c = 0; c < columns; c += lanes) store(row + c, exp(load(row + c) - top));
        std::fill(row + n, row + columns, C(0));
        Vec<C> total = {};
        for (int c = 0; c < columns; c += lanes) total += load(row + c);
        const C inverse = weight / sum_lanes<C>(total);
        for (int c = 0; c < columns; c += lanes) store(row + c, load(row + c) * inverse);
    }
}

template <class S, class C>
struct AttentionHead {
    static constexpr int lanes = kLanes<C>;
    const AttentionShape& s;
    const std::vector<int>& tokens;  // of window_tokens
    int N, T, d, e, dp, tp, dl, tl, chunk, windows;
    C *query, *key, *turned, *probabilities;

    // Channels of a value that are worked on at a time: all tokens' should stay in the second-level cache.
    static int value_chunk(const AttentionShape& s) {
        const int fitting = int(256 * 1024 / (int64_t(s.tokens()) * sizeof(C))) / (4 * lanes) * (4 * lanes);
        return std::min(round_up(s.value_dim, lanes), std::max(fitting, 4 * lanes));
    }
    static size_t scratch_bytes(const AttentionShape& s, bool backward) {
        const size_t N = s.tokens(), dl = row_distance<C>(s.head_dim), tl = row_distance<C>(s.window());
        const size_t ld = row_distance<C>(value_chunk(s)), kinds = s.neighborhood + s.remote, copies = backward ? 4 : 2;
        const size_t count = copies * N * (dl + ld) + std::max(dl, ld) * tl + copies / 2 * kinds * N * tl;
        return count * sizeof(C) + 16 * kVectorBytes;
    }

    AttentionHead(const AttentionShape& shape, const std::vector<int>& window_tokens, Scratch& scratch, bool backward)
        : s(shape),
          tokens(window_tokens),
          N(s.tokens()),
          T(s.window()),
          d(s.head_dim),
          e(s.value_dim),
          dp(round_up(d, lanes)),
          tp(round_up(T, lanes)),
          dl(row_distance<C>(d)),
          tl(row_distance<C>(T)),
          chunk(value_chunk(s)),
          windows(int(tokens.size()) / T) {
        query = scratch.take<C>(size_t(N) * dl);
        key = scratch.take<C>(size_t(N) * dl);
        turned = scratch.take<C>(size_t(std::max(dl, row_distance<C>(chunk))) * tl);
        probabilities = scratch.take<C>(size_t(windows) * T * tl);
    }

    const int* window(int w) const { return tokens.data() + size_t(w) * T; }
    C* window_probabilities(int w) const { return probabilities + size_t(w) * T * tl; }

    // The probabilities of every window, from queries and keys; a window's are (T, T), times `weight`.
    void attend(const S* qkv, const C* bias, int head) {
        const C scale = C(1 / std::sqrt(double(d)));
        const S* base = qkv + int64_t(head) * d;
        const C* b = bias ? bias + int64_t(head) * d : nullptr;
        gather<S, C>(N, d, base, s.row(), b, query, dl, [&](Vec<C> v, int64_t) { return v * scale; });
        gather<S, C>(N, d, base + s.key_offset(), s.row(), b ? b + s.key_offset() : b, key, dl,
                     [](Vec<C> v, int64_t) { return v; });
        for (int w = 0; w < windows; ++w) {
            transpose<C>(T, dp, {key, dl, window(w)}, turned, tl);
            product<C, false>(T, tp, d, {query, dl, window(w)}, 1, {turned, tl}, {window_probabilities(w), tl});
            softmax_rows<C>(T, T, window_probabilities(w), tl, C(s.weight));
        }
    }

    // Calls finish(first channel, channels, rows of the result (N, leading dimension), leading dimension) for one
    // piece of a head's value channels after another.
    template <class F>
    void forward(const S* qkv, const C* bias, int head, Scratch& scratch, F finish) {
        attend(qkv, bias, head);
        const int ld = row_distance<C>(chunk);
        C* value = scratch.take<C>(size_t(N) * ld);
        C* sum = scratch.take<C>(size_t(N) * ld);
        const int64_t offset = s.value_offset() + int64_t(head) * e;
        for (int c = 0; c < e; c += chunk) {
            const int width = std::min(chunk, e - c), columns = round_up(width, lanes);
            gather<S, C>(N, width, qkv + offset + c, s.row(), bias ? bias + offset + c : nullptr, value, ld,
                         [](Vec<C> v, int64_t) { return gelu<C>(v); });
            for (int w = 0; w < windows; ++w)
                product<C>(w >= s.windows(), T, columns, T, {window_probabilities(w), tl}, 1, {value, ld, window(w)},
                           {sum, ld, window(w)});
            finish(head * e + c, width, sum, ld);
        }
    }

    // Gradients of queries, keys and values of one head into rows of grad_qkv; of the biases into grad_bias.
    void backward(const S* qkv, const C* bias, int head, const S* grad_out, int64_t step, S* grad_qkv, C* grad_bias,
                  Scratch& scratch) {
        attend(qkv, bias, head);
        C* grad_scores = scratch.take<C>(size_t(windows) * T * tl);
        value_gradients(qkv, bias, head, grad_out, step, grad_qkv, grad_bias, grad_scores, scratch);
        C* grad_query = scratch.take<C>(size_t(N) * dl);
        C* grad_key = scratch.take<C>(size_t(N) * dl);
        for (int w = 0; w < windows; ++w) {
            C *p = window_probabilities(w), *g = grad_scores + size_t(w) * T * tl;
            softmax_gradient(p, g);
            const bool add = w >= s.windows();
            product<C>(add, T, dp, T, {g, tl}, 1, {key, dl, window(w)}, {grad_query, dl, window(w)});
            product<C>(add, T, dp, T, {g, 1}, tl, {query, dl, window(w)}, {grad_key, dl, window(w)});
        }
        const C scale = C(1 / std::sqrt(double(d)));
        const int64_t offset = int64_t(head) * d;
        scatter(grad_query, dl, d, scale, grad_qkv + offset, grad_bias + offset);
        scatter(grad_key, dl, d, C(1), grad_qkv + s.key_offset() + offset, grad_bias + s.key_offset() + offset);
    }

    void value_gradients(const S* qkv, const C* bias, int head, const S* grad_out, int64_t step, S* grad_qkv,
                         C* grad_bias, C* grad_scores, Scratch scratch) {
        const int ld = row_distance<C>(chunk);
        C* value = scratch.take<C>(size_t(N) * ld);
        C* slope = scratch.take<C>(size_t(N) * ld);
        C* grad = scratch.take<C>(size_t(N) * ld);
        C* grad_value = scratch.take<C>(size_t(N) * ld);
        const int64_t offset = s.value_offset() + int64_t(head) * e;
        for (int c = 0; c < e; c += chunk) {
            const int width = std::min(chunk, e - c), columns = round_up(width, lanes);
            gather<S, C>(N, width, qkv + offset + c, s.row(), bias ? bias + offset + c : nullptr, value, ld,
                         [&](Vec<C> v, int64_t place) {
                             Vec<C> derivative;
                             v = gelu<C>(v, &derivative);
                             store(slope + place, derivative);
                             return v;
                         });
            gather<S, C>(N, width, grad_out + head * e + c, step, nullptr, grad, ld,
                         [](Vec<C> v, int64_t) { return v; });
            for (int w = 0; w < windows; ++w) {
                const int* rows = window(w);
                transpose<C>(T, columns, {value, ld, rows}, turned, tl);
                product<C>(c > 0, T, tp, columns, {grad, ld, rows}, 1, {turned, tl},
                           {grad_scores + size_t(w) * T * tl, tl});
                product<C>(w >= s.windows(), T, columns, T, {window_probabilities(w), 1}, tl, {grad, ld, rows},
                           {grad_value, ld, rows});
            }
            for (int i = 0; i < N; ++i)
                for (int64_t k = int64_t(i) * ld; k < int64_t(i) * ld + columns; k += lanes)
                    store(grad_value + k, load(grad_value + k) * load(slope + k));
            scatter(grad_value, ld, width, C(1), grad_qkv + offset + c, grad_bias + offset + c);
        }
    }

    // g = gradient of the scores, from g = gradient of the probabilities over `weight`: p (g - sum(p g) / weight).
    void softmax_gradient(const C* p, C* g) const {
        for (int64_t i = 0; i < int64_t(T) * tl; i += tl) {
            Vec<C> dot = {};
            for (int k = 0; k < tp; k += lanes) dot += load(p + i + k) * load(g + i + k);
            const C mean = sum_lanes<C>(dot) / C(s.weight);
            for (int k = 0; k < tp; k += lanes) store(g + i + k, load(p + i + k) * (load(g + i + k) - mean));
        }
    }

    // Rows of arithmetic, times scale, into rows of grad_qkv, and their sum into grad_bias.
    void scatter(const C* rows, int ld, int n, C scale, S* out, C* sums) const {
        for (int k = 0; k < n; k += lanes) {
            Vec<C> sum = {};
            for (int i = 0; i < N; ++i) {
                const Vec<C> v = load(rows + int64_t(i) * ld + k) * scale;
                store_lanes<C>(out + i * s.row() + k, v, n - k);
                sum += v;
            }
            store_lanes<C>(sums + k, sum, n - k);
        }
    }
};

template <class S, class C>
void attention_forward(const AttentionShape& s, const S* qkv, const C* bias, S* out, int threads) {
    const std::vector<int> tokens = window_tokens(s);
    const int64_t step = int64_t(s.heads) * s.value_dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t first = int64_t(unit / s.heads) * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(AttentionHead<S, C>::scratch_bytes(s, false));
        AttentionHead<S, C> head(s, tokens, scratch, false);
        head.forward(qkv + first * s.row(), bias, unit % s.heads, scratch, [&](int c, int n, const C* rows, int ld) {
            for (int i = 0; i < s.tokens(); ++i)
                for (int k = 0; k < n; k += kLanes<C>)
                    store_lanes<C>(out + (first + i) * step + c + k, load(rows + int64_t(i) * ld + k), n - k);
        });
    }
}

// grad_bias: (batch, row) partial sums, one row an image.
template <class S, class C>
void attention_backward(const AttentionShape& s, const S* qkv, const C* bias, const S* grad_out, S* grad_qkv,
                        C* grad_bias, int threads) {
    const std::vector<int> tokens = window_tokens(s);
    const int64_t step = int64_t(s.heads) * s.value_dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t image = unit / s.heads, first = image * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(AttentionHead<S, C>::scratch_bytes(s, true));
        AttentionHead<S, C> head(s, tokens, scratch, true);
        head.backward(qkv + first * s.row(), bias, unit % s.heads, grad_out + first * step, step,
                      grad_qkv + first * s.row(), grad_bias + image * s.row(), scratch);
    }
}

}  // namespace d_emo
