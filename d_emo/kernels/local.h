// The block's local branch on the CPU: x + SiLU(BatchNorm(depthwise convolution of x)), channels last, and its
// gradient.
//
// The unit of work is one vector of channels over the whole batch, so statistics and weight gradients need no sum over
// threads. Its pixels are gathered into a zero-bordered tile, and the convolution is products of whole vectors. The
// convolution is computed again in the backward pass; nothing but x is kept.

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
    static constexpr int lanes = kLanes<C>, border = K / 2;
    using V = Vec<C>;
    const LocalShape& s;
    const int first, n;  // channels first .. first + n - 1, n at most `lanes` and `limit`
    const int N, tile_width;
    V weight[K * K];
    V gamma, beta;

    LocalChannels(const LocalShape& shape, const LocalParameters<C>& p, int channel, int limit = lanes)
        : s(shape),
          first(channel),
          n(std::min({lanes, limit, shape.channels - channel})),
          N(shape.tokens()),
          tile_width(shape.width + 2 * border) {
        for (int t = 0; t < K * K; ++t) weight[t] = load_lanes<C>(p.weight + int64_t(t) * s.channels + first, n);
        gamma = load_lanes<C>(p.gamma + first, n);
        beta = load_lanes<C>(p.beta + first, n);
    }

    static size_t tile_size(const LocalShape& s) { return size_t(s.height + 2 * border) * (s.width + 2 * border); }
    static size_t scratch_bytes(const LocalShape& s, bool backward) {
        const size_t images = backward || s.batch_statistics ? s.batch : 1;
        return (2 * tile_size(s) + (backward ? 2 : 1) * images * s.tokens() + 4) * sizeof(V);
    }

    const S* image(const S* x, int b) const { return x + int64_t(b) * N * s.channels + first; }
    S* image(S* x, int b) const { return x + int64_t(b) * N * s.channels + first; }

    V pixel(const S* x, int i) const { return load_lanes<C>(x + int64_t(i) * s.channels, n); }
    void set_pixel(S* x, int i, V v) const { store_lanes<C>(x + int64_t(i) * s.channels, v, n); }
    V* inside(V* tile, int row) const { return tile + (row + border) * tile_width + border; }

    // The tile's inside, from pixels `step` elements apart.
    template <class X>
    void fill_tile(const X* x, int64_t step, V* tile) const {
        for (int r = 0; r < s.height; ++r)
            for (int c = 0; c < s.width; ++c) inside(tile, r)[c] = load_lanes<C>(x + (r * s.width + c) * step, n);
    }
    void fill_tile(const S* x, V* tile) const { fill_tile(x, s.channels, tile); }

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
    void convolve(const V* tile, const V* w, V* out) const {
        for (int r = 0; r < s.height; ++r) {
            int c = 0;
            for (; c + 8 <= s.width; c += 8) convolve_pixels<8>(tile + r * tile_width + c, w, out + r * s.width + c);
            for (; c + 2 <= s.width; c += 2) convolve_pixels<2>(tile + r * tile_width + c, w, out + r * s.width + c);
            for (; c < s.width; ++c) convolve_pixels<1>(tile + r * tile_width + c, w, out + r * s.width + c);
        }
    }

    // total += sum over pixels of grad * tile, for every tap; G rows of taps at a time stay in registers.
    void add_weight_gradient(const V* tile, const V* grad_tile, V* total) const {
        constexpr int G = K <= 5 && kVectorBytes == 64 ? K : 1;
        for (int dy = 0; dy < K; dy += G) {
            V sum[G][K] = {};
            for (int r = 0; r < s.height; ++r)
                for (int c = 0; c < s.width; ++c) {
                    const V grad = grad_tile[(r + border) * tile_width + border + c];
                    const V* corner = tile + (r + dy) * tile_width + c;
#pragma GCC unroll 9
                    for (int g = 0; g < G; ++g)
#pragma GCC unroll 9
                        for (int dx = 0; dx < K; ++dx) sum[g][dx] += grad * corner[g * tile_width + dx];
                }
#pragma GCC unroll 9
            for (int g = 0; g < G; ++g)
#pragma GCC unroll 9
                for (int dx = 0; dx < K; ++dx) total[(dy + g) * K + dx] += sum[g][dx];
        }
    }

    V inverse_deviation(V variance) const {
        return by_lane<C>(variance + C(s.eps), [](C v) { return C(1) / std::sqrt(v); });
    }

    // One image with given statistics; pixels of x and out lie `x_step` and `out_step` elements apart.
    template <class X>
    void infer(const X* x, int64_t x_step, S* out, int64_t out_step, V mean, V variance, V* tile, V* local) const {
        const V scale = gamma * inverse_deviation(variance), shift = beta - mean * scale;
        fill_tile(x, x_step, tile);
        convolve(tile, weight, local);
        for (int r = 0; r < s.height; ++r)
            for (int c = 0; c < s.width; ++c) {
                const V u = local[r * s.width + c] * scale + shift;
                store_lanes<C>(out + (r * s.width + c) * out_step, inside(tile, r)[c] + u * sigmoid<C>(u), n);
            }
    }

    void forward(const S* x, S* out, const LocalParameters<C>& p, Scratch& scratch) const {
        V* tile = scratch.take<V>(tile_size(s));
        V* local = scratch.take<V>(size_t(s.batch_statistics ? s.batch : 1) * N);
        std::fill_n(tile, tile_size(s), V{});
        if (!s.batch_statistics) {
            const V mean = load_lanes<C>(p.mean + first, n), variance = load_lanes<C>(p.variance + first, n);
            for (int b = 0; b < s.batch; ++b)
                infer(image(x, b), s.channels, image(out, b), s.channels, mean, variance, tile, local);
            return;
        }
        V mean = {}, squares = {};
        for (int b = 0; b < s.batch; ++b) {
            V* image_local = local + size_t(b) * N;
            fill_tile(image(x, b), tile);
            convolve(tile, weight, image_local);
            V image_mean = {}, image_squares = {};
            for (int i = 0; i < N; ++i) image_mean += image_local[i];
            image_mean /= C(N);
            for (int i = 0; i < N; ++i) image_squares += (image_local[i] - image_mean) * (image_local[i] - image_mean);
            const V step = image_mean - mean;  // images joined after Chan, Golub and LeVeque (1979)
            mean += step / C(b + 1);
            squares += image_squares + step * step * (C(N) * b / C(b + 1));
        }
        const V variance = squares / (C(s.batch) * N);
        store_lanes<C>(p.mean + first, mean, n);
        store_lanes<C>(p.variance + first, variance, n);
        const V scale = gamma * inverse_deviation(variance), shift = beta - mean * scale;
        for (int b = 0; b < s.batch; ++b) {
            const V* image_local = local + size_t(b) * N;
            for (int i = 0; i < N; ++i) {
                const V u = image_local[i] * scale + shift;
                set_pixel(image(out, b), i, pixel(image(x, b), i) + u * sigmoid<C>(u));
            }
        }
    }

    // grad_parameters: weight, gamma and beta gradients, laid out as the parameters.
    void backward(const S* x, const S* grad_out, S* grad_x, const LocalParameters<C>& p, C* grad_weight, C* grad_gamma,
                  C* grad_beta, Scratch& scratch) const {
        V* tile = scratch.take<V>(tile_size(s));
        V* grad_tile = scratch.take<V>(tile_size(s));
        V* normed = scratch.take<V>(size_t(s.batch) * N);
        V* grad = scratch.take<V>(size_t(s.batch) * N);
        std::fill_n(tile, tile_size(s), V{});
        std::fill_n(grad_tile, tile_size(s), V{});
        const V mean = load_lanes<C>(p.mean + first, n);
        const V deviation = inverse_deviation(load_lanes<C>(p.variance + first, n));

        V sum_grad = {}, sum_grad_normed = {};
        for (int b = 0; b < s.batch; ++b) {
            V *image_normed = normed + size_t(b) * N, *image_grad = grad + size_t(b) * N;
            fill_tile(image(x, b), tile);
            convolve(tile, weight, image_normed);
            V image_sum = {}, image_sum_normed = {};
            for (int i = 0; i < N; ++i) {
                const V z = (image_normed[i] - mean) * deviation, u = z * gamma + beta, gate = sigmoid<C>(u);
                const V g = pixel(image(grad_out, b), i) * gate * (1 + u * (1 - gate));
                image_normed[i] = z;
                image_grad[i] = g;
                image_sum += g;
                image_sum_normed += g * z;
            }
            sum_grad += image_sum;
            sum_grad_normed += image_sum_normed;
        }
        store_lanes<C>(grad_beta + first, sum_grad, n);
        store_lanes<C>(grad_gamma + first, sum_grad_normed, n);

        // With the batch's own statistics, the normalisation's gradient loses its mean and its part along `normed`.
        const C part = s.batch_statistics ? 1 / (C(s.batch) * N) : C(0);
        const V drop = sum_grad * part, drop_normed = sum_grad_normed * part, scale = gamma * deviation;
        V flipped[K * K], total[K * K] = {};
        for (int t = 0; t < K * K; ++t) flipped[t] = weight[K * K - 1 - t];
        for (int b = 0; b < s.batch; ++b) {
            V *image_normed = normed + size_t(b) * N, *image_grad = grad + size_t(b) * N;
            fill_tile(image(x, b), tile);
            for (int r = 0; r < s.height; ++r)
                for (int c = 0; c < s.width; ++c) {
                    const int i = r * s.width + c;
                    inside(grad_tile, r)[c] = (image_grad[i] - drop - image_normed[i] * drop_normed) * scale;
                }
            add_weight_gradient(tile, grad_tile, total);
            convolve(grad_tile, flipped, image_grad);
            for (int i = 0; i < N; ++i) set_pixel(image(grad_x, b), i, pixel(image(grad_out, b), i) + image_grad[i]);
        }
        for (int t = 0; t < K * K; ++t) store_lanes<C>(grad_weight + int64_t(t) * s.channels + first, total[t], n);
    }
};

template <class S, class C, int K>
void local_forward(const LocalShape& s, const S* x, S* out, const LocalParameters<C>& p, int threads) {
    constexpr int lanes = kLanes<C>;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 2)
    for (int channel = 0; channel < s.channels; channel += lanes) {
        const FlushDenormals flush;
        Scratch scratch(LocalChannels<S, C, K>::scratch_bytes(s, false));
        LocalChannels<S, C, K>(s, p, channel).forward(x, out, p, scratch);
    }
}

template <class S, class C, int K>
void local_backward(const LocalShape& s, const S* x, const S* grad_out, S* grad_x, const LocalParameters<C>& p,
                    C* grad_weight, C* grad_gamma, C* grad_beta, int threads) {
    constexpr int lanes = kLanes<C>;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 2)
    for (int channel = 0; channel < s.channels; channel += lanes) {
        const FlushDenormals flush;
        Scratch scratch(LocalChannels<S, C, K>::scratch_bytes(s, true));
        LocalChannels<S, C, K>(s, p, channel)
            .backward(x, grad_out, grad_x, p, grad_weight, grad_gamma, grad_beta, scratch);
    }
}

// Calls f with the kernel side as a constant; -1 for a side without one.
template <class F>
inline int with_kernel(int kernel, F f) {
    switch (kernel) {
        case 1:
            return f(std::integral_constant<int, 1>());
        case 3:
            return f(std::integral_constant<int, 3>());
        case 5:
            return f(std::integral_constant<int, 5>());
        case 7:
            return f(std::integral_constant<int, 7>());
        default:
            return -1;
    }
}

}  // namespace d_emo
