// Steps without gradients; few_steps.py compiles this with the cell as macros.
//
// `step_by_warps` is all of a step, products included: a warp takes one unit of ROWS rows of the batch. Its lanes share
// the products' sums, and read WIDTH numbers at once. `steps_by_warps` is several steps of this kind: all blocks are
// resident, and meet after each step. `step_by_tiles` is a step on the tensor cores: a block takes UNITS units, ROWS
// rows at a time. For larger problems cuBLAS multiplies, and `pointwise_step` follows.

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

// The results of a step.
struct Results {
    const float* before;
    Stored *output, *hidden;
    float* memory;
    int output_row, size;
    __device__ __forceinline__ void finish(int row, int unit, const float* sums) const {
        const int at = row * size + unit;
        const float c = next_memory(sums, before != nullptr ? before[at] : 0.f);
        const Stored result = narrow(output_of(sums, c));
        memory[at] = c;
        output[row * output_row + unit] = result;
        if (hidden != nullptr) hidden[at] = result;
    }
};
// x: [batch] rows, x_row numbers apart, of `features`. h: [batch] rows, h_row numbers apart, of `size`; null for zeros.
// before: [batch][size]; null for zeros; may be `memory`. input: [GATES * size][features].
// recurrent: [RECURRENT * size][size]. bias: [GATES * size]; null for zeros. output: [batch] rows, output_row numbers
// apart. hidden: [batch][size], the output once more; null if it is not wanted. memory: [batch][size].
#define CALL_ARGUMENTS                                                                                              \
    const Stored *__restrict__ x, const Stored *__restrict__ h, const float *before,                                \
        const Stored *__restrict__ input, const Stored *__restrict__ recurrent, const Stored *__restrict__ bias,    \
        Stored *__restrict__ output, Stored *__restrict__ hidden, float *memory, int x_row, int h_row,              \
        int output_row, int features, int size, int batch

#ifdef WIDTH
constexpr int UNROLL = ROWS > 8 ? 1 : ROWS > 1 ? 2 : 4;

struct alignas(WIDTH * ELEMENT) Vector {
    Stored at[WIDTH];
};

// Numbers that other blocks wrote in this launch. They come from the second-level cache: the first-level cache may hold
// older ones. volatile: the compiler leaves the read behind the meeting before it.
__device__ __forceinline__ Vector fresh(const Stored* at) {
    union {
        u32 word[4];
        Vector vector;
    } read;
#if WIDTH * ELEMENT == 16
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(read.word[0]), "=r"(read.word[1]), "=r"(read.word[2]), "=r"(read.word[3])
                 : "l"(at) : "memory");
#elif WIDTH * ELEMENT == 8
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(read.word[0]), "=r"(read.word[1]) : "l"(at) : "memory");
#elif WIDTH * ELEMENT == 4
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(read.word[0]) : "l"(at) : "memory");
#else
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(read.vector.at[0]) : "l"(at) : "memory");
#endif
    return read.vector;
}

// Add this lane's share of the products with COUNT gates, from the gate FIRST on. FRESH: other blocks wrote x.
template <int FIRST, int COUNT, bool FRESH = false>
__device__ __forceinline__ void multiply(const Stored* x, const int* rows, const Stored* __restrict__ weights,
                                         int size, int depth, int lane, float (&sums)[ROWS][GATES]) {
    const long long gate = (long long)size * depth;
#pragma unroll UNROLL
    for (int k = lane * WIDTH; k < depth; k += LANES * WIDTH) {
        Vector w[COUNT];
#pragma unroll
        for (int g = 0; g < COUNT; ++g) w[g] = *reinterpret_cast<const Vector*>(weights + g * gate + k);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Vector v = FRESH ? fresh(x + rows[r] + k) : *reinterpret_cast<const Vector*>(x + rows[r] + k);
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

// Finish a unit of ROWS rows: each of these has LANES / ROWS lanes with the same sums.
__device__ __forceinline__ void finish_rows(const Results& results, float* sums, const Stored* __restrict__ bias,
                                            int start, int unit, int batch, int lane) {
    constexpr int lanes = LANES / ROWS;
    const int row = start + lane / lanes;
    if (lane % lanes || row >= batch) return;
#pragma unroll
    for (int g = 0; g < GATES; ++g) sums[g] += bias != nullptr ? widen(bias[g * results.size + unit]) : 0.f;
    results.finish(row, unit, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS) step_by_warps(CALL_ARGUMENTS) {
    const Results results{before, output, hidden, memory, output_row, size};
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
    finish_rows(results, sums[0], bias, start, unit, batch, lane);
}

// The counter of a meeting, as the other blocks see it. volatile: without it the compiler takes a loop that only reads
// to end, and leaves it out.
__device__ __forceinline__ u32 seen(const u32* counter) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// The place at which all blocks of a launch meet. Each adds one to the counter's lower bits; the first block takes them
// to zero and turns the upper bit over. So a counter that begins at zero serves launches of all sizes, one after another.
// Blocks that have waited see all that others wrote before they arrived.
struct Meeting {
    u32* counter;
    u32 before;
    __device__ __forceinline__ void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            before = atomicAdd(counter, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
        }
    }
    __device__ __forceinline__ void wait() const {
        if (threadIdx.x == 0)
            while (!((before ^ seen(counter)) & 0x80000000u)) {}
        __syncthreads();
    }
};

// As step_by_warps; from step to step x is x_step and output output_step numbers further. hidden: the last output.
// counter: of a meeting. The same thread finishes a unit of a row at each step, and finds its memory there.
extern "C" __global__ void __launch_bounds__(THREADS) steps_by_warps(
    const Stored* __restrict__ x, const Stored* h, const float* before, const Stored* __restrict__ input,
    const Stored* __restrict__ recurrent, const Stored* __restrict__ bias, Stored* output, Stored* hidden, float* memory,
    u32* counter, int x_row, int x_step, int output_row, int output_step, int features, int size, int batch, int steps) {
    constexpr int units = THREADS / LANES;  // of a block
    const int lane = threadIdx.x % LANES, tiles = (batch + ROWS - 1) / ROWS, items = (size + units - 1) / units * tiles;
    Meeting meeting{counter, 0};
    for (int step = 0; step < steps; ++step) {
        const Results results{before, output, step == steps - 1 ? hidden : nullptr, memory, output_row, size};
        for (int item = blockIdx.x; item < items; item += gridDim.x) {
            const int unit = item / tiles * units + threadIdx.x / LANES, start = item % tiles * ROWS;
            int rows[ROWS];
            float sums[ROWS][GATES];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                rows[r] = min(start + r, batch - 1) * x_row;  // beyond the batch the last row again, and not written
#pragma unroll
                for (int g = 0; g < GATES; ++g) sums[r][g] = 0.f;
            }
            if (unit < size)
                multiply<0, GATES>(x, rows, input + (long long)unit * features, size, features, lane, sums);
#if RECURRENT
            if (step != 0 && item == blockIdx.x) meeting.wait();  // all threads of the block pass here
#endif
            if (unit >= size) continue;
#if RECURRENT
            if (h != nullptr) {
                const int h_row = step == 0 ? size : output_row;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) rows[r] = min(start + r, batch - 1) * h_row;
                multiply<FIRST_RECURRENT, RECURRENT, true>(h, rows, recurrent + (long long)unit * size, size, size, lane,
                                                           sums);
            }
#endif
            gather<ROWS / 2, LANES / 2>(sums, lane);
            finish_rows(results, sums[0], bias, start, unit, batch, lane);
        }
#if RECURRENT
        if (step != steps - 1) meeting.arrive();
#endif
        h = output, before = memory;
        x += x_step, output += output_step;
    }
}
#endif

#ifdef UNITS
#define M_TILES ((UNITS * GATES + 15) / 16)  // of 16 rows of weights, the gates of a block's units one after another
#define N_TILES (ROWS / 8)                   // of 8 rows of the batch
#define WARPS (THREADS / LANES)
#define PAIRS (WORDS == 4 ? 2 : 1)           // of 4-byte words that a lane gets of a row at a time, each for one product
#define CHUNK (8 * PAIRS)                    // words of a row that a warp multiplies at a time
#define PITCH (M_TILES * 16 + 4)             // from row to row of the sums: lanes meet in no bank

extern __shared__ float4 room[];  // the warps' sums, [WARPS][ROWS][PITCH]

// A tensor core cuts float32 off; rounded they come closer.
__device__ __forceinline__ u32 operand(u32 x) {
#if ELEMENT == 4
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
#else
    return x;
#endif
}

struct alignas(WORDS * 4) Words {
    u32 at[WORDS];
};

// A lane's words of a chunk; zeros beyond `depth`, and of no row. Consecutive words of a row are a pair: the order
// within a chunk does not matter to the product, as long as both factors have the same.
struct Pairs {
    u32 at[2 * PAIRS];
    __device__ __forceinline__ void read(const u32* row, int k, int depth) {
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i += WORDS) {
            Words words = {};
            if (row != nullptr && k + 4 * i < depth) words = *reinterpret_cast<const Words*>(row + k + 4 * i);
#pragma unroll
            for (int w = 0; w < WORDS; ++w) at[i + w] = operand(words.at[w]);
        }
    }
};

// A lane's share of both factors, for one product of each tile.
struct Operands {
    Pairs weights[M_TILES][2], values[N_TILES];
    __device__ __forceinline__ void read(const u32* const (&matrix)[M_TILES][2], const u32* const (&rows)[N_TILES],
                                         int k, int depth) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) weights[m][half].read(matrix[m][half], k, depth);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) values[n].read(rows[n], k, depth);
    }
    __device__ __forceinline__ void multiply(float (&sums)[M_TILES][N_TILES][4]) const {
#pragma unroll
        for (int p = 0; p < 2 * PAIRS; p += 2)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    const u32 *upper = weights[m][0].at + p, *lower = weights[m][1].at + p, *v = values[n].at + p;
                    multiply_tile(sums[m][n], upper[0], lower[0], upper[1], lower[1], v[0], v[1]);
                }
    }
};

// Add this warp's share of the products of `batch` rows with COUNT gates of the units from `first` on, from the gate
// FIRST on. The warps take chunks of the depth in turns, and read one ahead.
template <int FIRST, int COUNT>
__device__ __forceinline__ void multiply_tiles(float (&sums)[M_TILES][N_TILES][4], const Stored* x, int row,
                                               const Stored* weights, int size, int first, int depth, int batch) {
    const int lane = threadIdx.x % LANES, words = depth * ELEMENT / 4;
    const u32 *matrix[M_TILES][2], *rows[N_TILES];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = m * 16 + half * 8 + lane / 4, gate = i / UNITS - FIRST, unit = first + i % UNITS;
            const bool there = gate >= 0 && gate < COUNT && unit < size;
            const Stored* at = weights + ((long long)gate * size + unit) * depth;
            matrix[m][half] = there ? reinterpret_cast<const u32*>(at) : nullptr;
        }
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const int b = n * 8 + lane / 4;
        rows[n] = b < batch ? reinterpret_cast<const u32*>(x + (long long)b * row) : nullptr;
    }
    int k = threadIdx.x / LANES * CHUNK + lane % 4 * WORDS;
    Operands now, next;
    now.read(matrix, rows, k, words);
    for (int start = threadIdx.x / LANES * CHUNK; start < words; start += WARPS * CHUNK) {
        k += WARPS * CHUNK;
        next.read(matrix, rows, k, words);
        now.multiply(sums);
        now = next;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) step_by_tiles(CALL_ARGUMENTS) {
    const Results results{before, output, hidden, memory, output_row, size};
    const int lane = threadIdx.x % LANES, first = blockIdx.x * UNITS;
    float* shares = reinterpret_cast<float*>(room);
    for (int start = 0; start < batch; start += ROWS) {
        const int count = min(ROWS, batch - start);
        float sums[M_TILES][N_TILES][4] = {};
        multiply_tiles<0, GATES>(sums, x + (long long)start * x_row, x_row, input, size, first, features, count);
#if RECURRENT
        if (h != nullptr)
            multiply_tiles<FIRST_RECURRENT, RECURRENT>(sums, h + (long long)start * h_row, h_row, recurrent, size, first,
                                                       size, count);
#endif
        float* mine = shares + (threadIdx.x / LANES * ROWS + lane % 4 * 2) * PITCH + lane / 4;
        __syncthreads();  // all threads have read the shares before
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) mine[(n * 8 + i % 2) * PITCH + m * 16 + i / 2 * 8] = sums[m][n][i];
        __syncthreads();
        for (int i = threadIdx.x; i < UNITS * count; i += THREADS) {
            const int u = i % UNITS, row = i / UNITS, unit = first + u;
            if (unit >= size) continue;
            float a[GATES];
#pragma unroll
            for (int g = 0; g < GATES; ++g) {
                a[g] = bias != nullptr ? widen(bias[g * size + unit]) : 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) a[g] += shares[(w * ROWS + row) * PITCH + g * UNITS + u];
            }
            results.finish(start + row, unit, a);
        }
    }
}
#endif
