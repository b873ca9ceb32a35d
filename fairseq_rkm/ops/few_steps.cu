// A step without gradients; few_steps.py compiles this with the cell as macros.
//
// `whole_step` is all of it, products included: a warp takes one unit of ROWS rows of the batch. Its lanes share the
// products' sums, and read WIDTH numbers at once. For larger problems cuBLAS multiplies, and `pointwise_step` follows.

#include "numbers.cuh"

#define LANES 32
#define ALL 0xffffffffu

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float hyperbolic(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

// The memory and the output of a unit, from its gates' sums.
__device__ __forceinline__ float next_memory(const float* a, float before) {
    const float candidate = SQUASH_CANDIDATE ? hyperbolic(a[0]) : a[0];
    const float forget = FORGET >= 0 ? sigmoid(a[FORGET >= 0 ? FORGET : 0]) : SCALE_F;
    const float input = INPUT >= 0    ? sigmoid(a[INPUT >= 0 ? INPUT : 0])
                        : FORGET >= 0 ? 1.f - forget
                                      : SCALE_I;
    float c = input * candidate + (HAS_MEMORY ? forget * before : 0.f);
#ifdef CLIP
    c = c < -CLIP ? -CLIP : c > CLIP ? CLIP : c;  // NaN stays
#endif
    return c;
}

__device__ __forceinline__ float output_of(const float* a, float c) {
    const float h = SQUASH_OUTPUT ? hyperbolic(c) : c;
    return OUTPUT >= 0 ? h * sigmoid(a[OUTPUT >= 0 ? OUTPUT : 0]) : h;
}

extern "C" __global__ void pointwise_step(
    const Stored* __restrict__ gates,  // [B][GATES * size], without the bias
    const Stored* __restrict__ bias,   // [GATES * size]; null for zeros
    const float* __restrict__ before,  // null for zeros
    Stored* __restrict__ output, Stored* __restrict__ hidden, float* __restrict__ memory, long long size,
    long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const long long unit = i % size, first = i / size * size * GATES + unit;
    float a[GATES];
#pragma unroll
    for (int g = 0; g < GATES; ++g)
        a[g] = widen(gates[first + g * size]) + (bias != nullptr ? widen(bias[g * size + unit]) : 0.f);
    const float c = next_memory(a, before != nullptr ? before[i] : 0.f);
    memory[i] = c;
    output[i] = hidden[i] = narrow(output_of(a, c));
}

#ifdef ROWS
constexpr int UNROLL = ROWS > 8 ? 1 : ROWS > 1 ? 2 : 4;

struct alignas(WIDTH * ELEMENT) Vector {
    Stored at[WIDTH];
};

// Add this lane's share of the products with COUNT gates, from the gate FIRST on.
template <int FIRST, int COUNT>
__device__ __forceinline__ void multiply(const Stored* __restrict__ x, const int* rows,
                                         const Stored* __restrict__ weights, int size, int depth, int lane,
                                         float (&sums)[ROWS][GATES]) {
    const long long gate = (long long)size * depth;
#pragma unroll UNROLL
    for (int k = lane * WIDTH; k < depth; k += LANES * WIDTH) {
        Vector w[COUNT];
#pragma unroll
        for (int g = 0; g < COUNT; ++g) w[g] = *reinterpret_cast<const Vector*>(weights + g * gate + k);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Vector v = *reinterpret_cast<const Vector*>(x + rows[r] + k);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const float value = widen(v.at[i]);
#pragma unroll
                for (int g = 0; g < COUNT; ++g) sums[r][FIRST + g] += value * widen(w[g].at[i]);
            }
        }
    }
}

// Add up the lanes' sums. Half of the lanes go on with half of the rows until each lane has one, the first; then lanes
// of one row have the same result.
template <int COUNT, int HALF>
__device__ __forceinline__ void gather(float (&sums)[ROWS][GATES], int lane) {
    const bool upper = lane & HALF;
#pragma unroll
    for (int r = 0; r < (COUNT > 0 ? COUNT : 1); ++r)
#pragma unroll
        for (int g = 0; g < GATES; ++g) {
            const float low = sums[r][g], high = sums[r + COUNT][g];
            sums[r][g] = (upper ? high : low) + __shfl_xor_sync(ALL, upper ? low : high, HALF);
        }
    if constexpr (HALF > 1) gather<COUNT / 2, HALF / 2>(sums, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS) whole_step(
    const Stored* __restrict__ x,          // [B] rows, x_row numbers apart, of `features`
    const Stored* __restrict__ h,          // [B] rows, h_row numbers apart, of `size`; null for zeros
    const float* before,                   // [B][size]; null for zeros; may be `memory`
    const Stored* __restrict__ input,      // [GATES * size][features]
    const Stored* __restrict__ recurrent,  // [RECURRENT * size][size]
    const Stored* __restrict__ bias,       // [GATES * size]; null for zeros
    Stored* __restrict__ output,           // [B] rows, output_row numbers apart
    Stored* __restrict__ hidden,           // [B][size], the output once more; null if it is not wanted
    float* memory,                         // [B][size]
    int x_row, int h_row, int output_row, int features, int size, int batch) {
    const int lane = threadIdx.x % LANES, tiles = (batch + ROWS - 1) / ROWS;
    const int unit = blockIdx.x / tiles * (THREADS / LANES) + threadIdx.x / LANES, start = blockIdx.x % tiles * ROWS;
    if (unit >= size) return;
    int rows[ROWS];
    float sums[ROWS][GATES];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        rows[r] = min(start + r, batch - 1) * x_row;  // beyond the batch the last row again, and not written
#pragma unroll
        for (int g = 0; g < GATES; ++g) sums[r][g] = 0.f;
    }
    multiply<0, GATES>(x, rows, input + (long long)unit * features, size, features, lane, sums);
#if RECURRENT
    if (h != nullptr) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) rows[r] = min(start + r, batch - 1) * h_row;
        multiply<FIRST_RECURRENT, RECURRENT>(h, rows, recurrent + (long long)unit * size, size, size, lane, sums);
    }
#endif
    gather<ROWS / 2, LANES / 2>(sums, lane);
    constexpr int lanes = LANES / ROWS;  // of a row
    const int row = start + lane / lanes;
    if (lane % lanes || row >= batch) return;
#pragma unroll
    for (int g = 0; g < GATES; ++g) sums[0][g] += bias != nullptr ? widen(bias[g * size + unit]) : 0.f;
    const int at = row * size + unit;
    const float c = next_memory(sums[0], before != nullptr ? before[at] : 0.f);
    const Stored result = narrow(output_of(sums[0], c));
    memory[at] = c;
    output[row * output_row + unit] = result;
    if (hidden != nullptr) hidden[at] = result;
}
#endif
