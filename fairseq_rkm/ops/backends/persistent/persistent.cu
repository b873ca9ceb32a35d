// Recurrences with feedback: one launch for a whole sequence. The recurrent weights stay in shared memory, and in
// registers as far as these reach.
//
// The batch is cut into independent GROUPS. Within a group each of SLICES blocks owns UNITS units (their weights, their
// memory) for at most ROWS rows. At each step a block multiplies its weights, on the tensor cores, with the values that
// all blocks of the group published at the step before: h_{t-1} forward, the gates' gradients backward. It sums over
// warps, computes the cell's pointwise equations, and publishes its own part.
//
// The launch sets the number of rows of a group, perhaps 0 (`rows_here`): one kernel serves batches of many sizes. A
// block neither waits for other rows nor reads or writes them; they count as zeros in the product.
//
// No barrier and no flag: a published vector of WORDS 32-bit words (2 or 4) is written and read whole, and one whose
// first word is MISSING is not there yet. Published values rotate through RING buffers. Once a block has everything of
// step t, all others have read step t - 1. At every MARKED-th step the block then marks its own parts of the last
// MARKED buffers as missing, and fences: a fence takes 1000 clocks. The first of these parts is read next at step
// t + RING - MARKED, by blocks that have seen this block's step before that one, and it was published after the fence.
//
// Backward, a block would have to read the gates' gradients of all units: RECURRENT times as much as h. The blocks of a
// group therefore work in clusters of CLUSTER. Each block of a cluster reads a CLUSTER-th of the gradients, from the
// slices of its `part`, and multiplies it for the units of all blocks of the cluster. Then each hands the others their
// sums, from shared memory to shared memory. One block of the cluster reads each part: a block with all the sums of a
// step knows that all blocks of the group have published the step, and the argument above holds.
//
// launch.py compiles this with the sizes and the cell (a row of ops/cells.py) as macros. Indices:
//   u unit in the block, j = slice * UNITS + u unit of the layer, n row in the group, b row of the batch (a batch too
//   large for one launch is run in several, from row `first` on, `rows` a group), g gate in stacking order,
//   r = g - FIRST_RECURRENT.

#include "numbers.cuh"

#define THREADS (WARPS * 32)
#define TILES ((ROWS + 7) / 8)             // of 8 rows of the batch: the product's N
#define LANE_ELEMENTS (16 / ELEMENT)       // a lane moves 16 bytes
#define CHUNK (64 / ELEMENT)               // of the product's K: 64 bytes of each row, two tensor-core steps
#define VECTOR (WORDS * 4 / ELEMENT)       // values that are published at once, by neighbouring units
static_assert(RING - MARKED > 2, "a fence stands between the marking of a buffer and the step before its next use");
#define MISSING 0xffffffffu                // two NaNs that no conversion gives
#define CEIL(a, b) (((a) + (b) - 1) / (b))
#define PASS_TILES (TILES < MAX_PASS_TILES ? TILES : MAX_PASS_TILES)
#define PASSES CEIL(TILES, PASS_TILES)
#define PASS_ROWS (PASS_TILES * 8)
#define PER_PASS CEIL(UNITS * PASS_ROWS, THREADS)
#define ITEMS (PASSES * PER_PASS)          // (unit, row) pairs that a thread owns

#define HAS_SCALE_F (FORGET < 0)
#define HAS_SCALE_I (FORGET < 0 && INPUT < 0)

// Both products: M rows of weights in this block, K values published by the group for each row of the batch.
#define FORWARD_M (RECURRENT * UNITS)
#define FORWARD_K (SLICES * UNITS)
#define BACKWARD_M (CLUSTER * UNITS)
#define PART_SLICES (SLICES / CLUSTER)     // CLUSTER divides SLICES; 1 forward
#define BACKWARD_K (PART_SLICES * RECURRENT * UNITS)

#if ELEMENT == 4
// What the tensor cores read: rounded, where they would cut off.
__device__ __forceinline__ Stored operand(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}
#else
__device__ __forceinline__ Stored operand(float x) { return narrow(x); }
#endif

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float hyperbolic(float x) { return 2.f / (1.f + __expf(-2.f * x)) - 1.f; }

// 16 bytes, at once, where all multiprocessors see them.
__device__ __forceinline__ uint4 load_published(const void* p) {
    uint4 v;
    asm volatile(
        "{ .reg .b128 q; .reg .b64 low, high; ld.relaxed.gpu.global.b128 q, [%4]; mov.b128 {low, high}, q;"
        " mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high; }"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void publish_whole(void* p, uint4 v) {
    asm volatile(
        "{ .reg .b128 q; .reg .b64 low, high; mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; mov.b128 q, {low, high};"
        " st.relaxed.gpu.global.b128 [%0], q; }"
        :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ bool is_missing(uint4 v) { return v.x == MISSING || (WORDS == 2 && v.z == MISSING); }

__device__ __forceinline__ void publish(void* p, uint4 v) {
#if WORDS == 2
    asm volatile("{ .reg .b64 q; mov.b64 q, {%1, %2}; st.relaxed.gpu.global.b64 [%0], q; }"
                 :: "l"(p), "r"(v.x), "r"(v.y) : "memory");
#else
    publish_whole(p, v);
#endif
}

// Mark one place as missing in the buffers of the MARKED steps before `step`.
__device__ __forceinline__ void mark_missing(Stored* place, int step, size_t buffer) {
#pragma unroll 1
    for (int back = 1; back <= MARKED; ++back)
        publish(place + (step - back) % RING * buffer, make_uint4(MISSING, 0, 0, 0));
}

// The values of VECTOR neighbouring lanes as one vector, in the first of them. All lanes of a warp must call.
__device__ __forceinline__ uint4 gather_lanes(float x) {
#if ELEMENT == 4
    const u32 v = __float_as_uint(operand(x)), step = 1;
#else
    u32 v = operand(x);
    v |= __shfl_down_sync(~0u, v, 1) << 16;
    const u32 step = 2;
#endif
    uint4 all;
    all.x = v;
    all.y = __shfl_down_sync(~0u, v, step);
    all.z = __shfl_down_sync(~0u, v, 2 * step);
    all.w = __shfl_down_sync(~0u, v, 3 * step);
    return all;
}

// The weights' rows in shared memory, in steps of 16 bytes, an odd number of chunks apart: so the lanes of a tensor
// core's tile (8 rows, 4 times 16 bytes of each) meet in no bank.
#define WEIGHT_PITCH(K) ((CEIL(K, CHUNK) | 1) * 4)

template <int M, int K, typename At>
__device__ __forceinline__ void stage_weights(uint4* staged, At at) {
    const int pitch = WEIGHT_PITCH(K);
    for (int i = threadIdx.x; i < M * pitch; i += THREADS) {
        const int row = i / pitch, k = i % pitch * LANE_ELEMENTS;
        union { uint4 v; Stored e[LANE_ELEMENTS]; } packed;
        for (int e = 0; e < LANE_ELEMENTS; ++e) packed.e[e] = k + e < K ? at(row, k + e) : operand(0.f);
        staged[i] = packed.v;
    }
}

// A lane's part of the first HELD pairs of a chunk and a tile of weights in its warp's share; it stays in registers.
typedef uint4 Held[HELD > 0 ? HELD : 1][2];

// Where a lane's rows of a tile begin in shared memory. Rows beyond M repeat the last one; nobody reads their sums.
template <int M, int K>
__device__ __forceinline__ const uint4* lane_row(const uint4* staged, int m, int half) {
    const int lane = threadIdx.x % 32;
    return staged + min(m * 16 + half * 8 + lane / 4, M - 1) * WEIGHT_PITCH(K) + lane % 4;
}

template <int M, int K>
__device__ __forceinline__ void hold_weights(Held& held, const uint4* staged) {
    constexpr int chunks = CEIL(K, CHUNK), tiles = CEIL(M, 16), share = CEIL(chunks, WARPS);
#pragma unroll
    for (int pair = 0; pair < HELD; ++pair) {
        const int chunk = threadIdx.x / 32 * share + pair / tiles;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (chunk < chunks) held[pair][half] = lane_row<M, K>(staged, pair % tiles, half)[chunk * 4];
    }
}

// This warp's share of weights (M x K) times published^T (K x TILES * 8), in `sums`. A lane's 16 bytes are consecutive in
// K, in the weights as in what is published: the order of K within a chunk does not matter to the product.
template <int M, int K>
__device__ __forceinline__ void product(
    float (&sums)[CEIL(M, 16)][TILES][4], const uint4* staged, const Held& held, const Stored* published, int rows_here) {
    constexpr int chunks = CEIL(K, CHUNK), tiles = CEIL(M, 16), stride = chunks * CHUNK, share = CEIL(chunks, WARPS);
    constexpr int depth = share * TILES <= VECTORS ? share : VECTORS / TILES > 0 ? VECTORS / TILES : 1;
    static_assert(HELD == 0 || depth == share, "weights are held where all of a share is fetched at once");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = warp * share, last = min(first + share, chunks);
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.f;
    const uint4* rows[tiles][2];
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) rows[m][h] = lane_row<M, K>(staged, m, h);
    const int lane_k = lane % 4 * LANE_ELEMENTS;
    const Stored* mine = published + (lane / 4) * stride + lane_k;
    for (int start = first; start < last; start += depth) {
        uint4 b[depth][TILES];
        bool missing;
#pragma unroll
        for (int d = 0; d < depth; ++d)
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const bool there = start + d < last && n * 8 + lane / 4 < rows_here && (start + d) * CHUNK + lane_k < K;
                b[d][n] = make_uint4(there ? MISSING : 0, 0, 0, 0);
            }
        do {
            missing = false;
#pragma unroll
            for (int d = 0; d < depth; ++d)
#pragma unroll
                for (int n = 0; n < TILES; ++n)
                    if (is_missing(b[d][n])) b[d][n] = load_published(mine + n * 8 * stride + (start + d) * CHUNK);
#pragma unroll
            for (int d = 0; d < depth; ++d)
#pragma unroll
                for (int n = 0; n < TILES; ++n) missing |= is_missing(b[d][n]);
        } while (__any_sync(~0u, missing));
#pragma unroll
        for (int d = 0; d < depth; ++d) {
            if (start + d >= last) break;
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
                const int pair = d * tiles + m, from_held = pair < HELD ? pair : 0;
                const uint4 upper = pair < HELD ? held[from_held][0] : rows[m][0][(start + d) * 4];
                const uint4 lower = pair < HELD ? held[from_held][1] : rows[m][1][(start + d) * 4];
#pragma unroll
                for (int n = 0; n < TILES; ++n) {
                    multiply_tile(sums[m][n], upper.x, lower.x, upper.y, lower.y, b[d][n].x, b[d][n].y);
                    multiply_tile(sums[m][n], upper.z, lower.z, upper.w, lower.w, b[d][n].z, b[d][n].w);
                }
            }
        }
    }
}

#define SLOTS (FOLD ? WARPS / 2 : WARPS)   // warps whose sums are laid out at a time
// From one row of a pass to the next in `partial`. Lanes never meet in a bank: neither when they lay out a tile, of 8
// rows of weights by 4 pairs of rows of the pass, nor when they add up sums of neighbouring rows of weights.
#define PITCH(MTILES) ((MTILES) * 16 + 4)

// Give (or take and add) this warp's sums of one pass: partial[slot][row of the pass][row of weights].
template <bool ADD, int MTILES>
__device__ __forceinline__ void lay_out(float* partial, float (&sums)[MTILES][TILES][4], int pass, int slot) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < MTILES; ++m)
#pragma unroll
        for (int i = 0; i < PASS_TILES; ++i) {
            const int n = pass * PASS_TILES + i;
            if (n >= TILES) continue;
            float* at = partial + (slot * PASS_ROWS + i * 8 + lane % 4 * 2) * PITCH(MTILES) + m * 16 + lane / 4;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& shared_sum = at[e % 2 * PITCH(MTILES) + e / 2 * 8];
                if (ADD) sums[m][n][e] += shared_sum;
                else shared_sum = sums[m][n][e];
            }
        }
}

// Let all threads see all warps' sums of one pass. With FOLD, in half the room: one half of the warps adds the other's.
template <int MTILES>
__device__ __forceinline__ void share_sums(float* partial, float (&sums)[MTILES][TILES][4], int pass) {
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (FOLD) {
        if (warp >= SLOTS) lay_out<false>(partial, sums, pass, warp - SLOTS);
        __syncthreads();
        // A slot is read and overwritten by one warp alone, each element by one lane.
        if (warp < SLOTS) lay_out<true>(partial, sums, pass, warp);
    }
    if (warp < SLOTS) lay_out<false>(partial, sums, pass, warp);
    __syncthreads();
}

template <int MTILES>
__device__ __forceinline__ float total(const float* partial, int row, int column) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < SLOTS; ++w) sum += partial[(w * PASS_ROWS + column) * PITCH(MTILES) + row];
    return sum;
}

#if CLUSTER > 1
// The sums that the blocks of a cluster give each other, round by round, straight into shared memory. A round's values
// count themselves at the barrier of the receiving block. Two buffers take turns. A block writes to a buffer again once it
// has the other block's values of the round between: the other sent them after it had read the buffer. No round may
// therefore be without values.
struct Handover {
    float* values;      // shared: [2][CLUSTER][columns][UNITS]
    u32 barriers;       // shared address: two of 8 bytes
    int size, part;     // CLUSTER * columns * UNITS
    u32 round;

    __device__ __forceinline__ void begin(float* room, int columns, int part_) {
        size = CLUSTER * columns * UNITS;
        values = room;
        barriers = __cvta_generic_to_shared(room + 2 * size);
        part = part_;
        round = 0;
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(barriers + 8 * i));
            asm volatile("fence.mbarrier_init.release.cluster;");
        }
        __syncwarp();
        asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    }

    __device__ __forceinline__ u32 barrier() const { return barriers + 8 * (round % 2); }

    __device__ __forceinline__ float* place(int from, int column, int u) const {
        return values + round % 2 * size + (from * (size / (CLUSTER * UNITS)) + column) * UNITS + u;
    }

    // Announce how many values will come from all blocks, this one included.
    __device__ __forceinline__ void expect(int count) const {
        if (threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(barrier()), "r"(4 * count) : "memory");
    }

    __device__ __forceinline__ void send(int to, int column, int u, float value) const {
        asm volatile(
            "{ .reg .b32 there, barrier; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 barrier, %1, %2;"
            " st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [barrier]; }"
            :: "r"(u32(__cvta_generic_to_shared(place(part, column, u)))), "r"(barrier()), "r"(to),
               "r"(__float_as_uint(value)) : "memory");
    }

    __device__ __forceinline__ void wait() const {
        asm volatile(
            "{ .reg .pred there; AGAIN: mbarrier.try_wait.parity.shared.b64 there, [%0], %1; @!there bra AGAIN; }"
            :: "r"(barrier()), "r"(round / 2 % 2) : "memory");
    }
};
#endif

#if NORM
// Sums over a layer's units for each row of the group. Each block publishes its part, marked with the step; every block
// adds up all parts in the same order.
struct Exchange {
    float2 *pairs, *results;  // shared: [ROWS][UNITS], [ROWS]
    uint4* parts;             // global: [2][GROUPS][SLICES][ROWS]
    int slice, group, rows_here;

    __device__ __forceinline__ uint4* part(u32 step, int s) const {
        return parts + ((size_t(step % 2) * GROUPS + group) * SLICES + s) * ROWS;
    }

    template <typename Local, typename Merge>
    __device__ __forceinline__ void run(u32 step, Local local, Merge merge) {
        constexpr int rows = CEIL(ROWS, WARPS), per_lane = CEIL(SLICES, 32);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        __syncthreads();
        for (int n = threadIdx.x; n < rows_here; n += THREADS) {
            const float2 sum = local(pairs + n * UNITS);
            publish_whole(part(step, slice) + n, make_uint4(__float_as_uint(sum.x), __float_as_uint(sum.y), step, 0));
        }
        uint4 got[rows][per_lane];
        bool missing;
#pragma unroll
        for (int r = 0; r < rows; ++r)
#pragma unroll
            for (int i = 0; i < per_lane; ++i) {
                const bool there = warp + r * WARPS < rows_here && lane + i * 32 < SLICES;
                got[r][i] = make_uint4(0, 0, there ? 0 : step, 0);
            }
        do {
            missing = false;
#pragma unroll
            for (int r = 0; r < rows; ++r)
#pragma unroll
                for (int i = 0; i < per_lane; ++i)
                    if (got[r][i].z != step) got[r][i] = load_published(part(step, lane + i * 32) + warp + r * WARPS);
#pragma unroll
            for (int r = 0; r < rows; ++r)
#pragma unroll
                for (int i = 0; i < per_lane; ++i) missing |= got[r][i].z != step;
        } while (__any_sync(~0u, missing));
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            float2 sum = make_float2(0.f, 0.f);
            int units = 0;
#pragma unroll
            for (int i = 0; i < per_lane; ++i)
                merge(sum, units, make_float2(__uint_as_float(got[r][i].x), __uint_as_float(got[r][i].y)),
                      min(UNITS, SIZE - (lane + i * 32) * UNITS));
#pragma unroll
            for (int offset = 16; offset; offset /= 2) {
                float2 other;
                other.x = __shfl_down_sync(~0u, sum.x, offset);
                other.y = __shfl_down_sync(~0u, sum.y, offset);
                merge(sum, units, other, __shfl_down_sync(~0u, units, offset));
            }
            if (lane == 0 && warp + r * WARPS < rows_here) results[warp + r * WARPS] = sum;
        }
        __syncthreads();
    }
};

// Mean and squared deviations of two samples together (Chan et al. 1983).
__device__ __forceinline__ void merge_moments(float2& sum, int& units, float2 other, int more) {
    if (more <= 0) return;
    const float share = float(more) / float(units + more), gap = other.x - sum.x;
    sum.x += gap * share;
    sum.y += other.y + gap * gap * float(units) * share;
    units += more;
}
#endif

struct Gates {
    float value[GATES];
    float sf, si;
    __device__ __forceinline__ float forget() const { return FORGET >= 0 ? value[FORGET >= 0 ? FORGET : 0] : sf; }
    __device__ __forceinline__ float input() const {
        return INPUT >= 0 ? value[INPUT >= 0 ? INPUT : 0] : FORGET >= 0 ? 1.f - forget() : si;
    }
    __device__ __forceinline__ float output() const { return OUTPUT >= 0 ? value[OUTPUT >= 0 ? OUTPUT : 0] : 1.f; }
    __device__ __forceinline__ float raw(float before) const { return input() * value[0] + forget() * before; }
    // The memory: before the layer norm, or after clipping.
    __device__ __forceinline__ float memory(float before) const {
#ifdef CLIP
        const float c = raw(before);  // NaN stays; fminf and fmaxf would turn it into a bound
        return c < -CLIP ? -CLIP : c > CLIP ? CLIP : c;
#else
        return raw(before);
#endif
    }
};

extern __shared__ uint4 shared[];

template <int M, int K>
struct Product {};

// What both kernels begin with: this block's place, its weights, and where its group publishes.
struct Block {
    int slice, group, part, first_row, rows_here;  // none if the batch ends before
    float* partial;     // shared: sums of warps
    Stored* published;  // [CLUSTER][ROWS][K]
    size_t part_size, buffer;
#if CLUSTER > 1
    Handover handover;
#endif
#if NORM
    Exchange exchange;
#endif

    template <int M, int K, typename At>
    __device__ __forceinline__ Block(u32* workspace, int first, int rows, int batch, At weight, Product<M, K>) {
        slice = blockIdx.x % SLICES;
        group = blockIdx.x / SLICES;
        part = slice % CLUSTER;
        first_row = first + group * rows;
        rows_here = min(rows, batch - first_row);
        const int slice_ = slice;
        stage_weights<M, K>(shared, [&](int row, int k) { return weight(slice_, row, k); });
        partial = (float*)(shared + M * WEIGHT_PITCH(K));
        [[maybe_unused]] float* rest = partial + SLOTS * PASS_ROWS * PITCH(CEIL(M, 16));
        part_size = size_t(ROWS) * CEIL(K, CHUNK) * CHUNK;
        buffer = GROUPS * CLUSTER * part_size;
        published = (Stored*)workspace + group * CLUSTER * part_size;
#if CLUSTER > 1
        handover.begin(rest, PASS_ROWS, part);
        rest += 2 * handover.size + 4;
#endif
#if NORM
        exchange.pairs = (float2*)rest;
        exchange.results = exchange.pairs + ROWS * UNITS;
        exchange.parts = (uint4*)((Stored*)workspace + RING * buffer);
        exchange.slice = slice;
        exchange.group = group;
        exchange.rows_here = rows_here;
#endif
    }
};

// The (unit, row) pair `item` of this thread; neighbouring lanes have neighbouring units.
struct Place {
    int u, n, j, b;
    bool real, in_rows;
    __device__ __forceinline__ Place(int item, const Block& block) {
        const int i = item % PER_PASS * THREADS + threadIdx.x;
        u = i % UNITS;
        n = item / PER_PASS * PASS_ROWS + i / UNITS;
        j = block.slice * UNITS + u;
        b = block.first_row + n;
        in_rows = i < UNITS * PASS_ROWS && n < block.rows_here;
        real = in_rows && j < SIZE;
    }
    __device__ __forceinline__ int column() const { return n % PASS_ROWS; }
    // Whether this thread writes the vector of VECTOR units that begins with its own.
    __device__ __forceinline__ bool publishes() const { return in_rows && u % VECTOR == 0; }
};

#if CLUSTER > 1
// Give each block of the cluster this one's sums of one pass for its units, and have theirs.
template <int MTILES>
__device__ __forceinline__ void exchange_sums(const Block& block, int pass) {
    const int count = CLUSTER * UNITS * min(PASS_ROWS, block.rows_here - pass * PASS_ROWS);
    block.handover.expect(count);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int row = i % (CLUSTER * UNITS), column = i / (CLUSTER * UNITS);
        block.handover.send(row / UNITS, column, row % UNITS, total<MTILES>(block.partial, row, column));
    }
    block.handover.wait();
}
#endif

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, 1) recurrence_forward(
    Stored* gates,          // [T][B][GATES * SIZE]: in W X, out the activated gates
    const Stored* bias,     // [GATES * SIZE]; null for zeros
    const Stored* weights,  // [RECURRENT * SIZE][SIZE]
    const Stored* first_hidden, const float* first_memory,  // [B][SIZE]; null for zeros
    Stored* last_hidden, float* last_memory,                // [B][SIZE]: out
    Stored* hidden,         // [T + 1][B][SIZE]: out, the first included
    float* memory,          // [T + 1][B][SIZE]: likewise
    u32* workspace,         // all MISSING: published, [RING][GROUPS][CLUSTER][ROWS][K], then the layer norm's parts
    const u8* keep,         // [T][B]
    const float* gain, const float* shift,  // [SIZE]
    float* moments,         // [T][B][2]: out, mean and reciprocal deviation
    const float* scale_f, const float* scale_i, int steps, int first, int rows, int batch) {
    constexpr int mtiles = CEIL(FORWARD_M, 16), k_padded = CEIL(FORWARD_K, CHUNK) * CHUNK;
    Block block(workspace, first, rows, batch, [&](int slice, int row, int k) {
        const int r = row / UNITS, j = slice * UNITS + row % UNITS;
        return j < SIZE && k < SIZE ? operand(widen(weights[size_t(r * SIZE + j) * SIZE + k])) : operand(0.f);
    }, Product<FORWARD_M, FORWARD_K>());

    float before[ITEMS], before_h[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const Place at(i, block);
        const size_t from = size_t(at.b) * SIZE + at.j;
        before[i] = at.real && first_memory ? first_memory[from] : 0.f;
        before_h[i] = at.real && first_hidden ? widen(first_hidden[from]) : 0.f;
        if (at.real) memory[from] = before[i], hidden[from] = narrow(before_h[i]);
        const uint4 vector = gather_lanes(before_h[i]);
        if (at.publishes()) publish(block.published + at.n * k_padded + at.j, vector);
    }
    __syncthreads();
    Held held;
    hold_weights<FORWARD_M, FORWARD_K>(held, shared);

    for (int t = 0; t < steps; ++t) {
        Gates a[ITEMS];
        bool real_step[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            const Stored* x = gates + (size_t(t) * batch + at.b) * (GATES * SIZE) + at.j;
#pragma unroll
            for (int g = 0; g < GATES; ++g) a[i].value[g] = at.real ? widen(x[g * SIZE]) : 0.f;
            a[i].sf = HAS_SCALE_F && at.real ? scale_f[at.j] : 0.f;
            a[i].si = HAS_SCALE_I ? scale_i[0] : 0.f;
            real_step[i] = at.real && (!MASK || keep[size_t(t) * batch + at.b]);
        }
        float sums[mtiles][TILES][4];
        product<FORWARD_M, FORWARD_K>(sums, shared, held, block.published + t % RING * block.buffer, block.rows_here);

        float now[ITEMS], now_h[ITEMS];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (pass * PASS_ROWS >= block.rows_here) break;
            share_sums<mtiles>(block.partial, sums, pass);
#pragma unroll
            for (int i = pass * PER_PASS; i < (pass + 1) * PER_PASS; ++i) {
                const Place at(i, block);
                if (!at.real) continue;
                if (bias) {
#pragma unroll
                    for (int g = 0; g < GATES; ++g) a[i].value[g] += widen(bias[g * SIZE + at.j]);
                }
#pragma unroll
                for (int r = 0; r < RECURRENT; ++r)
                    a[i].value[FIRST_RECURRENT + r] += total<mtiles>(block.partial, r * UNITS + at.u, at.column());
                if (SQUASH_CANDIDATE) a[i].value[0] = hyperbolic(a[i].value[0]);
#pragma unroll
                for (int g = 1; g < GATES; ++g) a[i].value[g] = sigmoid(a[i].value[g]);
                now[i] = a[i].memory(before[i]);
            }
        }
#if NORM
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            if (at.real) block.exchange.pairs[at.n * UNITS + at.u].x = now[i];
        }
        const int units = min(UNITS, SIZE - block.slice * UNITS);
        block.exchange.run(t + 1, [&](const float2* row) {
            float mean = 0.f, squares = 0.f;
            for (int u = 0; u < units; ++u) mean += row[u].x;
            mean /= units;
            for (int u = 0; u < units; ++u) squares += (row[u].x - mean) * (row[u].x - mean);
            return make_float2(mean, squares);
        }, merge_moments);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            if (!at.real) continue;
            const float2 both = block.exchange.results[at.n];
            const float inverse = rsqrtf(both.y / SIZE + EPSILON);
            now[i] = (now[i] - both.x) * inverse * gain[at.j] + shift[at.j];
            if (at.j == 0) {
                moments[(size_t(t) * batch + at.b) * 2] = both.x;
                moments[(size_t(t) * batch + at.b) * 2 + 1] = inverse;
            }
        }
#endif
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            now_h[i] = at.real ? a[i].output() * (SQUASH_OUTPUT ? hyperbolic(now[i]) : now[i]) : 0.f;
            if (!real_step[i]) now[i] = before[i], now_h[i] = before_h[i];
            const uint4 vector = gather_lanes(now_h[i]);
            if (at.publishes())
                publish(block.published + at.n * k_padded + at.j + (t + 1) % RING * block.buffer, vector);
            before[i] = now[i];
            before_h[i] = now_h[i];
        }
        if (t && t % MARKED == 0) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const Place at(i, block);
                if (at.publishes()) mark_missing(block.published + at.n * k_padded + at.j, t, block.buffer);
            }
            __threadfence();
        }
        // What only the backward pass needs is written while the others' values are on their way.
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            if (!at.real) continue;
            const size_t row = size_t(t) * batch + at.b;
#pragma unroll
            for (int g = 0; g < GATES; ++g) gates[row * (GATES * SIZE) + g * SIZE + at.j] = narrow(a[i].value[g]);
            memory[(row + batch) * SIZE + at.j] = now[i];
            hidden[(row + batch) * SIZE + at.j] = narrow(now_h[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const Place at(i, block);
        if (!at.real) continue;
        last_hidden[size_t(at.b) * SIZE + at.j] = narrow(before_h[i]);
        last_memory[size_t(at.b) * SIZE + at.j] = before[i];
    }
}

#else
extern "C" __global__ void __launch_bounds__(THREADS, 1) recurrence_backward(
    const Stored* gates,        // [T][B][GATES * SIZE], activated
    const Stored* weights,      // [RECURRENT * SIZE][SIZE]
    const float* memory,        // [T + 1][B][SIZE]
    const Stored* grad_output,  // [T][B][SIZE]; null for zeros
    const float* last_grad_hidden, const float* last_grad_memory,  // [B][SIZE], of the final state; null for zeros
    float* grad_hidden, float* grad_memory,  // [B][SIZE]: out, of the initial state
    Stored* grad_gates,         // [T][B][GATES * SIZE]: out, of the pre-activations
    u32* workspace,             // as above
    const u8* keep, const float* gain, const float* shift, const float* moments,
    float* grad_gain, float* grad_shift, float* grad_scale_i, float* grad_scale_f,  // [B][SIZE]: out, a row's share
    const float* scale_f, const float* scale_i, int steps, int first, int rows, int batch) {
    constexpr int mtiles = CEIL(BACKWARD_M, 16), k_padded = CEIL(BACKWARD_K, CHUNK) * CHUNK, own = RECURRENT * UNITS;
    Block block(workspace, first, rows, batch, [&](int slice, int row, int k) {
        const int from = slice % CLUSTER * PART_SLICES + k / own, r = k % own / UNITS, to = from * UNITS + k % UNITS;
        const int j = slice / CLUSTER * BACKWARD_M + row;
        return j < SIZE && to < SIZE ? operand(widen(weights[size_t(r * SIZE + to) * SIZE + j])) : operand(0.f);
    }, Product<BACKWARD_M, BACKWARD_K>());

    float to_memory[ITEMS], to_hidden[ITEMS], to_gain[ITEMS], to_shift[ITEMS];
    float to_scale_i[ITEMS], to_scale_f[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const Place at(i, block);
        const size_t from = size_t(at.b) * SIZE + at.j;
        to_memory[i] = at.real && last_grad_memory ? last_grad_memory[from] : 0.f;
        to_hidden[i] = at.real && last_grad_hidden ? last_grad_hidden[from] : 0.f;
        to_gain[i] = to_shift[i] = to_scale_i[i] = to_scale_f[i] = 0.f;
    }
    __syncthreads();
    Held held;
    hold_weights<BACKWARD_M, BACKWARD_K>(held, shared);
    const Stored* const read = block.published + block.part * block.part_size;
    Stored* const own_part = block.published + block.slice / PART_SLICES * block.part_size;

    for (int done = 0; done <= steps; ++done) {
        const int t = steps - 1 - done;
        Gates a[ITEMS];
        float now[ITEMS], before[ITEMS], from_output[ITEMS];
        bool real_step[ITEMS];
        if (t >= 0) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const Place at(i, block);
                const size_t row = size_t(t) * batch + at.b;
#pragma unroll
                for (int g = 0; g < GATES; ++g)
                    a[i].value[g] = at.real ? widen(gates[row * (GATES * SIZE) + g * SIZE + at.j]) : 0.f;
                a[i].sf = HAS_SCALE_F && at.real ? scale_f[at.j] : 0.f;
                a[i].si = HAS_SCALE_I ? scale_i[0] : 0.f;
                now[i] = at.real ? memory[(row + batch) * SIZE + at.j] : 0.f;
                before[i] = at.real ? memory[row * SIZE + at.j] : 0.f;
                from_output[i] = at.real && grad_output ? widen(grad_output[row * SIZE + at.j]) : 0.f;
                real_step[i] = at.real && (!MASK || keep[row]);
            }
        }
        if (done) {
            float sums[mtiles][TILES][4];
            product<BACKWARD_M, BACKWARD_K>(
                sums, shared, held, read + done % RING * block.buffer, block.rows_here);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                if (pass * PASS_ROWS >= block.rows_here) break;
                share_sums<mtiles>(block.partial, sums, pass);
#if CLUSTER > 1
                exchange_sums<mtiles>(block, pass);
#endif
#pragma unroll
                for (int i = pass * PER_PASS; i < (pass + 1) * PER_PASS; ++i) {
                    const Place at(i, block);
                    if (!at.real) continue;
#if CLUSTER > 1
#pragma unroll
                    for (int p = 0; p < CLUSTER; ++p) to_hidden[i] += *block.handover.place(p, at.column(), at.u);
#else
                    to_hidden[i] += total<mtiles>(block.partial, at.u, at.column());
#endif
                }
#if CLUSTER > 1
                ++block.handover.round;
#endif
            }
        }
        if (t < 0) break;

        float to_raw[ITEMS], through[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (real_step[i]) to_hidden[i] += from_output[i];
            through[i] = SQUASH_OUTPUT ? hyperbolic(now[i]) : now[i];
            const float slope = SQUASH_OUTPUT ? 1.f - through[i] * through[i] : 1.f;
            to_raw[i] = to_memory[i] + (real_step[i] ? to_hidden[i] * a[i].output() * slope : 0.f);
#ifdef CLIP
            // As torch.clamp: the gradient passes at the bound itself. Gates kept in 16 bits cannot tell it from beyond.
            const bool at_bound = sizeof(Stored) == 4 && fabsf(a[i].raw(before[i])) == CLIP;
            if (real_step[i] && fabsf(now[i]) >= CLIP && !at_bound) to_raw[i] = 0.f;
#endif
        }
#if NORM
        float normal[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            if (!at.real) continue;
            const size_t row = size_t(t) * batch + at.b;
            // From the memory, which is stored in full; where the gain has wiped it out, from the gates.
            normal[i] = fabsf(gain[at.j]) > 1e-3f ? (now[i] - shift[at.j]) / gain[at.j]
                                                  : (a[i].raw(before[i]) - moments[row * 2]) * moments[row * 2 + 1];
            now[i] = moments[row * 2] + normal[i] / moments[row * 2 + 1];
            const float weighted = to_raw[i] * gain[at.j];
            block.exchange.pairs[at.n * UNITS + at.u] = make_float2(weighted, weighted * normal[i]);
            if (real_step[i]) to_gain[i] += to_raw[i] * normal[i], to_shift[i] += to_raw[i];
        }
        const int units = min(UNITS, SIZE - block.slice * UNITS);
        block.exchange.run(done + 1, [&](const float2* row) {
            float2 sum = make_float2(0.f, 0.f);
            for (int u = 0; u < units; ++u) sum.x += row[u].x, sum.y += row[u].y;
            return sum;
        }, [](float2& sum, int&, float2 other, int) { sum.x += other.x, sum.y += other.y; });
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            if (!at.real || !real_step[i]) continue;
            const float2 both = block.exchange.results[at.n];
            const float inverse = moments[(size_t(t) * batch + at.b) * 2 + 1];
            to_raw[i] = inverse * (to_raw[i] * gain[at.j] - (both.x + normal[i] * both.y) / SIZE);
        }
#endif
        float to_gate[ITEMS][GATES];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            const float forget = a[i].forget(), input = a[i].input();
            // `now` is the memory before the layer norm by now: more of the candidate than the stored gate keeps.
            const float candidate = HAS_SCALE_I ? (now[i] - forget * before[i]) / input : a[i].value[0];
            to_gate[i][0] = to_raw[i] * input * (SQUASH_CANDIDATE ? 1.f - candidate * candidate : 1.f);
            if (INPUT >= 0) to_gate[i][INPUT >= 0 ? INPUT : 0] = to_raw[i] * candidate * input * (1.f - input);
            if (FORGET >= 0)
                to_gate[i][FORGET >= 0 ? FORGET : 0] =
                    to_raw[i] * (before[i] - (INPUT >= 0 ? 0.f : candidate)) * forget * (1.f - forget);
            if (OUTPUT >= 0)
                to_gate[i][OUTPUT >= 0 ? OUTPUT : 0] =
                    to_hidden[i] * through[i] * a[i].output() * (1.f - a[i].output());
#pragma unroll
            for (int g = 0; g < GATES; ++g) to_gate[i][g] = real_step[i] ? to_gate[i][g] : 0.f;
            if (real_step[i]) {
                to_scale_i[i] += to_raw[i] * candidate;
                to_scale_f[i] += to_raw[i] * before[i];
                to_memory[i] = to_raw[i] * forget;
                to_hidden[i] = 0.f;
            }
            Stored* const to = own_part + at.n * k_padded + block.slice % PART_SLICES * own + at.u;
#pragma unroll
            for (int r = 0; r < RECURRENT; ++r) {
                const uint4 vector = gather_lanes(to_gate[i][FIRST_RECURRENT + r]);
                if (at.publishes()) publish(to + (done + 1) % RING * block.buffer + r * UNITS, vector);
            }
        }
        if (done && done % MARKED == 0) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const Place at(i, block);
                if (!at.publishes()) continue;
                Stored* const to = own_part + at.n * k_padded + block.slice % PART_SLICES * own + at.u;
#pragma unroll
                for (int r = 0; r < RECURRENT; ++r) mark_missing(to + r * UNITS, done, block.buffer);
            }
            __threadfence();
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const Place at(i, block);
            if (!at.real) continue;
            Stored* to = grad_gates + (size_t(t) * batch + at.b) * (GATES * SIZE) + at.j;
#pragma unroll
            for (int g = 0; g < GATES; ++g) to[g * SIZE] = narrow(to_gate[i][g]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const Place at(i, block);
        if (!at.real) continue;
        const size_t to = size_t(at.b) * SIZE + at.j;
        grad_hidden[to] = to_hidden[i];
        grad_memory[to] = to_memory[i];
        if (NORM) grad_gain[to] = to_gain[i], grad_shift[to] = to_shift[i];
        if (HAS_SCALE_I) grad_scale_i[to] = to_scale_i[i];
        if (HAS_SCALE_F) grad_scale_f[to] = to_scale_f[i];
    }
}
#endif
