// Recurrences of small layers with feedback: one launch for a whole sequence, in which no block waits for another.
//
// A block holds all recurrent weights of the layer, in registers and as far as need be in shared memory, and takes ROWS
// rows of the batch from the first step to the last. A unit has LANES neighbouring threads, one for each gate: they
// multiply, and exchange the gates by shuffles. The values that all units read at the next step, h_{t-1} forward and the
// gates' gradients backward, lie in two buffers of shared memory that take turns. A step has one barrier.
//
// A launch serves one direction, or both of a layer: every other block then runs against time. `Course` says where the
// values of a direction lie.
//
// blockwise.py compiles this with the sizes and the cell (a row of ops/cells.py) as macros. Indices: t step in the
// direction of travel, u unit, g gate in stacking order, n row in the block, b row of the batch, k column of a thread's
// weights.

#include "numbers.cuh"

#define LANES (GATES == 1 ? 1 : GATES == 2 ? 2 : 4)
#define THREADS ((SIZE * LANES + 31) / 32 * 32)
#define CHUNKS ((SIZE + 3) / 4)          // of four columns
#define REST (CHUNKS - HELD)             // chunks in shared memory; HELD are in registers
#define PITCH (CHUNKS * 4 + 4)           // the gates of a unit read from different banks
#define VECTORS (BACKWARD ? LANES : 1)   // vectors of all units' values for each row
#define HAS_SCALE_F (FORGET < 0)
#define HAS_SCALE_I (FORGET < 0 && INPUT < 0)

__device__ __forceinline__ float exponential(float x) { return ELEMENT == 4 ? expf(x) : __expf(x); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }
__device__ __forceinline__ float hyperbolic(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

// What a thread knows of its place.
struct Place {
    int u, g;
    bool real;  // a unit and a gate of the layer
    __device__ __forceinline__ Place() {
        u = threadIdx.x / LANES, g = threadIdx.x % LANES;
        real = u < SIZE && g < GATES;
    }
    // The value that the thread of gate `gate` of the same unit has. All lanes of a warp must call.
    __device__ __forceinline__ float of(float value, int gate) const {
        return LANES == 1 ? value : __shfl_sync(~0u, value, gate, LANES);
    }
};

// A cell's values at a step, from the gates that its threads have.
struct Values {
    float candidate, input, forget, output;
    __device__ __forceinline__ Values(const Place& place, float own, float scale_i, float scale_f) {
        candidate = place.of(own, 0);
        forget = FORGET >= 0 ? place.of(own, FORGET >= 0 ? FORGET : 0) : scale_f;
        input = INPUT >= 0 ? place.of(own, INPUT >= 0 ? INPUT : 0) : FORGET >= 0 ? 1.f - forget : scale_i;
        output = OUTPUT >= 0 ? place.of(own, OUTPUT >= 0 ? OUTPUT : 0) : 1.f;
    }
    __device__ __forceinline__ float raw(float before) const { return input * candidate + forget * before; }
};

// A block's direction and rows, and the places of its values.
//
// Gates, their gradients, outputs and those of outputs are [T][B][DIRECTIONS][..]; states at both ends of a sequence are
// [DIRECTIONS][B][SIZE]. All h and c of one direction are [T + 1][B][SIZE], those of both [T + 2][B][2][SIZE]: those
// behind the step at time s lie at s + 1. The initial ones lie before all others, or behind them against time.
struct Course {
    const long long steps, batch, first;
    const bool back;
    __device__ __forceinline__ Course(long long steps, long long batch)
        : steps(steps), batch(batch), first((long long)(blockIdx.x / DIRECTIONS) * ROWS),
          back(DIRECTIONS == 2 && blockIdx.x % 2) {}
    // The row of step t; of all h and c, that of those behind the step is `batch` further.
    __device__ __forceinline__ size_t row(long long t, int n) const {
        return size_t(back ? steps - 1 - t : t) * batch + first + n;
    }
    // The row of h and c before a step.
    __device__ __forceinline__ size_t before(size_t row) const { return back ? row + 2 * batch : row; }
    __device__ __forceinline__ size_t initial(int n) const { return back ? row(-1, n) + batch : first + n; }
    // The place of a row's first value.
    __device__ __forceinline__ size_t of(size_t row) const { return row * DIRECTIONS + back; }
    __device__ __forceinline__ size_t end(int n) const { return back ? batch + first + n : first + n; }
};

// A thread's weights, four columns at a time. `At` gives a column's weight.
struct Weights {
    float4 held[HELD];
    const float4* rest;  // shared: [REST][THREADS]

    template <typename At>
    __device__ __forceinline__ void load(float4* room, At at) {
#pragma unroll
        for (int c = 0; c < HELD; ++c) held[c] = make_float4(at(4 * c), at(4 * c + 1), at(4 * c + 2), at(4 * c + 3));
        for (int c = 0; c < REST; ++c) {
            const int k = 4 * (HELD + c);
            room[c * THREADS + threadIdx.x] = make_float4(at(k), at(k + 1), at(k + 2), at(k + 3));
        }
        rest = room + threadIdx.x;
    }

    // The products with a vector of each row, in `sums`; a row's vectors lie `pitch` chunks apart.
    __device__ __forceinline__ void multiply(float (&sums)[ROWS], const float4* vectors, int pitch) const {
        float4 parts[ROWS];
#pragma unroll
        for (int n = 0; n < ROWS; ++n) parts[n] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int c = 0; c < HELD; ++c) add(parts, held[c], vectors + c, pitch);
#pragma unroll 4
        for (int c = 0; c < REST; ++c) add(parts, rest[c * THREADS], vectors + HELD + c, pitch);
#pragma unroll
        for (int n = 0; n < ROWS; ++n) sums[n] = (parts[n].x + parts[n].y) + (parts[n].z + parts[n].w);
    }

    __device__ __forceinline__ void add(float4 (&parts)[ROWS], float4 w, const float4* vectors, int pitch) const {
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            const float4 v = vectors[n * pitch];
            parts[n].x = fmaf(w.x, v.x, parts[n].x);
            parts[n].y = fmaf(w.y, v.y, parts[n].y);
            parts[n].z = fmaf(w.z, v.z, parts[n].z);
            parts[n].w = fmaf(w.w, v.w, parts[n].w);
        }
    }
};

extern __shared__ float4 room[];  // the rest of the weights, then two buffers of [ROWS][VECTORS][PITCH]

__device__ __forceinline__ float* clear_buffers() {
    float* buffers = (float*)(room + REST * THREADS);
    for (int i = threadIdx.x; i < 2 * ROWS * VECTORS * PITCH; i += THREADS) buffers[i] = 0.f;
    return buffers;
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, 1) blockwise_forward(
    Stored* __restrict__ gates, const Stored* __restrict__ bias, const Stored* __restrict__ recurrent,
    const Stored* __restrict__ first_hidden, const float* __restrict__ first_memory, Stored* __restrict__ last_hidden,
    float* __restrict__ last_memory, Stored* __restrict__ hiddens, float* __restrict__ memories,
    Stored* __restrict__ output, const u8* __restrict__ keep, const float* __restrict__ scale_f,
    const float* __restrict__ scale_i, const Stored* __restrict__ back_bias, const Stored* __restrict__ back_recurrent,
    const float* __restrict__ back_scale_f, const float* __restrict__ back_scale_i, long long steps, long long batch) {
    const Place at;
    const Course course(steps, batch);
    const long long first = course.first;
    if (course.back) bias = back_bias, recurrent = back_recurrent, scale_f = back_scale_f, scale_i = back_scale_i;
    const int r = at.g - FIRST_RECURRENT;
    const bool fed = at.real && r >= 0 && r < RECURRENT;
    Weights weights;
    weights.load(room, [&](int k) {
        return fed && k < SIZE ? widen(recurrent[(size_t(r) * SIZE + at.u) * SIZE + k]) : 0.f;
    });
    float* buffers = clear_buffers();
    __syncthreads();
    const float s_f = HAS_SCALE_F && at.u < SIZE ? scale_f[at.u] : 0.f, s_i = HAS_SCALE_I ? *scale_i : 0.f;
    const float shift = at.real && bias != nullptr ? widen(bias[at.g * SIZE + at.u]) : 0.f;
    float c[ROWS], h[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
        const bool there = at.u < SIZE && first + n < batch;
        const size_t from = course.end(n) * SIZE + at.u, to = course.of(course.initial(n)) * SIZE + at.u;
        c[n] = there && first_memory != nullptr ? first_memory[from] : 0.f;
        h[n] = there && first_hidden != nullptr ? widen(first_hidden[from]) : 0.f;
        if (there && at.g == 0) {
            memories[to] = c[n];
            hiddens[to] = narrow(h[n]);
            buffers[n * PITCH + at.u] = h[n];
        }
    }
    float ahead[DEPTH][ROWS];
    bool real[DEPTH][ROWS];
    auto fetch = [&](long long t, float (&values)[ROWS], bool (&is_real)[ROWS]) {
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            const bool there = t < steps && first + n < batch;
            const size_t row = course.row(t, n);
            values[n] = there && at.real ? widen(gates[(course.of(row) * GATES + at.g) * SIZE + at.u]) : 0.f;
            is_real[n] = !MASK || (there && keep[row]);
        }
    };
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) fetch(i, ahead[i], real[i]);
    __syncthreads();
    for (long long start = 0; start < steps; start += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const long long t = start + i;
            if (t >= steps) break;
            const float* now = buffers + (t & 1) * ROWS * PITCH;
            float* next = buffers + (~t & 1) * ROWS * PITCH;
            float sums[ROWS];
            weights.multiply(sums, (const float4*)now, PITCH / 4);
#pragma unroll
            for (int n = 0; n < ROWS; ++n) {
                const float a = ahead[i][n] + shift + sums[n];
                const bool candidate = at.g == 0;
                const float s = sigmoid(candidate && SQUASH_CANDIDATE ? 2.f * a : a);
                const float own = !candidate ? s : SQUASH_CANDIDATE ? 2.f * s - 1.f : a;
                const bool there = first + n < batch;
                const size_t row = course.row(t, n);
                if (there && at.real) gates[(course.of(row) * GATES + at.g) * SIZE + at.u] = narrow(own);
                const Values v(at, own, s_i, s_f);
                float value = v.raw(c[n]);
#ifdef CLIP
                value = value < -CLIP ? -CLIP : value > CLIP ? CLIP : value;  // NaN stays
#endif
                if (real[i][n]) {
                    c[n] = value;
                    h[n] = widen(narrow(v.output * (SQUASH_OUTPUT ? hyperbolic(value) : value)));
                }
                if (at.u < SIZE) {
                    const size_t to = course.of(row + batch) * SIZE + at.u;
                    if (at.g == 0 && there) memories[to] = c[n];
                    if (at.g == LANES - 1) {
                        next[n * PITCH + at.u] = h[n];
                        if (there) hiddens[to] = narrow(h[n]);
                        if (DIRECTIONS == 2 && output != nullptr && there)
                            output[course.of(row) * SIZE + at.u] = narrow(real[i][n] ? h[n] : 0.f);
                    }
                }
            }
            fetch(t + DEPTH, ahead[i], real[i]);
            __syncthreads();
        }
    }
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
        if (at.g == 0 && at.u < SIZE && first + n < batch) {
            last_memory[course.end(n) * SIZE + at.u] = c[n];
            last_hidden[course.end(n) * SIZE + at.u] = narrow(h[n]);
        }
}

#else
extern "C" __global__ void __launch_bounds__(THREADS, 1) blockwise_backward(
    const Stored* __restrict__ gates, const Stored* __restrict__ recurrent, const float* __restrict__ memories,
    const Stored* __restrict__ grad_output, const float* __restrict__ grad_hidden, const float* __restrict__ grad_memory,
    float* __restrict__ first_grad_hidden, float* __restrict__ first_grad_memory, Stored* __restrict__ grad_gates,
    const u8* __restrict__ keep, const float* __restrict__ scale_f, const float* __restrict__ scale_i,
    const Stored* __restrict__ back_recurrent, const float* __restrict__ back_scale_f,
    const float* __restrict__ back_scale_i, long long steps, long long batch) {
    const Place at;
    const Course course(steps, batch);
    const long long first = course.first;
    if (course.back) recurrent = back_recurrent, scale_f = back_scale_f, scale_i = back_scale_i;
    const int r = at.g - FIRST_RECURRENT;
    const bool fed = at.real && r >= 0 && r < RECURRENT;
    Weights weights;
    weights.load(room, [&](int k) {
        return fed && k < SIZE ? widen(recurrent[(size_t(r) * SIZE + k) * SIZE + at.u]) : 0.f;
    });
    float* buffers = clear_buffers();
    const float s_f = HAS_SCALE_F && at.u < SIZE ? scale_f[at.u] : 0.f, s_i = HAS_SCALE_I ? *scale_i : 0.f;
    float to_c[ROWS], held[ROWS], now_c[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
        const bool there = at.u < SIZE && first + n < batch;
        const size_t from = course.end(n) * SIZE + at.u;
        to_c[n] = there && grad_memory != nullptr ? grad_memory[from] : 0.f;
        held[n] = there && grad_hidden != nullptr ? grad_hidden[from] : 0.f;
        now_c[n] = there ? memories[course.of(course.row(steps - 1, n) + batch) * SIZE + at.u] : 0.f;
    }
    // A step's gate, c_{t-1} and gradient of h_t, fetched DEPTH steps before.
    float gate[DEPTH][ROWS], before[DEPTH][ROWS], given[DEPTH][ROWS];
    bool real[DEPTH][ROWS];
    auto fetch = [&](long long t, int i) {
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            const bool there = t >= 0 && first + n < batch;
            const size_t row = course.row(t, n);
            const bool unit = there && at.u < SIZE;
            gate[i][n] = there && at.real ? widen(gates[(course.of(row) * GATES + at.g) * SIZE + at.u]) : 0.f;
            before[i][n] = unit ? memories[course.of(course.before(row)) * SIZE + at.u] : 0.f;
            given[i][n] = unit && grad_output != nullptr ? widen(grad_output[course.of(row) * SIZE + at.u]) : 0.f;
            real[i][n] = !MASK || (there && keep[row]);
        }
    };
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) fetch(steps - 1 - i, i);
    __syncthreads();
    constexpr int buffer = ROWS * VECTORS * PITCH;
    float sums[ROWS];
    auto from_later_steps = [&](long long turn) {
        weights.multiply(sums, (const float4*)(buffers + (turn & 1) * buffer + at.g * PITCH), VECTORS * PITCH / 4);
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
#pragma unroll
            for (int far = 1; far < LANES; far *= 2) sums[n] += __shfl_xor_sync(~0u, sums[n], far);
            sums[n] += held[n];
        }
    };
    for (long long start = 0; start < steps; start += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const long long turn = start + i, t = steps - 1 - turn;
            if (t < 0) break;
            float* next = buffers + (~turn & 1) * buffer;
            from_later_steps(turn);
#pragma unroll
            for (int n = 0; n < ROWS; ++n) {
                const Values v(at, gate[i][n], s_i, s_f);
                const bool is_real = real[i][n];
                held[n] = is_real ? 0.f : sums[n];
                const float to_h = sums[n] + given[i][n];
                const float q = SQUASH_OUTPUT ? hyperbolic(now_c[n]) : now_c[n];
                const float slope = v.output * (SQUASH_OUTPUT ? 1.f - q * q : 1.f);
                float to_raw = to_c[n] + to_h * slope;
#ifdef CLIP
                // As torch.clamp: at the bound itself the gradient passes. Gates that were rounded cannot tell.
                const bool at_bound = sizeof(Stored) == 4 && fabsf(v.raw(before[i][n])) == CLIP;
                if (fabsf(now_c[n]) >= CLIP && !at_bound) to_raw = 0.f;
#endif
                float own = to_raw * v.input * (SQUASH_CANDIDATE ? 1.f - v.candidate * v.candidate : 1.f);
                if (INPUT >= 0 && at.g == INPUT) own = to_raw * v.candidate * v.input * (1.f - v.input);
                if (FORGET >= 0 && at.g == FORGET)
                    own = to_raw * (before[i][n] - (INPUT >= 0 ? 0.f : v.candidate)) * v.forget * (1.f - v.forget);
                if (OUTPUT >= 0 && at.g == OUTPUT) own = to_h * q * v.output * (1.f - v.output);
                if (!is_real) own = 0.f;
                if (is_real) to_c[n] = to_raw * v.forget;
                now_c[n] = before[i][n];
                if (at.real) {
                    next[(n * VECTORS + at.g) * PITCH + at.u] = own;
                    if (first + n < batch)
                        grad_gates[(course.of(course.row(t, n)) * GATES + at.g) * SIZE + at.u] = narrow(own);
                }
            }
            fetch(t - DEPTH, i);
            __syncthreads();
        }
    }
    from_later_steps(steps);
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
        if (at.g == 0 && at.u < SIZE && first + n < batch) {
            first_grad_hidden[course.end(n) * SIZE + at.u] = sums[n];
            first_grad_memory[course.end(n) * SIZE + at.u] = to_c[n];
        }
}
#endif
