// Attention and local branch in one pass, for inference: with given statistics the branch needs only the channels that
// a head has just made, so they never leave the cache in between.

#pragma once

#include "attention.h"
#include "local.h"

namespace d_emo {

template <class S, class C, int K>
void fused_forward(const AttentionShape& s, const LocalShape& local, const S* qkv, const C* bias,
                   const LocalParameters<C>& p, S* out, int threads) {
    using Channels = LocalChannels<S, C, K>;
    const std::vector<int> tokens = window_tokens(s);
    const int64_t step = local.channels;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t first = int64_t(unit / s.heads) * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(AttentionHead<S, C>::scratch_bytes(s, false) + Channels::scratch_bytes(local, false));
        Vec<C>* tile = scratch.take<Vec<C>>(Channels::tile_size(local));
        Vec<C>* convolved = scratch.take<Vec<C>>(s.tokens());
        std::fill_n(tile, Channels::tile_size(local), Vec<C>{});
        const StoredProjections<S, C> projections{s, qkv + first * s.row(), bias};
        AttentionHead<S, C> head(s, tokens, scratch);
        head.forward(projections, unit % s.heads, scratch, [&](int c, int n, const C* rows, int ld) {
            for (int k = 0; k < n; k += kLanes<C>) {
                const Channels channels(local, p, c + k, n - k);
                const int lanes = channels.n;
                channels.infer(rows + k, ld, out + first * step + c + k, step, load_lanes<C>(p.mean + c + k, lanes),
                               load_lanes<C>(p.variance + c + k, lanes), tile, convolved);
            }
        });
    }
}

}  // namespace d_emo
