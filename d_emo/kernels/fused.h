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
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int unit = 0; unit < s.batch * s.heads; ++unit) {
        const int64_t first = int64_t(unit / s.heads) * s.tokens();
        const FlushDenormals flush;
        Scratch scratch(AttentionHead<S, C>::scratch_bytes(s, false) + Channels::scratch_bytes(local, 1, false));
        Vec<C>* tile = scratch.take<Vec<C>>(Channels::tile_size(local));
        Vec<C>* convolved = scratch.take<Vec<C>>(s.tokens());
        std::fill_n(tile, Channels::tile_size(local), Vec<C>{});
        const StoredProjections<S, C> projections{s, qkv + first * s.row(), bias};
        AttentionHead<S, C> head(s, tokens, scratch);
        head.forward(projections, unit % s.heads, scratch, [&](int c, int n, C* rows, int ld) {
            for (int k = 0; k < n; k += kLanes<C>)
                Channels(local, p, c + k, std::min(kLanes<C>, n - k)).infer(rows + k, ld, tile, convolved);
            store_rows(s, rows, ld, n, out + first * local.channels + c);
        });
        finish_streaming();
    }
}

}  // namespace d_emo
