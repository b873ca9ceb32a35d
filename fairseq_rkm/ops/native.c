// Recurrences on CPUs in float32: the whole sequence in one call, the recurrent product and the cell's pointwise
// equations fused, so that gates never leave the registers between the two.
//
// ops/native.py compiles this with the C compiler at hand, for the processor at hand, with the cell (a row of
// ops/cells.py) as macros. Threads share the units of the layer and meet once a step (three times with layer
// normalisation, which needs whole rows).

#include <math.h>
#include <omp.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define MAX_ROWS 6   // rows x RECURRENT vectors of sums, with room for the weights, in 32 registers
#define WIDE_ROWS 10 // rows x 2 vectors
#else
#define LANES 8
#define MAX_ROWS 3
#define WIDE_ROWS 5
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define EPSILON 1e-5f
// Sums are `kept` in registers while they grow, which needs that nothing indexes them by a variable: hence the copies.

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int ivec __attribute__((vector_size(LANES * 4)));

// Loads and stores of `n` lanes; the others are zero.
INLINE vec load(const float* p, int n) {
    vec v = {0};
    if (n >= LANES) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, n * sizeof(float));
    return v;
}

INLINE void store(float* p, vec v, int n) {
    if (n >= LANES) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, n * sizeof(float));
}

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec clamp(vec x, float low, float high) {
    const ivec under = x < low, over = x > high;
    const vec l = splat(low), h = splat(high);
    x = (vec)(((ivec)x & ~under) | ((ivec)l & under));
    return (vec)(((ivec)x & ~over) | ((ivec)h & over));
}

// exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients); relative error about 1e-7. NaN stays.
INLINE vec exponential(vec x) {
    const vec clamped = clamp(x, -87.f, 88.f);
    const vec half = (vec)(((ivec)clamped & (int)0x80000000) | (ivec)splat(0.5f));
    const ivec n = __builtin_convertvector(clamped * 1.44269504f + half, ivec);
    const vec k = __builtin_convertvector(n, vec), r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const vec y = (vec)((ivec)p + (n << 23));
    const ivec is_nan = x != x;
    return (vec)(((ivec)y & ~is_nan) | ((ivec)x & is_nan));
}

INLINE vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }
INLINE vec hyperbolic(vec x) { return 2.f / (1.f + exponential(-2.f * x)) - 1.f; }

INLINE float sum_lanes(vec v) {
    float s = 0;
    for (int i = 0; i < LANES; ++i) s += v[i];
    return s;
}

typedef struct {
    int steps, batch, size, norm;
    const float *weights;         // [RECURRENT * size][size]
    const float *gain, *shift;    // [size], or null
    const float *scale_f;         // [size], where f is constant
    float scale_i;
    const unsigned char* keep;    // [steps][batch], or null
    float *gates;                 // [steps][batch][GATES * size]: W X + b, then the activated gates
    float *hidden, *memory;       // [steps + 1][batch][size], the first given
    float *moments;               // [steps][batch][2]: mean and reciprocal deviation, or null
    // Backward:
    const float *grad_output;     // [steps][batch][size]
    float *grad_hidden, *grad_memory;  // [batch][size]: of the final state, then of the initial one
    float *grad_gates;            // [steps][batch][GATES * size]
    float *to_memory;             // [steps][batch][size]: of c_t, after the layer norm
    float *grad_gain, *grad_shift;  // [size], zero, or null
    float *sums;                  // room for the layer norm's sums, [batch][2]
    float *packed;                // room for the weights, RECURRENT * size times size rounded up to 2 LANES
    int threads;
} Problem;

// This thread's share of `count` things, in whole steps of `step`.
INLINE void share(int count, int step, int thread, int threads, int* first, int* last) {
    const int blocks = (count + step - 1) / step;
    *first = blocks * thread / threads * step;
    *last = blocks * (thread + 1) / threads * step;
    if (*last > count) *last = count;
}

// ---- forward

#if RECURRENT
static void pack(const Problem* p, int first, int last) {
    const int d = p->size;
    for (int j = first; j < last; j += LANES) {
        float* to = p->packed + (size_t)(j / LANES) * d * RECURRENT * LANES;
        const int n = d - j < LANES ? d - j : LANES;
        for (int r = 0; r < RECURRENT; ++r)
            for (int u = 0; u < LANES; ++u) {
                const float* from = p->weights + (size_t)(r * d + j + u) * d;
                for (int k = 0; k < d; ++k) to[(size_t)k * RECURRENT * LANES + r * LANES + u] = u < n ? from[k] : 0.f;
            }
    }
}
#endif

INLINE vec input_scale(const Problem* p, const vec* a) {
#if INPUT >= 0
    return a[INPUT];
#elif FORGET >= 0
    return 1.f - a[FORGET];
#else
    return splat(p->scale_i);
#endif
}

INLINE vec forget_scale(const Problem* p, const vec* a, int j, int n) {
#if FORGET >= 0
    return a[FORGET];
#elif HAS_MEMORY
    return load(p->scale_f + j, n);
#else
    return splat(0.f);
#endif
}

INLINE vec emit(vec c, vec output_gate) {
    if (SQUASH_OUTPUT) c = hyperbolic(c);
    return OUTPUT >= 0 ? output_gate * c : c;
}

// Units [j, j + n) of `rows` rows from b on, at step t: product, gates and memory; without layer norm the output too.
INLINE void forward_tile(const Problem* p, int t, int j, int n, int b, const int rows) {
    const int d = p->size;
#if RECURRENT
    vec sums[MAX_ROWS][RECURRENT], kept[MAX_ROWS][RECURRENT];
    UNROLL for (int i = 0; i < rows; ++i)
        UNROLL for (int r = 0; r < RECURRENT; ++r) kept[i][r] = splat(0.f);
    const float* w = p->packed + (size_t)(j / LANES) * d * RECURRENT * LANES;
    const float* h = p->hidden + ((size_t)t * p->batch + b) * d;
    for (int k = 0; k < d; ++k, w += RECURRENT * LANES) {
        vec weights[RECURRENT];
        UNROLL for (int r = 0; r < RECURRENT; ++r) memcpy(&weights[r], w + r * LANES, sizeof(vec));
        UNROLL for (int i = 0; i < rows; ++i) {
            const float x = h[(size_t)i * d + k];
            UNROLL for (int r = 0; r < RECURRENT; ++r) kept[i][r] += x * weights[r];
        }
    }
    UNROLL for (int i = 0; i < rows; ++i)
        UNROLL for (int r = 0; r < RECURRENT; ++r) sums[i][r] = kept[i][r];
#endif
    for (int i = 0; i < rows; ++i) {
        const size_t row = (size_t)t * p->batch + b + i;
        float* gates = p->gates + row * GATES * d + j;
        vec a[GATES];
        for (int g = 0; g < GATES; ++g) {
            a[g] = load(gates + (size_t)g * d, n);
#if RECURRENT
            if (g >= FIRST_RECURRENT && g < FIRST_RECURRENT + RECURRENT) a[g] += sums[i][g - FIRST_RECURRENT];
#endif
            if (g) a[g] = sigmoid(a[g]);
            else if (SQUASH_CANDIDATE) a[g] = hyperbolic(a[g]);
            store(gates + (size_t)g * d, a[g], n);
        }
        const vec before = load(p->memory + row * d + j, n);
        vec c = input_scale(p, a) * a[0];
        if (HAS_MEMORY) c += forget_scale(p, a, j, n) * before;
        const size_t next = (row + p->batch) * d + j;
        if (p->norm) {
            store(p->memory + next, c, n);
            continue;
        }
        vec out = emit(c, a[GATES - 1]);
        if (p->keep && !p->keep[row]) {
            c = before;
            out = load(p->hidden + row * d + j, n);
        }
        store(p->memory + next, c, n);
        store(p->hidden + next, out, n);
    }
}

INLINE void forward_rows(const Problem* p, int t, int j, int n, int b, int rows) {
    switch (rows) {
        case 1: forward_tile(p, t, j, n, b, 1); break;
        case 2: forward_tile(p, t, j, n, b, 2); break;
        case 3: forward_tile(p, t, j, n, b, 3); break;
#if MAX_ROWS > 3
        case 4: forward_tile(p, t, j, n, b, 4); break;
        case 5: forward_tile(p, t, j, n, b, 5); break;
        case 6: forward_tile(p, t, j, n, b, 6); break;
#endif
    }
}

// Layer norm and output of one row.
static void finish_row(const Problem* p, int t, int b) {
    const int d = p->size;
    const size_t row = (size_t)t * p->batch + b, next = (row + p->batch) * d;
    float *c = p->memory + next, *h = p->hidden + next;
    if (p->keep && !p->keep[row]) {
        memcpy(c, p->memory + row * d, d * sizeof(float));
        memcpy(h, p->hidden + row * d, d * sizeof(float));
        return;
    }
    vec sum = splat(0.f), squares = splat(0.f);
    for (int j = 0; j < d; j += LANES) sum += load(c + j, d - j);
    const float mean = sum_lanes(sum) / d;
    for (int j = 0; j < d; j += LANES) {
        const int n = d - j;
        const vec gap = load(c + j, n) - mean;
        if (n >= LANES) squares += gap * gap;
        else for (int i = 0; i < n; ++i) squares[i] += gap[i] * gap[i];
    }
    const float inverse = 1.f / sqrtf(sum_lanes(squares) / d + EPSILON);
    p->moments[row * 2] = mean;
    p->moments[row * 2 + 1] = inverse;
    const float* gate = p->gates + row * GATES * d + (size_t)(GATES - 1) * d;
    for (int j = 0; j < d; j += LANES) {
        const int n = d - j;
        const vec normal = (load(c + j, n) - mean) * inverse * load(p->gain + j, n) + load(p->shift + j, n);
        store(c + j, normal, n);
        store(h + j, emit(normal, load(gate + j, n)), n);
    }
}

void recurrence_forward(const Problem* p) {
    const int d = p->size;
#pragma omp parallel num_threads(p->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int blocks = (p->batch + MAX_ROWS - 1) / MAX_ROWS;
        int first, last, row, end;
        share(d, LANES, thread, threads, &first, &last);
        share(p->batch, 1, thread, threads, &row, &end);
#if RECURRENT
        pack(p, first, last);
#endif
        for (int t = 0; t < p->steps; ++t) {
            for (int j = first; j < last; j += LANES)
                for (int block = 0; block < blocks; ++block) {
                    const int b = p->batch * block / blocks, stop = p->batch * (block + 1) / blocks;
                    forward_rows(p, t, j, d - j < LANES ? d - j : LANES, b, stop - b);
                }
            if (p->norm) {
#pragma omp barrier
                for (int b = row; b < end; ++b) finish_row(p, t, b);
            }
            if (RECURRENT || p->norm) {
#pragma omp barrier
            }
        }
    }
}

// ---- backward

#if RECURRENT
// Two vectors of units wide: packed[j / (2 LANES)][k][2 LANES], k over the recurrent gates' rows.
#define PAIR (2 * LANES)

static void pack_pairs(const Problem* p, int first, int last) {
    const int d = p->size, depth = RECURRENT * d;
    for (int j = first; j < last; j += PAIR) {
        float* to = p->packed + (size_t)(j / PAIR) * depth * PAIR;
        const int n = d - j < PAIR ? d - j : PAIR;
        for (int k = 0; k < depth; ++k, to += PAIR) {
            memcpy(to, p->weights + (size_t)k * d + j, n * sizeof(float));
            memset(to + n, 0, (PAIR - n) * sizeof(float));
        }
    }
}

// grad_hidden[b ...][j ...] += the gates' gradients at step t times the weights.
INLINE void feed_back_tile(const Problem* p, int t, int j, int n, int b, const int rows) {
    const int d = p->size, depth = RECURRENT * d;
    vec sums[WIDE_ROWS][2], kept[WIDE_ROWS][2];
    UNROLL for (int i = 0; i < rows; ++i) kept[i][0] = kept[i][1] = splat(0.f);
    const float* grads = p->grad_gates + ((size_t)t * p->batch + b) * GATES * d + (size_t)FIRST_RECURRENT * d;
    const float* w = p->packed + (size_t)(j / PAIR) * depth * PAIR;
    for (int k = 0; k < depth; ++k, w += PAIR) {
        vec w0, w1;
        memcpy(&w0, w, sizeof w0);
        memcpy(&w1, w + LANES, sizeof w1);
        UNROLL for (int i = 0; i < rows; ++i) {
            const float x = grads[(size_t)i * GATES * d + k];
            kept[i][0] += x * w0;
            kept[i][1] += x * w1;
        }
    }
    UNROLL for (int i = 0; i < rows; ++i) sums[i][0] = kept[i][0], sums[i][1] = kept[i][1];
    for (int i = 0; i < rows; ++i) {
        float* to = p->grad_hidden + (size_t)(b + i) * d + j;
        store(to, load(to, n) + sums[i][0], n);
        if (n > LANES) store(to + LANES, load(to + LANES, n - LANES) + sums[i][1], n - LANES);
    }
}

INLINE void feed_back_rows(const Problem* p, int t, int j, int n, int b, int rows) {
    switch (rows) {
        case 1: feed_back_tile(p, t, j, n, b, 1); break;
        case 2: feed_back_tile(p, t, j, n, b, 2); break;
        case 3: feed_back_tile(p, t, j, n, b, 3); break;
        case 4: feed_back_tile(p, t, j, n, b, 4); break;
        case 5: feed_back_tile(p, t, j, n, b, 5); break;
#if WIDE_ROWS > 5
        case 6: feed_back_tile(p, t, j, n, b, 6); break;
        case 7: feed_back_tile(p, t, j, n, b, 7); break;
        case 8: feed_back_tile(p, t, j, n, b, 8); break;
        case 9: feed_back_tile(p, t, j, n, b, 9); break;
        case 10: feed_back_tile(p, t, j, n, b, 10); break;
#endif
    }
}

static void feed_back(const Problem* p, int t, int first, int last) {
    const int blocks = (p->batch + WIDE_ROWS - 1) / WIDE_ROWS;
    for (int j = first; j < last; j += PAIR)
        for (int block = 0; block < blocks; ++block) {
            const int b = p->batch * block / blocks, rows = p->batch * (block + 1) / blocks - b;
            feed_back_rows(p, t, j, last - j, b, rows);
        }
}
#endif

// From h_t's gradient to the output gate's, and to c_t's in to_memory.
static void through_output(const Problem* p, int t, int b, int first, int last) {
    const int d = p->size;
    const size_t row = (size_t)t * p->batch + b;
    const int real = !p->keep || p->keep[row];
    for (int j = first; j < last; j += LANES) {
        const int n = last - j;
        float* grad_h = p->grad_hidden + (size_t)b * d + j;
        vec to_c = load(p->grad_memory + (size_t)b * d + j, n);
        if (real) {
            const vec to_h = load(grad_h, n) + load(p->grad_output + row * d + j, n);
            const vec c = load(p->memory + (row + p->batch) * d + j, n), q = SQUASH_OUTPUT ? hyperbolic(c) : c;
            vec slope = SQUASH_OUTPUT ? 1.f - q * q : splat(1.f);
#if OUTPUT >= 0
            const vec o = load(p->gates + (row * GATES + OUTPUT) * d + j, n);
            slope *= o;
            store(p->grad_gates + (row * GATES + OUTPUT) * d + j, to_h * q * o * (1.f - o), n);
#endif
            to_c += to_h * slope;
            store(grad_h, splat(0.f), n);
        }
        store(p->to_memory + row * d + j, to_c, n);
    }
}

// The layer norm's two sums over a row, into its moments' place in `sums`.
static void norm_sums(const Problem* p, int t, int b, float* sums) {
    const int d = p->size;
    const size_t row = (size_t)t * p->batch + b;
    const float *to_c = p->to_memory + row * d, *c = p->memory + (row + p->batch) * d;
    vec plain = splat(0.f), weighted = splat(0.f);
    for (int j = 0; j < d; j += LANES) {
        const int n = d - j;
        const vec gain = load(p->gain + j, n), x = load(to_c + j, n) * gain;
        plain += x;
        // gain * normal = c - shift, which spares a division.
        weighted += load(to_c + j, n) * (load(c + j, n) - load(p->shift + j, n));
    }
    sums[0] = sum_lanes(plain) / d;
    sums[1] = sum_lanes(weighted) / d;
}

// From c_t's gradient to the memory gates' and to c_{t-1}'s.
static void through_memory(const Problem* p, int t, int b, int first, int last, const float* sums) {
    const int d = p->size;
    const size_t row = (size_t)t * p->batch + b;
    const int real = !p->keep || p->keep[row];
    for (int j = first; j < last; j += LANES) {
        const int n = last - j;
        float* grad_gate = p->grad_gates + row * GATES * d + j;
        vec to_c = load(p->to_memory + row * d + j, n);
        if (!real) {
            for (int g = 0; g < GATES; ++g) store(grad_gate + (size_t)g * d, splat(0.f), n);
            store(p->grad_memory + (size_t)b * d + j, to_c, n);
            continue;
        }
        vec a[GATES];
        for (int g = 0; g < GATES; ++g) a[g] = load(p->gates + (row * GATES + g) * d + j, n);
        const vec before = load(p->memory + row * d + j, n), i = input_scale(p, a), f = forget_scale(p, a, j, n);
        if (p->norm) {
            const float mean = p->moments[row * 2], inverse = p->moments[row * 2 + 1];
            vec raw = i * a[0];
            if (HAS_MEMORY) raw += f * before;
            const vec normal = (raw - mean) * inverse;
            store(p->grad_gain + j, load(p->grad_gain + j, n) + to_c * normal, n);
            store(p->grad_shift + j, load(p->grad_shift + j, n) + to_c, n);
            to_c = inverse * (to_c * load(p->gain + j, n) - sums[0] - normal * sums[1]);
        }
        store(grad_gate, to_c * i * (SQUASH_CANDIDATE ? 1.f - a[0] * a[0] : splat(1.f)), n);
#if INPUT >= 0
        store(grad_gate + (size_t)INPUT * d, to_c * a[0] * i * (1.f - i), n);
#endif
#if FORGET >= 0
        store(grad_gate + (size_t)FORGET * d, to_c * (INPUT >= 0 ? before : before - a[0]) * f * (1.f - f), n);
#endif
        store(p->grad_memory + (size_t)b * d + j, HAS_MEMORY ? to_c * f : splat(0.f), n);
    }
}

void recurrence_backward(const Problem* p) {
    const int d = p->size;
#pragma omp parallel num_threads(p->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int first, last, row, end;
        share(d, 2 * LANES, thread, threads, &first, &last);
        share(p->batch, 1, thread, threads, &row, &end);
#if RECURRENT
        pack_pairs(p, first, last);
#endif
        for (int t = p->steps - 1; t >= 0; --t) {
#if RECURRENT
            if (t < p->steps - 1) feed_back(p, t + 1, first, last);
#endif
            for (int b = 0; b < p->batch; ++b) through_output(p, t, b, first, last);
            if (p->norm) {
#pragma omp barrier
                for (int b = row; b < end; ++b) norm_sums(p, t, b, p->sums + 2 * b);
#pragma omp barrier
            }
            for (int b = 0; b < p->batch; ++b) through_memory(p, t, b, first, last, p->sums + 2 * b);
            if (RECURRENT || p->norm) {
#pragma omp barrier
            }
        }
#if RECURRENT
        if (p->steps) feed_back(p, 0, first, last);
#endif
    }
}
