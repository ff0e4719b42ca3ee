// The C interface of linear.h, called through ctypes (cpu.py).

#include "linear.h"

using namespace d_emo;

// float64 is left to PyTorch.
template <class F>
static int with_product_types(int dtype, F f) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        if constexpr (sizeof(storage) > 4) {
            return -1;
        } else {
            f(storage, arithmetic);
            return 0;
        }
    });
}

extern "C" {

int d_emo_linear_forward(const LinearShape* s, int dtype, int threads, const void* x, const void* weight, void* out) {
    return with_product_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        linear_forward<S, decltype(arithmetic)>(*s, (const S*)x, (const S*)weight, (S*)out, threads);
    });
}

int d_emo_linear_weight_gradient(const LinearShape* s, int dtype, int threads, const void* grad, const void* x,
                                 void* out) {
    return with_product_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        linear_weight_gradient<S, decltype(arithmetic)>(*s, (const S*)grad, (const S*)x, (S*)out, threads);
    });
}

}  // extern "C"
