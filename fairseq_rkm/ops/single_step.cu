// The equations of one step, from its pre-activations; single_step.py compiles it with the cell as macros.

#include "numbers.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float hyperbolic(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

extern "C" __global__ void single_step(
    const Stored* __restrict__ gates,  // [B][GATES * size], without the bias
    const Stored* __restrict__ bias,   // [GATES * size]; null for zeros
    const float* __restrict__ before, Stored* __restrict__ output, Stored* __restrict__ hidden,
    float* __restrict__ memory, long long size, long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const long long unit = i % size, first = i / size * size * GATES + unit;
    auto gate = [&](int g) {
        return widen(gates[first + g * size]) + (bias != nullptr ? widen(bias[g * size + unit]) : 0.f);
    };
    const float candidate = SQUASH_CANDIDATE ? hyperbolic(gate(0)) : gate(0);
    const float forget = FORGET >= 0 ? sigmoid(gate(FORGET >= 0 ? FORGET : 0)) : SCALE_F;
    const float input = INPUT >= 0    ? sigmoid(gate(INPUT >= 0 ? INPUT : 0))
                        : FORGET >= 0 ? 1.f - forget
                                      : SCALE_I;
    float c = input * candidate + (HAS_MEMORY ? forget * before[i] : 0.f);
#ifdef CLIP
    c = c < -CLIP ? -CLIP : c > CLIP ? CLIP : c;  // NaN stays
#endif
    float h = SQUASH_OUTPUT ? hyperbolic(c) : c;
    if (OUTPUT >= 0) h *= sigmoid(gate(OUTPUT >= 0 ? OUTPUT : 0));
    memory[i] = c;
    output[i] = hidden[i] = narrow(h);
}
