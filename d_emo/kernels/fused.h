// The block for inference. With given statistics the local branch needs only the channels that a head has just made, so
// they never leave the cache in between; nor do the projections, where the block's own products make them.

#pragma once

#include "attention.h"
#include "local.h"

namespace d_emo {

// One head of one image: attention, then the local branch, into its channels of `out` (N, channels).
template <class S, class C, int K, class Projections>
void attend_and_convolve_head(const AttentionShape& s, const LocalShape& local, const LocalParameters<C>& p,
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
        store_rows(s, rows, ld, n, out + c);
    });
}

template <class S, class C, int K>
size_t head_bytes(const AttentionShape& s, const LocalShape& local) {
    return AttentionHead<S, C>::scratch_bytes(s, false) + LocalChannels<S, C, K>::scratch_bytes(local, 1, false);
}

template <class S, class C, int K>
void fused_forward(const AttentionShape& s, const LocalShape& local, const S* qkv, const C* bias,
                   const LocalParameters<C>& p, S* out, int threads) {
    const std::vector<int> tokens = window_tokens(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t first = int64_t(unit / s.heads) * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(head_bytes<S, C, K>(s, local));
        const StoredProjections<S, C> projections{s, qkv + first * s.row(), bias};
        attend_and_convolve_head<S, C, K>(s, local, p, tokens, projections, unit % s.heads, scratch,
                                          out + first * local.channels);
        finish_streaming();
    }
}

// ---- with products of its own --------------------------------------------------------------------------------------

struct BlockShape {
    int32_t outputs;  // channels of the result
};

// A linear layer's weight (outputs x inputs), turned into panels of kWide<C> outputs that products read in order. No
// panel holds outputs of two heads: they come as counts[i] groups of sizes[i], one kind after the other.
template <class S, class C>
struct Panels {
    using P = typename ProductsOf<S, C>::type;
    using Word = typename P::Word;
    const S* weight;
    int inputs, counts[2], sizes[2];
    Word* packed = nullptr;

    int depth() const { return P::words(inputs); }
    int64_t panel_size() const { return int64_t(round_up(depth(), kLanes<Word>)) * kWide<C>; }
    int pieces(int kind) const { return (sizes[kind] + kWide<C> - 1) / kWide<C>; }
    int count() const { return counts[0] * pieces(0) + counts[1] * pieces(1); }
    size_t bytes() const { return Scratch::piece_bytes<Word>(count() * panel_size()); }

    const Word* panel_from(int64_t output) const {
        const int kind = output >= int64_t(counts[0]) * sizes[0];
        const int64_t place = kind ? output - int64_t(counts[0]) * sizes[0] : output;
        const int64_t panel = place / sizes[kind] * pieces(kind) + place % sizes[kind] / kWide<C>;
        return packed + (kind ? counts[0] * pieces(0) + panel : panel) * panel_size();
    }
    void pack(int panel) const {
        const int kind = panel >= counts[0] * pieces(0), number = kind ? panel - counts[0] * pieces(0) : panel;
        const int piece = number % pieces(kind) * kWide<C>;
        const int64_t output = int64_t(kind) * counts[0] * sizes[0] + int64_t(number / pieces(kind)) * sizes[kind] + piece;
        const Word* rows = reinterpret_cast<const Word*>(weight + output * inputs);
        transpose<Word>(std::min(kWide<C>, sizes[kind] - piece), depth(), {rows, depth()}, packed + panel * panel_size(),
                        kWide<C>);
    }
    // out (rows x n, `ld` apart) = x (rows x inputs) times n outputs of one group, from the start of a panel on.
    void multiply(int rows, const S* x, int64_t output, int n, C* out, int64_t ld) const {
        constexpr int block = 64;  // words of depth: a block of a panel stays in the first-level cache
        const Word* words = reinterpret_cast<const Word*>(x);
        for (int c = 0; c < n; c += kWide<C>) {
            const Word* panel = panel_from(output + c);
            const int columns = round_up(std::min(kWide<C>, n - c), kLanes<C>);
            for (int k = 0; k < depth(); k += block)
                product<Word, C>(k > 0, rows, columns, std::min(block, depth() - k), {words + k, depth()}, 1,
                                 {panel + k * kWide<C>, kWide<C>}, {out + c, ld});
        }
    }
};

// The projections of an image, made when they are asked for; `place` holds (N, ld) of them.
template <class S, class C>
struct OwnProjections {
    const AttentionShape& s;
    const Panels<S, C>& weight;
    const S* x;
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
    constexpr int row_block = 64;
    const std::vector<int> tokens = window_tokens(s);
    const int inputs = s.heads * s.head_dim, N = s.tokens(), channels = local.channels;
    Panels<S, C> expand{expansion, inputs, {2 * s.heads, s.heads}, {s.head_dim, s.value_dim}};
    Panels<S, C> project{projection, channels, {1, 0}, {outputs, 1}};
    // A few images at a time, so that what lies between the two products stays in the cache.
    const int group = std::min(s.batch, (4 * threads + s.heads - 1) / s.heads);
    AttentionShape images = s;
    images.batch = group;
    Scratch shared(expand.bytes() + project.bytes() + Scratch::piece_bytes<S>(size_t(group) * N * channels), 1);
    expand.packed = shared.take<typename Panels<S, C>::Word>(expand.count() * expand.panel_size());
    project.packed = shared.take<typename Panels<S, C>::Word>(project.count() * project.panel_size());
    S* expanded = shared.take<S>(size_t(group) * N * channels);
    const int ld = row_distance<C>(AttentionHead<S, C>::widest(s)), out_ld = row_distance<C>(outputs);
    const size_t place_size = std::max(size_t(N) * ld, size_t(row_block) * out_ld);
    const bool past_cache = streams<S>(int64_t(s.batch) * N, outputs);
#pragma omp parallel num_threads(threads)
    {
        const FlushDenormals flush;
        Scratch own(head_bytes<S, C, K>(s, local) + Scratch::piece_bytes<C>(place_size));
        C* place = own.take<C>(place_size);
#pragma omp for schedule(dynamic)
        for (int panel = 0; panel < expand.count() + project.count(); ++panel)
            panel < expand.count() ? expand.pack(panel) : project.pack(panel - expand.count());
        for (int start = 0; start < s.batch; start += group) {
            const int count = std::min(group, s.batch - start);
#pragma omp for schedule(dynamic)
            for (int unit = 0; unit < count * s.heads; ++unit) {
                const int64_t image = unit / s.heads;
                const S* pixels = x + (start + image) * N * inputs;
                const OwnProjections<S, C> projections{s, expand, pixels, bias, place, ld};
                Scratch scratch = own;
                attend_and_convolve_head<S, C, K>(images, local, p, tokens, projections, unit % s.heads, scratch,
                                                  expanded + image * N * channels);
            }
#pragma omp for schedule(dynamic)
            for (int row = 0; row < count * N; row += row_block) {
                const int rows = std::min(row_block, count * N - row);
                project.multiply(rows, expanded + int64_t(row) * channels, 0, outputs, place, out_ld);
                S* target = out + (int64_t(start) * N + row) * outputs;
                for (int i = 0; i < rows; ++i)
                    for (int k = 0; k < outputs; k += kLanes<C>)
                        store_result<C>(target + int64_t(i) * outputs + k, load(place + int64_t(i) * out_ld + k), outputs - k,
                                        past_cache);
            }
        }
        finish_streaming();
    }
}

// Whether `block_forward` is worth it: measured with AVX-512 only, and no match for AMX's products of bfloat16.
template <class S>
constexpr bool multiplies() {
#if defined(__AMX_BF16__) || !defined(__AVX512BF16__)
    if (std::is_same<S, bfloat16>::value) return false;
#endif
    return kVectorBytes == 64 && !std::is_same<S, double>::value;
}

}  // namespace d_emo
