// The C interface of fused.h, called through ctypes (cpu.py).

#include "fused.h"

using namespace d_emo;

extern "C" {

int d_emo_fused_forward(const AttentionShape* s, int dtype, int threads, const LocalShape* local, const void* qkv,
                        const void* bias, const void* weight, const void* gamma, const void* beta, void* mean,
                        void* variance, void* out) {
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

int d_emo_block_forward(const AttentionShape* s, int dtype, int threads, const LocalShape* local,
                        const BlockShape* block, const void* x, const void* expansion, const void* bias,
                        const void* weight, const void* gamma, const void* beta, void* mean, void* variance,
                        const void* projection, void* out) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        if constexpr (sizeof(S) > 4) {
            return -1;  // float64 is left to PyTorch
        } else {
            return with_kernel(local->kernel, [&](auto kernel) {
                const LocalParameters<C> p{(const C*)weight, (const C*)gamma, (const C*)beta, (C*)mean, (C*)variance};
                block_forward<S, C, kernel.value>(*s, *local, block->outputs, (const S*)x, (const S*)expansion,
                                                  (const C*)bias, p, (const S*)projection, (S*)out, threads);
                return 0;
            });
        }
    });
}

}  // extern "C"
