// The C interface of fused.h, called through ctypes (cpu.py).

#include "fused.h"

using namespace d_emo;

extern "C" int d_emo_fused_forward(const AttentionShape* s, int dtype, int threads, const LocalShape* local,
                                   const void* qkv, const void* bias, const void* weight, const void* gamma,
                                   const void* beta, void* mean, void* variance, void* out) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        return with_kernel(local->kernel, [&](auto kernel) {
            const LocalParameters<C> p{(const C*)weight, (const C*)gamma, (const C*)beta, (C*)mean, (C*)variance};
            fused_forward<S, C, kernel.value>(*s, *local, (const S*)qkv, (const C*)bias, p, (S*)out, threads);
            return 0;
        });
    });
}
