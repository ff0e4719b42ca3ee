// The block's local branch on the CPU: x + SiLU(BatchNorm(depthwise convolution of x)), channels last, and its
// gradient.
//
// The unit of work is a few vectors of channels over the whole batch, so statistics and weight gradients need no sum
// over threads. An image's pixels are gathered into zero-bordered tiles, one a vector of channels, and the convolution
// is products of whole vectors. It is computed again in the backward pass; nothing but x is kept. A pass reads a tensor
// once: pixels lie some power of two apart, or nearly, so that few places of a cache are theirs.
//
// What it gains: the rows "@reference" in docs/speed.md, which are without all kernels.

#pragma once

#include "vectors.h"

namespace d_emo {

struct LocalShape {
    int32_t batch, height, width, channels, kernel;
    int32_t batch_statistics;  // normalise with the batch's own mean and variance
    double eps;

    int tokens() const { return height * width; }
};

// Per channel: convolution weight (kernel * kernel, channels) and BatchNorm's affine parameters and statistics. `mean`
// and `variance` are read, or, in a forward pass with batch statistics, written.
template <class C>
struct LocalParameters {
    const C *weight, *gamma, *beta;
    C *mean, *variance;
};

template <class S, class C, int K>
struct LocalChannels {
    static constexpr int lanes = kLanes<C>, border = K / 2, most_vectors = 256 / kVectorBytes;
    using V = Vec<C>;
    const LocalShape& s;
    const LocalParameters<C>& p;
    const int first, n, vectors;  // channels first .. first + n - 1
    const int N, tile_width;

    LocalChannels(const LocalShape& shape, const LocalParameters<C>& parameters, int channel, int most)
        : s(shape),
          p(parameters),
          first(channel),
          n(std::min(most, shape.channels - channel)),
          vectors(round_up(n, lanes) / lanes),
          N(shape.tokens()),
          tile_width(shape.width + 2 * border) {}

    static size_t tile_size(const LocalShape& s) { return size_t(s.height + 2 * border) * (s.width + 2 * border); }
    static size_t scratch_bytes(const LocalShape& s, int vectors, bool backward) {
        const size_t images = backward || s.batch_statistics ? s.batch : 1;
        const size_t kept = vectors * images * (tile_size(s) + (backward ? 3 : 1) * s.tokens());
        return (kept + (backward ? tile_size(s) : 0) + 4) * sizeof(V);
    }

    // ---- one vector of channels ----

    int64_t channel(int v) const { return first + int64_t(v) * lanes; }
    V of_channels(const C* parameter, int v) const { return load_lanes<C>(parameter + channel(v), n - v * lanes); }
    void set_of_channels(C* parameter, int v, V value) const {
        store_lanes<C>(parameter + channel(v), value, n - v * lanes);
    }
    struct Taps {
        V at[K * K];
    };
    Taps taps(int v) const {
        Taps taps;
        for (int t = 0; t < K * K; ++t) taps.at[t] = of_channels(p.weight + int64_t(t) * s.channels, v);
        return taps;
    }

    template <int R>
    void convolve_pixels(const V* corner, const V* w, V* out) const {
        V sum[R] = {};
        for (int dy = 0; dy < K; ++dy) {
            const V* row = corner + dy * tile_width;
#pragma GCC unroll 9
            for (int dx = 0; dx < K; ++dx)
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) sum[i] += w[dy * K + dx] * row[dx + i];
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) out[i] = sum[i];
    }

    // out (N) = the tile under the taps w.
    void convolve(const V* tile, const Taps& w, V* out) const {
        for (int r = 0; r < s.height; ++r) {
            int c = 0;
            for (; c + 8 <= s.width; c += 8) convolve_pixels<8>(tile + r * tile_width + c, w.at, out + r * s.width + c);
            for (; c + 2 <= s.width; c += 2) convolve_pixels<2>(tile + r * tile_width + c, w.at, out + r * s.width + c);
            for (; c < s.width; ++c) convolve_pixels<1>(tile + r * tile_width + c, w.at, out + r * s.width + c);
        }
    }

    // total += sum over pixels of grad * tile, for every tap: R pixels at a time for G rows of taps, whose sums stay in
    // registers.
    void add_weight_gradient(const V* tile, const V* grad_tile, V* total) const {
        constexpr int G = kVectorBytes == 64 ? 3 : K <= 5 ? 2 : 1, R = kVectorBytes == 64 ? 4 : 2;
        int dy = 0;
        for (; dy + G <= K; dy += G) add_tap_rows<G, R>(tile + dy * tile_width, grad_tile, total + dy * K);
        if constexpr (K % G) add_tap_rows<K % G, R>(tile + dy * tile_width, grad_tile, total + dy * K);
    }
    template <int G, int R>
    void add_tap_rows(const V* tile, const V* grad_tile, V* total) const {
        V sum[G][K] = {};
        for (int r = 0; r < s.height; ++r) {
            const V *corner = tile + r * tile_width, *grad = grad_tile + (r + border) * tile_width + border;
            int c = 0;
            for (; c + R <= s.width; c += R) add_pixels<G, R>(corner + c, grad + c, sum);
            for (; c < s.width; ++c) add_pixels<G, 1>(corner + c, grad + c, sum);
        }
        for (int g = 0; g < G; ++g)
            for (int dx = 0; dx < K; ++dx) total[g * K + dx] += sum[g][dx];
    }
    template <int G, int R>
    void add_pixels(const V* corner, const V* grad, V (&sum)[G][K]) const {
        V grads[R];
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) grads[i] = grad[i];
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
            for (int c = 0; c < R + K - 1; ++c) {
                const V x = corner[g * tile_width + c];
#pragma GCC unroll 9
                for (int dx = 0; dx < K; ++dx)
                    if (c - dx >= 0 && c - dx < R) sum[g][dx] += grads[c - dx] * x;
            }
    }

    V inverse_deviation(V variance) const {
        return by_lane<C>(variance + C(s.eps), [](C v) { return C(1) / std::sqrt(v); });
    }
    // BatchNorm with these statistics, as a factor and a summand.
    std::pair<V, V> normalisation(int v, V mean, V variance) const {
        const V scale = of_channels(p.gamma, v) * inverse_deviation(variance);
        return {scale, of_channels(p.beta, v) - mean * scale};
    }
    static V with_branch(V x, V normed) { return x + normed * sigmoid<C>(normed); }

    // ---- tensors and what is gathered of them: all vectors of a pixel at once, since pixels lie far apart ----

    V* tile_of(V* tiles, int v) const { return tiles + v * tile_size(s); }
    // Calls f(pixel number, place in a tile).
    template <class F>
    void each_pixel(F f) const {
        for (int r = 0, i = 0; r < s.height; ++r)
            for (int c = 0; c < s.width; ++c, ++i) f(i, (r + border) * tile_width + border + c);
    }

    // Calls f(pixel number, place in a tile, vector, value) for pixels `step` elements apart: too far for the processor
    // to fetch the next unasked.
    template <class X, class F>
    void each_value(const X* x, int64_t step, F f) const {
        constexpr int line = std::max<int>(1, 64 / (lanes * sizeof(X)));  // vectors that a cache line holds
        each_pixel([&](int i, int place) {
            for (int v = 0; v < vectors; v += line) __builtin_prefetch(x + (i + 16) * step + v * lanes);
            for (int v = 0; v < vectors; ++v)
                f(i, place, v, load_lanes<C>(x + i * step + v * lanes, n - v * lanes));
        });
    }
    // The insides of the tiles.
    template <class X>
    void load_tiles(const X* x, int64_t step, V* tiles) const {
        each_value(x, step, [&](int, int place, int v, V value) { tile_of(tiles, v)[place] = value; });
    }
    const S* image(const S* x, int b) const { return x + int64_t(b) * N * s.channels + first; }
    // Those from image b; or its pixels side by side, (vectors, N).
    void load_image(const S* x, int b, V* tiles) const { load_tiles(image(x, b), s.channels, tiles); }
    void load_pixels(const S* x, int b, V* pixels) const {
        each_value(image(x, b), s.channels, [&](int i, int, int v, V value) { pixels[v * N + i] = value; });
    }
    // Image b of out, from (vectors, N).
    void store_pixels(const V* pixels, S* out, int b) const {
        S* place = out + int64_t(b) * N * s.channels + first;
        for (int i = 0; i < N; ++i)
            for (int v = 0; v < vectors; ++v)
                store_lanes<C>(place + int64_t(i) * s.channels + v * lanes, pixels[v * N + i], n - v * lanes);
    }

    // ---- the operation ----

    // One image, in place: pixels `step` apart of an array of the arithmetic type. `weight` and `beta` are the
    // convolution and the normalisation after it.
    void infer(C* x, int64_t step, V* tiles, V* local) const {
        load_tiles(x, step, tiles);
        for (int v = 0; v < vectors; ++v) {
            const V *tile = tile_of(tiles, v), summand = of_channels(p.beta, v);
            convolve(tile, taps(v), local);
            each_pixel([&](int i, int place) {
                store_lanes<C>(x + i * step + v * lanes, with_branch(tile[place], local[i] + summand), n - v * lanes);
            });
        }
    }

    void forward(const S* x, S* out, Scratch& scratch) const {
        const size_t tiles_size = vectors * tile_size(s), pixels_size = size_t(vectors) * N;
        const int images = s.batch_statistics ? s.batch : 1;
        V* all_tiles = scratch.take<V>(images * tiles_size);
        V* all_local = scratch.take<V>(images * pixels_size);
        std::fill_n(all_tiles, images * tiles_size, V{});
        std::pair<V, V> norm[most_vectors];
        const auto finish = [&](int b, const V* tiles, V* local) {
            for (int v = 0; v < vectors; ++v) {
                const V *tile = tiles + v * tile_size(s), factor = norm[v].first, summand = norm[v].second;
                V* pixels = local + v * N;
                each_pixel([&](int i, int place) {
                    pixels[i] = with_branch(tile[place], pixels[i] * factor + summand);
                });
            }
            store_pixels(local, out, b);
        };
        if (!s.batch_statistics) {
            for (int v = 0; v < vectors; ++v)
                norm[v] = normalisation(v, of_channels(p.mean, v), of_channels(p.variance, v));
            for (int b = 0; b < s.batch; ++b) {
                load_image(x, b, all_tiles);
                for (int v = 0; v < vectors; ++v) convolve(tile_of(all_tiles, v), taps(v), all_local + v * N);
                finish(b, all_tiles, all_local);
            }
            return;
        }
        V mean[most_vectors] = {}, squares[most_vectors] = {};
        for (int b = 0; b < s.batch; ++b) {
            V* tiles = all_tiles + b * tiles_size;
            load_image(x, b, tiles);
            for (int v = 0; v < vectors; ++v) {
                V* local = all_local + b * pixels_size + v * N;
                convolve(tile_of(tiles, v), taps(v), local);
                V image_mean = {}, image_squares = {};
                for (int i = 0; i < N; ++i) image_mean += local[i];
                image_mean /= C(N);
                for (int i = 0; i < N; ++i) image_squares += (local[i] - image_mean) * (local[i] - image_mean);
                const V step = image_mean - mean[v];  // images joined after Chan, Golub and LeVeque (1979)
                mean[v] += step / C(b + 1);
                squares[v] += image_squares + step * step * (C(N) * b / C(b + 1));
            }
        }
        for (int v = 0; v < vectors; ++v) {
            const V variance = squares[v] / (C(s.batch) * N);
            set_of_channels(p.mean, v, mean[v]);
            set_of_channels(p.variance, v, variance);
            norm[v] = normalisation(v, mean[v], variance);
        }
        for (int b = 0; b < s.batch; ++b) finish(b, all_tiles + b * tiles_size, all_local + b * pixels_size);
    }

    // grad_weight, grad_gamma and grad_beta are laid out as the parameters.
    void backward(const S* x, const S* grad_out, S* grad_x, C* grad_weight, C* grad_gamma, C* grad_beta,
                  Scratch& scratch) const {
        const size_t tiles_size = vectors * tile_size(s), pixels_size = size_t(vectors) * N;
        V* all_tiles = scratch.take<V>(s.batch * tiles_size);
        V* all_out = scratch.take<V>(s.batch * pixels_size);     // gradient of the result
        V* all_normed = scratch.take<V>(s.batch * pixels_size);  // the convolution's result, normalised
        V* all_grad = scratch.take<V>(s.batch * pixels_size);    // its gradient, before BatchNorm's affine part
        V* grad_tile = scratch.take<V>(tile_size(s));
        std::fill_n(all_tiles, s.batch * tiles_size, V{});
        std::fill_n(grad_tile, tile_size(s), V{});
        V sum_grad[most_vectors] = {}, sum_grad_normed[most_vectors] = {}, deviation[most_vectors];
        for (int v = 0; v < vectors; ++v) deviation[v] = inverse_deviation(of_channels(p.variance, v));

        for (int b = 0; b < s.batch; ++b) {
            V* tiles = all_tiles + b * tiles_size;
            load_image(x, b, tiles);
            load_pixels(grad_out, b, all_out + b * pixels_size);
            for (int v = 0; v < vectors; ++v) {
                const int64_t place = b * pixels_size + v * N;
                V *out = all_out + place, *normed = all_normed + place, *grad = all_grad + place;
                const V mean = of_channels(p.mean, v), gamma = of_channels(p.gamma, v), beta = of_channels(p.beta, v);
                const V inverse = deviation[v];
                convolve(tile_of(tiles, v), taps(v), normed);
                V image_sum = {}, image_sum_normed = {};
                for (int i = 0; i < N; ++i) {
                    const V z = (normed[i] - mean) * inverse, u = z * gamma + beta, gate = sigmoid<C>(u);
                    const V g = out[i] * gate * (1 + u * (1 - gate));
                    normed[i] = z;
                    grad[i] = g;
                    image_sum += g;
                    image_sum_normed += g * z;
                }
                sum_grad[v] += image_sum;
                sum_grad_normed[v] += image_sum_normed;
            }
        }
        Taps flipped[most_vectors], total[most_vectors] = {};
        for (int v = 0; v < vectors; ++v) {
            set_of_channels(grad_beta, v, sum_grad[v]);
            set_of_channels(grad_gamma, v, sum_grad_normed[v]);
            const Taps weight = taps(v);
            std::reverse_copy(weight.at, weight.at + K * K, flipped[v].at);
        }

        // With the batch's own statistics, the normalisation's gradient loses its mean and its part along `normed`.
        const C part = s.batch_statistics ? 1 / (C(s.batch) * N) : C(0);
        for (int b = 0; b < s.batch; ++b) {
            for (int v = 0; v < vectors; ++v) {
                const int64_t place = b * pixels_size + v * N;
                V *out = all_out + place, *normed = all_normed + place, *grad = all_grad + place;
                const V drop = sum_grad[v] * part, drop_normed = sum_grad_normed[v] * part;
                const V scale = of_channels(p.gamma, v) * deviation[v];
                each_pixel([&](int i, int place) {
                    grad_tile[place] = (grad[i] - drop - normed[i] * drop_normed) * scale;
                });
                add_weight_gradient(tile_of(all_tiles + b * tiles_size, v), grad_tile, total[v].at);
                convolve(grad_tile, flipped[v], grad);
                for (int i = 0; i < N; ++i) out[i] += grad[i];
            }
            store_pixels(all_out + b * pixels_size, grad_x, b);
        }
        for (int v = 0; v < vectors; ++v)
            for (int t = 0; t < K * K; ++t) set_of_channels(grad_weight + int64_t(t) * s.channels, v, total[v].at[t]);
    }
};

// Vectors of channels a unit has: neighboring ones share cache lines and pages, but every thread wants several units,
// and what a unit keeps of a large batch should stay in the cache.
template <class S, class C>
inline int unit_vectors(const LocalShape& s, int threads) {
    int wanted = LocalChannels<S, C, 1>::most_vectors / (sizeof(S) < 4 ? 2 : 1);
    const int64_t kept = int64_t(s.batch) * s.tokens() * kVectorBytes;  // bytes of one vector
    while (wanted * kVectorBytes > 128 && wanted * kept > (1 << 20)) wanted /= 2;
    const int vectors = round_up(s.channels, kLanes<C>) / kLanes<C>;
    return std::max(1, std::min(wanted, vectors / (2 * threads)));
}

template <class S, class C, int K>
void local_forward(const LocalShape& s, const S* x, S* out, const LocalParameters<C>& p, int threads) {
    const int vectors = unit_vectors<S, C>(s, threads), channels = vectors * kLanes<C>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int channel = 0; channel < s.channels; channel += channels) {
        const FlushDenormals flush;
        Scratch scratch(LocalChannels<S, C, K>::scratch_bytes(s, vectors, false));
        LocalChannels<S, C, K>(s, p, channel, channels).forward(x, out, scratch);
    }
}

template <class S, class C, int K>
void local_backward(const LocalShape& s, const S* x, const S* grad_out, S* grad_x, const LocalParameters<C>& p,
                    C* grad_weight, C* grad_gamma, C* grad_beta, int threads) {
    const int vectors = unit_vectors<S, C>(s, threads), channels = vectors * kLanes<C>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int channel = 0; channel < s.channels; channel += channels) {
        const FlushDenormals flush;
        Scratch scratch(LocalChannels<S, C, K>::scratch_bytes(s, vectors, true));
        LocalChannels<S, C, K>(s, p, channel, channels)
            .backward(x, grad_out, grad_x, grad_weight, grad_gamma, grad_beta, scratch);
    }
}

}  // namespace d_emo
