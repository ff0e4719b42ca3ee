// The C interface of local.h, called through ctypes (cpu.py).

#include "local.h"

using namespace d_emo;

extern "C" {

int d_emo_local_forward(const LocalShape* s, int dtype, int threads, const void* x, const void* weight,
                        const void* gamma, const void* beta, void* mean, void* variance, void* out) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        return with_kernel(s->kernel, [&](auto kernel) {
            const LocalParameters<C> p{(const C*)weight, (const C*)gamma, (const C*)beta, (C*)mean, (C*)variance};
            local_forward<S, C, kernel.value>(*s, (const S*)x, (S*)out, p, threads);
            return 0;
        });
    });
}

int d_emo_local_backward(const LocalShape* s, int dtype, int threads, const void* x, const void* weight,
                         const void* gamma, const void* beta, const void* mean, const void* variance,
                         const void* grad_out, void* grad_x, void* grad_weight, void* grad_gamma, void* grad_beta) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        return with_kernel(s->kernel, [&](auto kernel) {
            const LocalParameters<C> p{(const C*)weight, (const C*)gamma, (const C*)beta, (C*)mean, (C*)variance};
            local_backward<S, C, kernel.value>(*s, (const S*)x, (const S*)grad_out, (S*)grad_x, p, (C*)grad_weight,
                                               (C*)grad_gamma, (C*)grad_beta, threads);
            return 0;
        });
    });
}

}  // extern "C"
