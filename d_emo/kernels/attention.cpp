// The C interface of attention.h, called through ctypes (cpu.py).

#include "attention.h"

using namespace d_emo;

extern "C" {

int d_emo_attention_forward(const AttentionShape* s, int dtype, int threads, const void* qkv, const void* bias,
                            void* out) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        attention_forward<S, C>(*s, (const S*)qkv, (const C*)bias, (S*)out, threads);
        return 0;
    });
}

int d_emo_attention_backward(const AttentionShape* s, int dtype, int threads, const void* qkv, const void* bias,
                             const void* grad_out, void* grad_qkv, void* grad_bias) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        attention_backward<S, C>(*s, (const S*)qkv, (const C*)bias, (const S*)grad_out, (S*)grad_qkv, (C*)grad_bias,
                                 threads);
        return 0;
    });
}

}  // extern "C"
