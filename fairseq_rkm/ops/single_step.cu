// The equations of one step, from its pre-activations; single_step.py compiles it with the cell as macros.

#include "numbers.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float hyperbolic(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

extern "C" __global__ void single_step(
    const Stored* __restrict__ gates, const float* __restrict__ before, Stored* __restrict__ output,
    Stored* __restrict__ hidden, float* __restrict__ memory, long long size, long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Stored* a = gates + i / size * size * GATES + i % size;
    const float candidate = SQUASH_CANDIDATE ? hyperbolic(widen(a[0])) : widen(a[0]);
    const float forget = FORGET >= 0 ? sigmoid(widen(a[(FORGET >= 0 ? FORGET : 0) * size])) : SCALE_F;
    const float input = INPUT >= 0    ? sigmoid(widen(a[(INPUT >= 0 ? INPUT : 0) * size]))
                        : FORGET >= 0 ? 1.f - forget
                                      : SCALE_I;
    float c = input * candidate + (HAS_MEMORY ? forget * before[i] : 0.f);
#ifdef CLIP
    c = c < -CLIP ? -CLIP : c > CLIP ? CLIP : c;  // NaN stays
#endif
    float h = SQUASH_OUTPUT ? hyperbolic(c) : c;
    if (OUTPUT >= 0) h *= sigmoid(widen(a[(OUTPUT >= 0 ? OUTPUT : 0) * size]));
    memory[i] = c;
    output[i] = hidden[i] = narrow(h);
}
