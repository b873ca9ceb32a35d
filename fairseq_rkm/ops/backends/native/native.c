// Recurrences on CPUs in float32: the whole sequence in one call. The recurrent product and the cell's pointwise
// equations are fused: gates stay in registers between the two.
//
// ops/backends/native/native.py compiles this with the machine's C compiler, for the machine's processor, with the cell
// (a row of ops/cells.py) as macros. The work of a step is cut into tiles of some units of some rows. If all weights
// fit in a core's cache and there are enough rows, each thread takes the tiles of its own rows and never waits for
// another. Otherwise threads share all tiles. A thread has the same tiles at every step and reads its part of the
// weights. Threads then meet once a step, or three times with layer normalisation, as it needs whole rows.

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define ROWS 10 // rows x 2 vectors of sums, with room for the weights, in 32 registers
#else
#define LANES 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define ROWS 5 // in 16 registers
#endif
#define CACHE (1 << 20) // bytes of weights that a core's own cache holds
#define MIN_ROWS 4      // of a thread, for its products to be fast
#define LOOKS 1000      // at whether the others have come, before a thread lets another have its processor
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define EPSILON 1e-5f
// Growing sums are `kept` in registers. The compiler can do so only without indexing by a variable: hence the copies.

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int ivec __attribute__((vector_size(LANES * 4)));

// The first, or last, halves of two vectors, lane by lane in turn.
#ifdef __clang__
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, LOW)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, HIGH)
#else
#define INTERLEAVE_LOW(a, b) __builtin_shuffle(a, b, (ivec){LOW})
#define INTERLEAVE_HIGH(a, b) __builtin_shuffle(a, b, (ivec){HIGH})
#endif

// Loads and stores of `n` lanes; the others are zero.
INLINE vec load(const float* p, int n) {
    vec v = {0};
    if (n >= LANES) memcpy(&v, p, sizeof v);
#ifdef __AVX512F__
    else v = _mm512_maskz_loadu_ps((1 << n) - 1, p);
#else
    else memcpy(&v, p, n * sizeof(float));
#endif
    return v;
}

INLINE void store(float* p, vec v, int n) {
    if (n >= LANES) memcpy(p, &v, sizeof v);
#ifdef __AVX512F__
    else _mm512_mask_storeu_ps(p, (1 << n) - 1, v);
#else
    else memcpy(p, &v, n * sizeof(float));
#endif
}

INLINE vec splat(float x) { return x - (vec){0}; }

// NaN stays NaN.
INLINE vec clamp(vec x, float low, float high) {
    const vec l = splat(low), h = splat(high);
#if defined __AVX512F__
    return _mm512_min_ps(h, _mm512_max_ps(l, x));
#elif defined __AVX__
    return _mm256_min_ps(h, _mm256_max_ps(l, x));
#else
    const ivec under = x < l, over = x > h;
    x = (vec)(((ivec)x & ~under) | ((ivec)l & under));
    return (vec)(((ivec)x & ~over) | ((ivec)h & over));
#endif
}

// exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients); relative error about 1e-7. NaN stays.
INLINE vec exponential(vec x) {
    x = clamp(x, -87.f, 88.f);
    // Beyond 1.5 * 2^23 floats are whole, so that adding it rounds, and the last bits are n.
    const vec shifted = x * 1.44269504f + 12582912.f, k = shifted - 12582912.f;
    const vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * (vec)(((ivec)shifted << 23) + (127 << 23));
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
    float *to_memory;             // [batch][size]: of c_t, after the layer norm; null without one
    float *grad_gain, *grad_shift;  // [batch][size], zero: each row's share; null without
    float *sums;                  // room for the layer norm's sums, [batch][2]
    float *packed;                // room for the weights, RECURRENT * size times size rounded up to LANES
    int threads;
} Problem;

// This thread's share of `count` things, in whole steps of `step`.
INLINE void share(int count, int step, int thread, int threads, int* first, int* last) {
    const int blocks = (count + step - 1) / step;
    *first = blocks * thread / threads * step;
    *last = blocks * (thread + 1) / threads * step;
    if (*last > count) *last = count;
}

// What a thread does at each step.
typedef struct {
    int alone;        // whether it reads nothing of another thread's
    int row, end;     // the rows that it normalises
    int from, rows;   // the rows of its tiles: row to end, or all rows
    int blocks;       // into so many tiles of each vector of units
    int share, shares;  // the number of its part of the tiles, and of all parts
} Part;

INLINE Part part_of(const Problem* p, int thread, int threads) {
    const size_t bytes = sizeof(float) * RECURRENT * p->size * p->size;
    Part part = {.alone = threads == 1 || (bytes <= CACHE && p->batch >= MIN_ROWS * threads)};
    share(p->batch, 1, thread, threads, &part.row, &part.end);
    part.from = part.alone ? part.row : 0;
    part.rows = part.alone ? part.end - part.row : p->batch;
    part.blocks = (part.rows + ROWS - 1) / ROWS;
    part.share = part.alone ? 0 : thread;
    part.shares = part.alone ? 1 : threads;
    return part;
}

// Rows [*b, *b + result) of a block.
INLINE int block_rows(const Part* part, int block, int* b) {
    *b = part->from + part->rows * block / part->blocks;
    return part->from + part->rows * (block + 1) / part->blocks - *b;
}

#if RECURRENT
// `rows` rows of `x`, `depth` long and `stride` apart, times one or two columns of vectors of the packed weights.
INLINE void product_of(const float* x, size_t stride, int depth, const float* w, const int rows, const int width,
                       vec (*sums)[2]) {
    vec kept[ROWS][2];
    UNROLL for (int i = 0; i < rows; ++i)
        UNROLL for (int v = 0; v < width; ++v) kept[i][v] = splat(0.f);
    for (int k = 0; k < depth; ++k, w += LANES) {
        vec weights[2];
        UNROLL for (int v = 0; v < width; ++v) memcpy(&weights[v], w + (size_t)v * depth * LANES, sizeof(vec));
        UNROLL for (int i = 0; i < rows; ++i)
            UNROLL for (int v = 0; v < width; ++v) kept[i][v] += x[i * stride + k] * weights[v];
    }
    UNROLL for (int i = 0; i < rows; ++i)
        UNROLL for (int v = 0; v < width; ++v) sums[i][v] = kept[i][v];
}

#define ROWS_CASE(rows) \
    case rows: \
        if (width == 2) product_of(x, stride, depth, w, rows, 2, sums); \
        else product_of(x, stride, depth, w, rows, 1, sums); \
        break;

static void product(const float* x, size_t stride, int depth, const float* w, int rows, int width, vec (*sums)[2]) {
    switch (rows) {
        ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5)
#if ROWS > 5
        ROWS_CASE(6) ROWS_CASE(7) ROWS_CASE(8) ROWS_CASE(9) ROWS_CASE(10)
#endif
    }
}
#endif

// The forward pass.

#if RECURRENT
// A square of LANES rows becomes its transpose: as often as LANES can be halved, rows are interleaved with those that
// are half the square away.
INLINE void transpose(vec* rows) {
    const int half = LANES / 2;
    UNROLL for (int round = 1; round < LANES; round *= 2) {
        vec mixed[LANES];
        UNROLL for (int i = 0; i < half; ++i) {
            mixed[2 * i] = INTERLEAVE_LOW(rows[i], rows[i + half]);
            mixed[2 * i + 1] = INTERLEAVE_HIGH(rows[i], rows[i + half]);
        }
        UNROLL for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
    }
}

// packed[j / LANES][RECURRENT][k][LANES]
static void pack(const Problem* p, int first, int last) {
    const int d = p->size;
    for (int j = first; j < last; j += LANES)
        for (int r = 0; r < RECURRENT; ++r)
            for (int k = 0; k < d; k += LANES) {
                const float* from = p->weights + (size_t)(r * d + j) * d + k;
                float* to = p->packed + (((size_t)(j / LANES) * RECURRENT + r) * d + k) * LANES;
                vec rows[LANES];
                UNROLL for (int u = 0; u < LANES; ++u)
                    rows[u] = j + u < d ? load(from + (size_t)u * d, d - k) : splat(0.f);
                transpose(rows);
                UNROLL for (int i = 0; i < LANES; ++i)
                    if (k + i < d) memcpy(to + i * LANES, &rows[i], sizeof(vec));
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
static void forward_tile(const Problem* p, int t, int j, int n, int b, int rows) {
    const int d = p->size;
#if RECURRENT
    vec sums[(RECURRENT + 1) / 2][ROWS][2];
    const float* h = p->hidden + ((size_t)t * p->batch + b) * d;
    const float* w = p->packed + (size_t)(j / LANES) * RECURRENT * d * LANES;
    for (int r = 0; r < RECURRENT; r += 2)
        product(h, d, d, w + (size_t)r * d * LANES, rows, RECURRENT - r > 1 ? 2 : 1, sums[r / 2]);
#endif
    for (int i = 0; i < rows; ++i) {
        const size_t row = (size_t)t * p->batch + b + i;
        float* gates = p->gates + row * GATES * d + j;
        vec a[GATES];
        for (int g = 0; g < GATES; ++g) {
            a[g] = load(gates + (size_t)g * d, n);
#if RECURRENT
            const int r = g - FIRST_RECURRENT;
            if (r >= 0 && r < RECURRENT) a[g] += sums[r / 2][i][r % 2];
#endif
            if (g) a[g] = sigmoid(a[g]);
            else if (SQUASH_CANDIDATE) a[g] = hyperbolic(a[g]);
            store(gates + (size_t)g * d, a[g], n);
        }
        const vec before = load(p->memory + row * d + j, n);
        vec c = input_scale(p, a) * a[0];
        if (HAS_MEMORY) c += forget_scale(p, a, j, n) * before;
#ifdef CLIP
        c = clamp(c, -CLIP, CLIP);
#endif
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

// Where threads meet. OpenMP's own barrier looks on for milliseconds: at every step, if two threads have to share a
// processor, since another program has the other one.
typedef struct {
    int arrived, round;
} Meeting;

static void meet(Meeting* m, int threads) {
    const int round = __atomic_load_n(&m->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&m->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&m->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&m->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int looks = 0; __atomic_load_n(&m->round, __ATOMIC_ACQUIRE) == round;) {
        if (looks == LOOKS) {
            sched_yield();
            continue;
        }
        ++looks;
#ifdef __AVX__
        _mm_pause();
#endif
    }
}

void recurrence_forward(const Problem* p) {
    const int d = p->size, vectors = (d + LANES - 1) / LANES;
    Meeting meeting = {0, 0};
#pragma omp parallel num_threads(p->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Part part = part_of(p, thread, threads);
        int first, last;
#if RECURRENT
        share(d, LANES, thread, threads, &first, &last);
        pack(p, first, last);
        meet(&meeting, threads);
#endif
        share(vectors * part.blocks, 1, part.share, part.shares, &first, &last);
        for (int t = 0; t < p->steps; ++t) {
            for (int tile = first; tile < last; ++tile) {
                const int j = tile / part.blocks * LANES;
                int b;
                const int rows = block_rows(&part, tile % part.blocks, &b);
                forward_tile(p, t, j, d - j < LANES ? d - j : LANES, b, rows);
            }
            if (p->norm && !part.alone) meet(&meeting, threads);
            for (int b = part.row; p->norm && b < part.end; ++b) finish_row(p, t, b);
            if ((RECURRENT || p->norm) && !part.alone) meet(&meeting, threads);
        }
    }
}

// Room for so many numbers, rounded up to whole vectors, at *room, which moves on.
static float* take(float** room, size_t count) {
    float* taken = *room;
    *room += (count + LANES - 1) / LANES * LANES;
    return taken;
}

// A few steps without a trace for a backward pass: as recurrence_forward, with all that it keeps in memory of its own.
// A state of null is zeros. The result is whether there was memory. Arguments that come one by one take less time.
int recurrence_steps(int steps, int batch, int size, int threads, const float* weights, const float* gain,
                     const float* shift, float scale_i, float scale_f, float* gates, const float* first_hidden,
                     const float* first_memory, float* output, float* last_hidden, float* last_memory) {
    const size_t count = (size_t)batch * size, bytes = count * sizeof(float);
    const size_t states = (steps + 1) * count, packed = RECURRENT * (size_t)size * (size + LANES);
    float* const whole = malloc((2 * states + packed + size + 2 * (size_t)steps * batch + 5 * LANES) * sizeof(float));
    if (!whole) return 0;
    float *room = whole, *hidden = take(&room, states), *memory = take(&room, states), *scales = take(&room, size);
    for (int j = 0; j < size; ++j) scales[j] = scale_f;
    if (first_hidden) memcpy(hidden, first_hidden, bytes);
    else memset(hidden, 0, bytes);
    if (first_memory) memcpy(memory, first_memory, bytes);
    else memset(memory, 0, bytes);
    const Problem p = {.steps = steps, .batch = batch, .size = size, .threads = threads, .weights = weights,
                       .norm = gain != NULL, .gain = gain, .shift = shift, .scale_f = scales, .scale_i = scale_i,
                       .gates = gates, .hidden = hidden, .memory = memory,
                       .moments = take(&room, 2 * (size_t)steps * batch), .packed = room};
    recurrence_forward(&p);
    memcpy(output, hidden + count, steps * bytes);
    memcpy(last_hidden, hidden + steps * count, bytes);
    memcpy(last_memory, memory + steps * count, bytes);
    free(whole);
    return 1;
}

// The backward pass.
//
// A tile is one or two vectors of units wide. A tile of step t starts with the gradients that step t + 1 feeds to h_t.

#if RECURRENT
// packed[j / LANES][k][LANES], k over the recurrent gates' rows.
static void pack_columns(const Problem* p, int first, int last) {
    const int d = p->size, depth = RECURRENT * d;
    for (int j = first; j < last; j += LANES) {
        float* to = p->packed + (size_t)(j / LANES) * depth * LANES;
        const int n = d - j < LANES ? d - j : LANES;
        for (int k = 0; k < depth; ++k, to += LANES) {
            memcpy(to, p->weights + (size_t)k * d + j, n * sizeof(float));
            memset(to + n, 0, (LANES - n) * sizeof(float));
        }
    }
}

#endif

// From h_t's gradient to the output gate's, and to c_t's, which it returns.
INLINE vec through_output(const Problem* p, size_t row, int b, int j, int n, vec to_h) {
    const int d = p->size;
    const vec to_c = load(p->grad_memory + (size_t)b * d + j, n);
    float* grad_h = p->grad_hidden + (size_t)b * d + j;
    if (p->keep && !p->keep[row]) {
        store(grad_h, to_h, n);
        return to_c;
    }
    store(grad_h, splat(0.f), n);
    to_h += load(p->grad_output + row * d + j, n);
    const vec c = load(p->memory + (row + p->batch) * d + j, n), q = SQUASH_OUTPUT ? hyperbolic(c) : c;
    vec slope = SQUASH_OUTPUT ? 1.f - q * q : splat(1.f);
#if OUTPUT >= 0
    const vec o = load(p->gates + (row * GATES + OUTPUT) * d + j, n);
    slope *= o;
    store(p->grad_gates + (row * GATES + OUTPUT) * d + j, to_h * q * o * (1.f - o), n);
#endif
    return to_c + to_h * slope;
}

// The layer norm's two sums over a row, into its moments' place in `sums`.
static void norm_sums(const Problem* p, int t, int b, float* sums) {
    const int d = p->size;
    const float *to_c = p->to_memory + (size_t)b * d, *c = p->memory + ((size_t)(t + 1) * p->batch + b) * d;
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
INLINE void through_memory(const Problem* p, size_t row, int b, int j, int n, vec to_c) {
    const int d = p->size;
    float *grad_gate = p->grad_gates + row * GATES * d + j, *grad_c = p->grad_memory + (size_t)b * d + j;
    if (p->keep && !p->keep[row]) {
        for (int g = 0; g < GATES; ++g) store(grad_gate + (size_t)g * d, splat(0.f), n);
        store(grad_c, to_c, n);
        return;
    }
    vec a[GATES];
    for (int g = 0; g < GATES; ++g) a[g] = load(p->gates + (row * GATES + g) * d + j, n);
    const vec before = load(p->memory + row * d + j, n), i = input_scale(p, a), f = forget_scale(p, a, j, n);
    if (p->norm) {
        const float mean = p->moments[row * 2], inverse = p->moments[row * 2 + 1], *sums = p->sums + 2 * b;
        float *gain = p->grad_gain + (size_t)b * d + j, *shift = p->grad_shift + (size_t)b * d + j;
        vec raw = i * a[0];
        if (HAS_MEMORY) raw += f * before;
        const vec normal = (raw - mean) * inverse;
        store(gain, load(gain, n) + to_c * normal, n);
        store(shift, load(shift, n) + to_c, n);
        to_c = inverse * (to_c * load(p->gain + j, n) - sums[0] - normal * sums[1]);
    }
#ifdef CLIP
    // As torch.clamp: the gradient passes at the bound itself, so that the memory before clipping has to be known.
    vec raw = i * a[0];
    if (HAS_MEMORY) raw += f * before;
    to_c = (vec)((ivec)to_c & (raw >= -CLIP) & (raw <= CLIP));
#endif
    store(grad_gate, to_c * i * (SQUASH_CANDIDATE ? 1.f - a[0] * a[0] : splat(1.f)), n);
#if INPUT >= 0
    store(grad_gate + (size_t)INPUT * d, to_c * a[0] * i * (1.f - i), n);
#endif
#if FORGET >= 0
    store(grad_gate + (size_t)FORGET * d, to_c * (INPUT >= 0 ? before : before - a[0]) * f * (1.f - f), n);
#endif
    store(grad_c, HAS_MEMORY ? to_c * f : splat(0.f), n);
}

typedef struct {
    int j, width, b, rows;
} Tile;

INLINE Tile tile_at(const Problem* p, const Part* part, int tile) {
    Tile at = {.j = tile / part->blocks * 2 * LANES};
    at.width = p->size - at.j > LANES ? 2 : 1;
    at.rows = block_rows(part, tile % part->blocks, &at.b);
    return at;
}

// The first tile of a share: a tile costs its width, and only those of the last column may be one wide.
INLINE int first_tile(int vectors, int blocks, int share, int shares) {
    const int full = vectors / 2 * blocks, before = (int)((long)vectors * blocks * share / shares);
    return before <= 2 * full ? (before + 1) / 2 : before - full;
}

// Step t of a tile, up to c_t's gradient if the layer norm then needs whole rows; before the first step, h's only.
static void backward_tile(const Problem* p, int t, Tile at) {
    const int d = p->size;
    vec sums[ROWS][2] = {0};
#if RECURRENT
    if (t + 1 < p->steps) {
        const int depth = RECURRENT * d;
        const size_t row = (size_t)(t + 1) * p->batch + at.b;
        const float* grads = p->grad_gates + (row * GATES + FIRST_RECURRENT) * d;
        const float* w = p->packed + (size_t)(at.j / LANES) * depth * LANES;
        product(grads, (size_t)GATES * d, depth, w, at.rows, at.width, sums);
    }
#endif
    for (int i = 0; i < at.rows; ++i)
        for (int v = 0; v < at.width; ++v) {
            const int b = at.b + i, j = at.j + v * LANES, n = d - j;
            float* grad_h = p->grad_hidden + (size_t)b * d + j;
            const vec to_h = load(grad_h, n) + sums[i][v];
            if (t < 0) {
                store(grad_h, to_h, n);
                continue;
            }
            const size_t row = (size_t)t * p->batch + b;
            const vec to_c = through_output(p, row, b, j, n, to_h);
            if (p->norm) store(p->to_memory + (size_t)b * d + j, to_c, n);
            else through_memory(p, row, b, j, n, to_c);
        }
}

static void finish_tile(const Problem* p, int t, Tile at) {
    const int d = p->size;
    for (int i = 0; i < at.rows; ++i)
        for (int v = 0; v < at.width; ++v) {
            const int b = at.b + i, j = at.j + v * LANES;
            through_memory(p, (size_t)t * p->batch + b, b, j, d - j, load(p->to_memory + (size_t)b * d + j, d - j));
        }
}

void recurrence_backward(const Problem* p) {
    const int d = p->size, vectors = (d + LANES - 1) / LANES;
    Meeting meeting = {0, 0};
#pragma omp parallel num_threads(p->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Part part = part_of(p, thread, threads);
#if RECURRENT
        int from, to;
        share(d, LANES, thread, threads, &from, &to);
        pack_columns(p, from, to);
        meet(&meeting, threads);
#endif
        const int first = first_tile(vectors, part.blocks, part.share, part.shares);
        const int last = first_tile(vectors, part.blocks, part.share + 1, part.shares);
        for (int t = p->steps - 1; t >= 0; --t) {
            for (int i = first; i < last; ++i) backward_tile(p, t, tile_at(p, &part, i));
            if (p->norm && !part.alone) meet(&meeting, threads);
            for (int b = part.row; p->norm && b < part.end; ++b) norm_sums(p, t, b, p->sums + 2 * b);
            if (p->norm && !part.alone) meet(&meeting, threads);
            for (int i = first; p->norm && i < last; ++i) finish_tile(p, t, tile_at(p, &part, i));
            if ((RECURRENT || p->norm) && !part.alone) meet(&meeting, threads);
        }
        if (RECURRENT)
            for (int i = first; i < last; ++i) backward_tile(p, -1, tile_at(p, &part, i));
    }
}
