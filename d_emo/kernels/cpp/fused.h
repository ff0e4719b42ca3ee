// The block for inference. With given statistics the local branch needs only the channels that a head has just made, so
// they never leave the cache in between; nor do the projections, where the block's own products make them.
//
// What it gains: the rows "forward" in docs/speed.md.

#pragma once

#include "attention.h"
#include "linear.h"
#include "local.h"

namespace d_emo {

// One head of one image: attention, then the local branch, into its channels of `out` (N, channels).
template <class S, class C, int K, class Projections>
void attend_and_convolve(const AttentionShape& s, const LocalShape& local, const LocalParameters<C>& p,
                         const std::vector<int>& tokens, const Projections& projections, int head, Scratch& scratch,
                         S* out) {
    using Channels = LocalChannels<S, C, K>;
    Vec<C>* tile = scratch.take<Vec<C>>(Channels::tile_size(local));
    Vec<C>* convolved = scratch.take<Vec<C>>(s.tokens());
    std::fill_n(tile, Channels::tile_size(local), Vec<C>{});
    AttentionHead<S, C> attention(s, tokens, scratch);
    attention.forward(projections, head, scratch, [&](int c, int n, C* rows, int ld) {
        for (int k = 0; k < n; k += kLanes<C>)
            Channels(local, p, c + k, std::min(kLanes<C>, n - k)).infer(rows + k, ld, tile, convolved);
        store_rows(s.tokens(), n, rows, ld, out + c, local.channels);
    });
}

template <class S, class C, int K>
size_t head_bytes(const AttentionShape& s, const LocalShape& local) {
    return AttentionHead<S, C>::scratch_bytes(s, false) + LocalChannels<S, C, K>::scratch_bytes(local, 1, false);
}

// The projections of an image, made when they are asked for; `place` holds (N, ld) of them.
template <class S, class C>
struct OwnProjections {
    const AttentionShape& s;
    const Panels<S, C>& weight;
    Rows<const typename Panels<S, C>::Word> x;
    const C* bias;
    C* place;
    int64_t ld;

    template <class F>
    void each(int64_t channel, int n, F f) const {
        weight.multiply(s.tokens(), x, channel, n, place, ld);
        for (int i = 0; i < s.tokens(); ++i)
            for (int c = 0; c < n; c += kLanes<C>) {
                Vec<C> v = load(place + i * ld + c);
                if (bias) v += load_lanes<C>(bias + channel + c, n - c);
                f(i, c, v);
            }
    }
};

// x (batch, N, inputs) through expansion, attention, local branch and projection to out (batch, N, outputs).
template <class S, class C, int K>
void block_forward(const AttentionShape& s, const LocalShape& local, int outputs, const S* x, const S* expansion,
                   const C* bias, const LocalParameters<C>& p, const S* projection, S* out, int threads) {
    using Word = typename Panels<S, C>::Word;
    const std::vector<int> tokens = window_tokens(s);
    const int inputs = s.heads * s.head_dim, N = s.tokens(), channels = local.channels;
    Panels<S, C> expand(inputs, {2 * s.heads, s.heads}, {s.head_dim, s.value_dim}), project(channels, outputs);
    // A few images at a time: what lies between the two products stays in the cache, and several images share the
    // reading of the weights.
    const int group = std::min(s.batch, std::max(4, (4 * threads + s.heads - 1) / s.heads));
    AttentionShape images = s;
    images.batch = group;
    Scratch shared(expand.bytes() + project.bytes() + Scratch::piece_bytes<S>(size_t(group) * N * channels), 1);
    expand.take(shared);
    project.take(shared);
    S* expanded = shared.take<S>(size_t(group) * N * channels);
    const int ld = row_distance<C>(AttentionHead<S, C>::widest(s));
    const size_t left_size = left_count<S, C>(N, inputs);
    const size_t head_size = head_bytes<S, C, K>(s, local) + Scratch::piece_bytes<C>(size_t(N) * ld) +
                             Scratch::piece_bytes<Word>(left_size);
    const int block = project.row_block(int64_t(group) * N, threads);
#pragma omp parallel num_threads(threads)
    {
        const FlushDenormals flush;
        Scratch own(std::max(head_size, project.row_bytes()));
#pragma omp for schedule(dynamic)
        for (int panel = 0; panel < expand.count() + project.count(); ++panel)
            panel < expand.count() ? expand.pack(panel, expansion)
                                   : project.pack(panel - expand.count(), projection);
        for (int start = 0; start < s.batch; start += group) {
            const int count = std::min(group, s.batch - start);
#pragma omp for schedule(dynamic)
            for (int unit = 0; unit < count * s.heads; ++unit) {
                const int64_t image = unit % count;  // a head of all images in a row: its weights stay in the cache
                Scratch scratch = own;
                C* place = scratch.take<C>(size_t(N) * ld);
                const auto rows = left_words<S, C>(N, inputs, x + (start + image) * N * inputs,
                                                   scratch.take<Word>(left_size));
                const OwnProjections<S, C> projections{s, expand, rows, bias, place, ld};
                attend_and_convolve<S, C, K>(images, local, p, tokens, projections, unit / count, scratch,
                                                  expanded + image * N * channels);
            }
#pragma omp for schedule(dynamic)
            for (int row = 0; row < count * N; row += block)
                project.multiply_rows(std::min(block, count * N - row), expanded + int64_t(row) * channels, nullptr,
                                      out + (int64_t(start) * N + row) * outputs, own);
        }
    }
}

}  // namespace d_emo
