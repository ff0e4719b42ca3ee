// The C interface of modulation.h, called through ctypes (cpu.py).

#include "modulation.h"

using namespace d_emo;

// Calls f with values of the storage and the arithmetic type.
template <class F>
static int with_both(int dtype, F f) {
    return with_types(dtype, [&](auto storage, auto arithmetic) {
        f(storage, arithmetic);
        return 0;
    });
}

extern "C" {

int d_emo_norm_forward(const ModulationShape* s, int dtype, int threads, const void* x, const void* gain,
                       const void* offset, void* out) {
    return with_both(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        norm_forward<S, C>(*s, (const S*)x, (const C*)gain, (const C*)offset, (S*)out, threads);
    });
}

int d_emo_norm_backward(const ModulationShape* s, int dtype, int threads, const void* x, const void* gain,
                        const void* grad, void* grad_x, void* grad_gain, void* grad_offset) {
    return with_both(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        norm_backward<S, C>(*s, (const S*)x, (const C*)gain, (const S*)grad, (S*)grad_x, (C*)grad_gain,
                            (C*)grad_offset, threads);
    });
}

int d_emo_gated_forward(const ModulationShape* s, int dtype, int threads, const void* x, const void* gate,
                        const void* y, void* out) {
    return with_both(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        gated_forward<S, C>(*s, (const S*)x, (const C*)gate, (const S*)y, (S*)out, threads);
    });
}

int d_emo_gated_backward(const ModulationShape* s, int dtype, int threads, const void* gate, const void* y,
                         const void* grad, void* grad_y, void* grad_gate) {
    return with_both(dtype, [&](auto storage, auto arithmetic) {
        using S = decltype(storage);
        using C = decltype(arithmetic);
        gated_backward<S, C>(*s, (const C*)gate, (const S*)y, (const S*)grad, (S*)grad_y, (C*)grad_gate, threads);
    });
}

}  // extern "C"
