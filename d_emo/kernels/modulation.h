// What lies around a block on the CPU: LayerNorm under a factor and a summand of every image, and the residual under a
// gate of every image, with their gradients.
//
// The unit of work is some rows of one image. Sums over an image's rows are left in parts, one a unit, so they do not
// depend on the number of threads.

#pragma once

#include "vectors.h"

namespace d_emo {

struct ModulationShape {
    int32_t batch, tokens, channels;
    int32_t unit_rows;  // of one image that are worked on together
    double eps;

    int units() const { return (tokens + unit_rows - 1) / unit_rows; }  // of an image
    // Calls f(image, unit of all images, first row of all images, one past the last).
    template <class F>
    void each_unit(int threads, F f) const {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int unit = 0; unit < batch * units(); ++unit) {
            const FlushDenormals flush;
            const int image = unit / units(), first = unit % units() * unit_rows;
            const int64_t rows = int64_t(image) * tokens;
            f(image, unit, rows + first, rows + std::min(first + unit_rows, tokens));
        }
    }
};

// A row of n numbers less their mean, over their deviation; lanes past the last are zero. Returns 1 / deviation.
template <class S, class C>
inline C normalise_row(int n, const S* x, double eps, Vec<C>* normed) {
    constexpr int lanes = kLanes<C>;
    Vec<C> sum = {}, squares = {};
    for (int k = 0, v = 0; k < n; k += lanes, ++v) sum += normed[v] = load_lanes<C>(x + k, n - k);
    const C mean = sum_lanes<C>(sum) / C(n);
    for (int k = 0, v = 0; k < n; k += lanes, ++v) {
        normed[v] -= mean;
        for (int i = n - k; i < lanes; ++i) normed[v][i] = 0;
        squares += normed[v] * normed[v];
    }
    const C inverse = C(1) / std::sqrt(sum_lanes<C>(squares) / C(n) + C(eps));
    for (int v = 0; v * lanes < n; ++v) normed[v] *= inverse;
    return inverse;
}

// Room for a row in whole vectors.
template <class C>
inline Vec<C>* take_row(int n, Scratch& scratch) {
    return reinterpret_cast<Vec<C>*>(scratch.take<C>(round_up(n, kLanes<C>)));
}
template <class C>
inline size_t row_bytes(int n) {
    return Scratch::piece_bytes<C>(round_up(n, kLanes<C>));
}

// sums += v, for n lanes.
template <class C>
inline void add_lanes(C* sums, Vec<C> v, int n) {
    store_lanes<C>(sums, load_lanes<C>(sums, n) + v, n);
}

// out = normalised x * gain + offset; gain and offset are (batch, channels).
template <class S, class C>
void norm_forward(const ModulationShape& s, const S* x, const C* gain, const C* offset, S* out, int threads) {
    const int n = s.channels;
    s.each_unit(threads, [&](int image, int, int64_t first, int64_t end) {
        Scratch scratch(row_bytes<C>(n));
        Vec<C>* normed = take_row<C>(n, scratch);
        const C *gains = gain + int64_t(image) * n, *offsets = offset + int64_t(image) * n;
        for (int64_t row = first; row < end; ++row) {
            normalise_row<S, C>(n, x + row * n, s.eps, normed);
            for (int k = 0, v = 0; k < n; k += kLanes<C>, ++v) {
                const Vec<C> scaled = normed[v] * load_lanes<C>(gains + k, n - k);
                store_lanes<C>(out + row * n + k, scaled + load_lanes<C>(offsets + k, n - k), n - k);
            }
        }
    });
}

// grad_gain and grad_offset: (batch, units, channels) partial sums.
template <class S, class C>
void norm_backward(const ModulationShape& s, const S* x, const C* gain, const S* grad, S* grad_x, C* grad_gain,
                   C* grad_offset, int threads) {
    const int n = s.channels;
    s.each_unit(threads, [&](int image, int unit, int64_t first, int64_t end) {
        Scratch scratch(row_bytes<C>(n));
        Vec<C>* normed = take_row<C>(n, scratch);
        const C* gains = gain + int64_t(image) * n;
        C *gain_sums = grad_gain + int64_t(unit) * n, *offset_sums = grad_offset + int64_t(unit) * n;
        std::fill_n(gain_sums, n, C(0));
        std::fill_n(offset_sums, n, C(0));
        for (int64_t row = first; row < end; ++row) {
            const C inverse = normalise_row<S, C>(n, x + row * n, s.eps, normed);
            Vec<C> sum = {}, along = {};  // of the normalised row's gradient, and of its part along the row
            for (int k = 0, v = 0; k < n; k += kLanes<C>, ++v) {
                const Vec<C> g = load_lanes<C>(grad + row * n + k, n - k);
                const Vec<C> scaled = g * load_lanes<C>(gains + k, n - k);
                add_lanes(offset_sums + k, g, n - k);
                add_lanes(gain_sums + k, g * normed[v], n - k);
                sum += scaled;
                along += scaled * normed[v];
            }
            const C mean = sum_lanes<C>(sum) / C(n), part = sum_lanes<C>(along) / C(n);
            for (int k = 0, v = 0; k < n; k += kLanes<C>, ++v) {
                const Vec<C> g = load_lanes<C>(grad + row * n + k, n - k);
                const Vec<C> scaled = g * load_lanes<C>(gains + k, n - k);
                store_lanes<C>(grad_x + row * n + k, (scaled - mean - normed[v] * part) * inverse, n - k);
            }
        }
    });
}

// out = x + gate * y; gate is (batch, channels).
template <class S, class C>
void gated_forward(const ModulationShape& s, const S* x, const C* gate, const S* y, S* out, int threads) {
    const int n = s.channels;
    s.each_unit(threads, [&](int image, int, int64_t first, int64_t end) {
        const C* gates = gate + int64_t(image) * n;
        for (int64_t place = first * n; place < end * n; place += n)
            for (int k = 0; k < n; k += kLanes<C>) {
                const Vec<C> gated = load_lanes<C>(gates + k, n - k) * load_lanes<C>(y + place + k, n - k);
                store_lanes<C>(out + place + k, load_lanes<C>(x + place + k, n - k) + gated, n - k);
            }
    });
}

// grad_gate: (batch, units, channels) partial sums. The gradient of x is `grad` itself.
template <class S, class C>
void gated_backward(const ModulationShape& s, const C* gate, const S* y, const S* grad, S* grad_y, C* grad_gate,
                    int threads) {
    const int n = s.channels;
    s.each_unit(threads, [&](int image, int unit, int64_t first, int64_t end) {
        const C* gates = gate + int64_t(image) * n;
        C* sums = grad_gate + int64_t(unit) * n;
        std::fill_n(sums, n, C(0));
        for (int64_t place = first * n; place < end * n; place += n)
            for (int k = 0; k < n; k += kLanes<C>) {
                const Vec<C> g = load_lanes<C>(grad + place + k, n - k);
                add_lanes(sums + k, g * load_lanes<C>(y + place + k, n - k), n - k);
                store_lanes<C>(grad_y + place + k, g * load_lanes<C>(gates + k, n - k), n - k);
            }
    });
}

}  // namespace d_emo
