// Spanning window attention on the CPU: GELU of the values, softmax(q k^T) v in the neighborhood and the remote windows
// of one set of projections, the sum of both. Nothing is permuted in memory: a window is a list of token numbers.
//
// The unit of work is one head of one image. Shapes: N tokens, T tokens in a window, d channels of a query or key,
// e of a value; dp and tp are d and T in whole vectors; names that end in `l` are distances between rows. Probabilities
// are computed again in the backward pass.
//
// What it gains: the rows "@reference" in docs/speed.md, which are without all kernels.

#pragma once

#include "products.h"

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

// Token numbers of every window, one kind after the other.
inline std::vector<int> window_tokens(const AttentionShape& s) {
    const int rows = s.height / s.window_height, columns = s.width / s.window_width;
    std::vector<int> tokens;
    tokens.reserve(2 * s.tokens());
    for (const bool remote : {false, true}) {
        if (!(remote ? s.remote : s.neighborhood)) continue;
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < columns; ++j)
                for (int y = 0; y < s.window_height; ++y)
                    for (int x = 0; x < s.window_width; ++x)
                        tokens.push_back(remote ? (y * rows + i) * s.width + x * columns + j
                                                : (i * s.window_height + y) * s.width + j * s.window_width + x);
    }
    return tokens;
}

// ---- one head of one image -----------------------------------------------------------------------------------------

// Calls f(row, column, vector) for n numbers of every row of a tensor, `step` apart; lanes past the last are zero.
template <class C, class S, class F>
inline void each_vector(int rows, const S* x, int64_t step, int n, F f) {
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < n; c += kLanes<C>) {
            const S* place = x + i * step + c;
            __builtin_prefetch(place + kAhead * step);
            f(i, c, load_lanes<C>(place, n - c));
        }
}

// The projections of an image as they are stored.
template <class S, class C>
struct StoredProjections {
    const AttentionShape& s;
    const S* qkv;

    // Calls f(token, column, vector) for n channels from `channel` on, all of one head and kind; lanes past the last
    // are zero.
    template <class F>
    void each(int64_t channel, int n, F f) const {
        each_vector<C>(s.tokens(), qkv + channel, s.row(), n, f);
    }
};

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
    using P = typename ProductsOf<S, C>::type;
    using Word = typename P::Word;
    static constexpr int lanes = kLanes<C>;
    const AttentionShape& s;
    const std::vector<int>& tokens;  // of window_tokens
    int N, T, d, e, dp, tp, dl, tl, chunk, valuel, suml, zipl, windows;
    Word *query, *key, *turned, *zipped;
    C* probabilities;

    // Channels of a value that are worked on at a time: all tokens' should stay in the second-level cache.
    static int value_chunk(const AttentionShape& s) {
        const int fitting = int(128 * 1024 / (int64_t(s.tokens()) * sizeof(C))) / kWide<C> * kWide<C>;
        return std::min(round_up(s.value_dim, lanes), std::max(fitting, kWide<C>));
    }
    static int widest(const AttentionShape& s) { return std::max(int(s.head_dim), value_chunk(s)); }
    static size_t scratch_bytes(const AttentionShape& s, bool backward) {
        const size_t N = s.tokens(), kinds = s.neighborhood + s.remote, copies = backward ? 2 : 1;
        const size_t dl = row_distance<C>(s.head_dim), tl = row_distance<C>(s.window());
        const size_t chunkl = row_distance<C>(value_chunk(s)), widestl = row_distance<C>(widest(s));
        const size_t operands = 2 * copies * N * (dl + chunkl) + copies * kinds * N * tl;
        const size_t turned_and_zipped = (widestl + lanes + 1) * tl + (s.window() + 1) * (widestl + tl);
        return (operands + turned_and_zipped) * sizeof(C) + 16 * kVectorBytes;
    }

    AttentionHead(const AttentionShape& shape, const std::vector<int>& window_tokens, Scratch& scratch)
        : s(shape),
          tokens(window_tokens),
          N(s.tokens()),
          T(s.window()),
          d(s.head_dim),
          e(s.value_dim),
          dp(round_up(d, lanes)),
          tp(round_up(T, lanes)),
          dl(row_distance<Word>(P::words(d))),
          tl(row_distance<C>(T)),
          chunk(value_chunk(s)),
          valuel(row_distance<Word>(P::words(chunk))),
          suml(row_distance<C>(chunk)),
          zipl(row_distance<Word>(widest(s))),
          windows(int(tokens.size()) / T) {
        query = scratch.take<Word>(size_t(N) * dl);
        key = scratch.take<Word>(size_t(N) * dl);
        turned = scratch.take<Word>(size_t(round_up(P::words(widest(s)), lanes)) * tl);
        zipped = scratch.take<Word>(size_t(P::words(T)) * zipl);
        probabilities = scratch.take<C>(size_t(windows) * T * tl);
    }

    const int* window(int w) const { return tokens.data() + size_t(w) * T; }
    C* window_scores(C* scores, int w) const { return scores + size_t(w) * T * tl; }
    // Whether a window's results come on top of another one's, a neighborhood window's.
    bool adds(int w) const { return w >= s.windows(); }
    // Sums of a product (T x T) as words on the left of another one.
    static Rows<const Word> narrowed(const C* sums, int ld) { return {reinterpret_cast<const Word*>(sums), ld}; }

    // The probabilities of every window, from queries and keys; a window's are (T, T), times `weight`.
    template <class Projections>
    void attend(const Projections& projections, int head) {
        const C scale = C(1 / std::sqrt(double(d)));
        const int64_t first = int64_t(head) * d;
        projections.each(first, d, [&](int i, int c, Vec<C> v) { P::put(query + int64_t(i) * dl, c, v * scale); });
        projections.each(s.key_offset() + first, d,
                         [&](int i, int c, Vec<C> v) { P::put(key + int64_t(i) * dl, c, v); });
        for (int w = 0; w < windows; ++w) {
            C* scores = window_scores(probabilities, w);
            transpose<Word>(T, P::words(d), {key, dl, window(w)}, turned, tl);
            product<Word, C, false>(T, tp, P::words(d), Rows<const Word>{query, dl, window(w)}, {turned, tl},
                                    {scores, tl});
            softmax_rows<C>(T, T, scores, tl, C(s.weight));
        }
    }

    // Calls finish(first channel, channels, rows of the result (N, leading dimension), leading dimension) for one
    // piece of a head's value channels after another.
    template <class Projections, class F>
    void forward(const Projections& projections, int head, Scratch& scratch, F finish) {
        attend(projections, head);
        for (int w = 0; w < windows; ++w) P::narrow(T, tp, window_scores(probabilities, w), tl);
        Word* value = scratch.take<Word>(size_t(N) * valuel);
        C* sum = scratch.take<C>(size_t(N) * suml);
        for (int c = 0; c < e; c += chunk) {
            const int width = std::min(chunk, e - c), columns = round_up(width, lanes), first = head * e + c;
            projections.each(s.value_offset() + first, width,
                             [&](int i, int k, Vec<C> v) { P::put(value + int64_t(i) * valuel, k, gelu(v)); });
            for (int w = 0; w < windows; ++w) {
                const auto right = P::zip(T, columns, {value, valuel, window(w)}, zipped, zipl);
                product<Word, C>(adds(w), T, columns, P::words(T), narrowed(window_scores(probabilities, w), tl), right,
                                 {sum, suml, window(w)});
            }
            finish(first, width, sum, suml);
        }
    }

    // Gradients of queries, keys and values of one head into rows of grad_qkv.
    void backward(const StoredProjections<S, C>& projections, int head, const S* grad_out, S* grad_qkv,
                  Scratch& scratch) {
        attend(projections, head);
        C* grad_scores = scratch.take<C>(size_t(windows) * T * tl);
        Word* zipped_scores = scratch.take<Word>(size_t(P::words(T)) * tl);
        value_gradients(projections, head, grad_out, grad_qkv, grad_scores, zipped_scores, scratch);
        const int gradl = row_distance<C>(d);
        C* grad_query = scratch.take<C>(size_t(N) * gradl);
        C* grad_key = scratch.take<C>(size_t(N) * gradl);
        for (int w = 0; w < windows; ++w) {
            const int* rows = window(w);
            C* scores = window_scores(grad_scores, w);
            softmax_gradient(window_scores(probabilities, w), scores);
            auto right = P::zip(T, dp, {query, dl, rows}, zipped, zipl);
            const auto left = P::zip_sums(T, tp, {scores, tl}, zipped_scores, tl);
            product<Word, C>(adds(w), T, dp, P::words(T), Columns<const Word>{left.p, left.ld}, right,
                             {grad_key, gradl, rows});
            right = P::zip(T, dp, {key, dl, rows}, zipped, zipl);
            P::narrow(T, tp, scores, tl);
            product<Word, C>(adds(w), T, dp, P::words(T), narrowed(scores, tl), right, {grad_query, gradl, rows});
        }
        const C scale = C(1 / std::sqrt(double(d)));
        const int64_t offset = int64_t(head) * d;
        for (int64_t k = 0; k < int64_t(N) * gradl; k += lanes) store(grad_query + k, load(grad_query + k) * scale);
        store_rows(N, d, grad_query, gradl, grad_qkv + offset, s.row());
        store_rows(N, d, grad_key, gradl, grad_qkv + s.key_offset() + offset, s.row());
    }

    void value_gradients(const StoredProjections<S, C>& projections, int head, const S* grad_out, S* grad_qkv,
                         C* grad_scores, Word* zipped_scores, Scratch scratch) {
        Word* value = scratch.take<Word>(size_t(N) * valuel);
        Word* grad = scratch.take<Word>(size_t(N) * valuel);
        C* slope = scratch.take<C>(size_t(N) * suml);
        C* grad_value = scratch.take<C>(size_t(N) * suml);
        const int64_t step = int64_t(s.heads) * e;
        for (int c = 0; c < e; c += chunk) {
            const int width = std::min(chunk, e - c), columns = round_up(width, lanes);
            const int64_t channel = int64_t(head) * e + c, at = s.value_offset() + channel;
            projections.each(at, width, [&](int i, int k, Vec<C> v) {
                Vec<C> derivative;
                P::put(value + int64_t(i) * valuel, k, gelu(v, &derivative));
                store(slope + int64_t(i) * suml + k, derivative);
            });
            each_vector<C>(N, grad_out + channel, step, width,
                           [&](int i, int k, Vec<C> v) { P::put(grad + int64_t(i) * valuel, k, v); });
            for (int w = 0; w < windows; ++w) {
                const int* rows = window(w);
                transpose<Word>(T, P::words(columns), {value, valuel, rows}, turned, tl);
                product<Word, C>(c > 0, T, tp, P::words(columns), Rows<const Word>{grad, valuel, rows}, {turned, tl},
                                 {window_scores(grad_scores, w), tl});
                const auto right = P::zip(T, columns, {grad, valuel, rows}, zipped, zipl);
                const auto left = P::zip_sums(T, tp, {window_scores(probabilities, w), tl}, zipped_scores, tl);
                product<Word, C>(adds(w), T, columns, P::words(T), Columns<const Word>{left.p, left.ld}, right,
                                 {grad_value, suml, rows});
            }
            for (int i = 0; i < N; ++i)
                for (int64_t k = int64_t(i) * suml; k < int64_t(i) * suml + columns; k += lanes)
                    store(grad_value + k, load(grad_value + k) * load(slope + k));
            store_rows(N, width, grad_value, suml, grad_qkv + at, s.row());
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
};

template <class S, class C>
void attention_forward(const AttentionShape& s, const S* qkv, S* out, int threads) {
    const std::vector<int> tokens = window_tokens(s);
    const int64_t step = int64_t(s.heads) * s.value_dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t first = int64_t(unit / s.heads) * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(AttentionHead<S, C>::scratch_bytes(s, false));
        const StoredProjections<S, C> projections{s, qkv + first * s.row()};
        AttentionHead<S, C> head(s, tokens, scratch);
        head.forward(projections, unit % s.heads, scratch, [&](int c, int n, const C* rows, int ld) {
            store_rows(s.tokens(), n, rows, ld, out + first * step + c, step);
        });
    }
}

template <class S, class C>
void attention_backward(const AttentionShape& s, const S* qkv, const S* grad_out, S* grad_qkv, int threads) {
    const std::vector<int> tokens = window_tokens(s);
    const int64_t step = int64_t(s.heads) * s.value_dim;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t first = int64_t(unit / s.heads) * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(AttentionHead<S, C>::scratch_bytes(s, true));
        const StoredProjections<S, C> projections{s, qkv + first * s.row()};
        AttentionHead<S, C> head(s, tokens, scratch);
        head.backward(projections, unit % s.heads, grad_out + first * step, grad_qkv + first * s.row(), scratch);
    }
}

}  // namespace d_emo
