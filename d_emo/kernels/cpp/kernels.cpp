// The C interface, called through ctypes (binding.py). Compiled once for each type that tensors are stored in, with
// -DSTORAGE=float, bfloat16 or double. What returns a number returns -1 for a convolution that there is no kernel for.

#include "fused.h"

using namespace d_emo;
using S = STORAGE;
using C = ArithmeticOf<S>;

// Calls f with the side of a convolution as a constant.
template <class F>
static int with_kernel(int kernel, F f) {
    switch (kernel) {
        case 1:
            return f(std::integral_constant<int, 1>()), 0;
        case 3:
            return f(std::integral_constant<int, 3>()), 0;
        case 5:
            return f(std::integral_constant<int, 5>()), 0;
        case 7:
            return f(std::integral_constant<int, 7>()), 0;
        default:
            return -1;
    }
}

extern "C" {

int attention_forward(const AttentionShape* s, int threads, const S* qkv, S* out) {
    return d_emo::attention_forward<S, C>(*s, qkv, out, threads), 0;
}

int attention_backward(const AttentionShape* s, int threads, const S* qkv, const S* grad_out, S* grad_qkv) {
    return d_emo::attention_backward<S, C>(*s, qkv, grad_out, grad_qkv, threads), 0;
}

int local_forward(const LocalShape* s, int threads, const S* x, const C* weight, const C* gamma, const C* beta,
                  C* mean, C* variance, S* out) {
    return with_kernel(s->kernel, [&](auto kernel) {
        const LocalParameters<C> p{weight, gamma, beta, mean, variance};
        d_emo::local_forward<S, C, kernel.value>(*s, x, out, p, threads);
    });
}

int local_backward(const LocalShape* s, int threads, const S* x, const C* weight, const C* gamma, const C* beta,
                   C* mean, C* variance, const S* grad_out, S* grad_x, C* grad_weight, C* grad_gamma, C* grad_beta) {
    return with_kernel(s->kernel, [&](auto kernel) {
        const LocalParameters<C> p{weight, gamma, beta, mean, variance};
        d_emo::local_backward<S, C, kernel.value>(*s, x, grad_out, grad_x, p, grad_weight, grad_gamma, grad_beta,
                                                  threads);
    });
}

int linear_forward(const LinearShape* s, int threads, const S* x, const S* weight, const C* bias, S* out) {
    return d_emo::linear_forward<S, C>(*s, x, weight, bias, out, threads), 0;
}

int linear_weight_gradient(const LinearShape* s, int threads, const S* grad, const S* x, S* out, C* grad_bias) {
    return d_emo::linear_weight_gradient<S, C>(*s, grad, x, out, grad_bias, threads), 0;
}

int block_forward(const AttentionShape* s, int threads, const LocalShape* local, const LinearShape* projected,
                  const S* x, const S* expansion, const C* bias, const C* weight, const C* summand, const S* projection,
                  S* out) {
    return with_kernel(local->kernel, [&](auto kernel) {
        const LocalParameters<C> p{weight, nullptr, summand, nullptr, nullptr};
        d_emo::block_forward<S, C, kernel.value>(*s, *local, projected->outputs, x, expansion, bias, p, projection, out,
                                                 threads);
    });
}

}  // extern "C"
