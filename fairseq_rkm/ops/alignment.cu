// Copy matrices to rows of whole 16 bytes, or back. A launch takes up to three: a layer needs one launch each way. On
// the way there, it also marks all values of persistent.cu's workspace as missing.
//
// ops/alignment.py compiles this with ELEMENT, the bytes of an element, as a macro.

typedef unsigned int u32;
typedef unsigned long long u64;

#if ELEMENT == 2
typedef unsigned short Stored;
#elif ELEMENT == 4
typedef u32 Stored;
#else
typedef u64 Stored;
#endif

#define LANE_ELEMENTS (16 / ELEMENT)

// One matrix of `rows` rows of `size` elements; a thread writes 16 bytes at a time. A null pointer is no matrix.
__device__ __forceinline__ void align(const Stored* from, uint4* to, u64 rows, u32 size) {
    if (!to) return;
    const u32 width = (size + LANE_ELEMENTS - 1) / LANE_ELEMENTS;
    const bool whole_words = (u64(from) | size * ELEMENT) % 4 == 0;  // else rows begin within words
    for (u64 i = blockIdx.x * u64(blockDim.x) + threadIdx.x; i < rows * width; i += gridDim.x * u64(blockDim.x)) {
        const u64 row = i / width;
        const u32 column = i % width * LANE_ELEMENTS;
        const Stored* at = from + row * size + column;
        union { uint4 v; Stored e[LANE_ELEMENTS]; u32 words[4]; } packed;
        if (whole_words) {
            for (u32 w = 0; w < 4; ++w)
                packed.words[w] = column * ELEMENT + w * 4 < size * ELEMENT ? ((const u32*)at)[w] : 0;
        } else {
            for (u32 e = 0; e < LANE_ELEMENTS; ++e) packed.e[e] = column + e < size ? at[e] : Stored(0);
        }
        to[i] = packed.v;
    }
}

// The other way, to memory that begins at 16 bytes: the filling of the rows is left out.
__device__ __forceinline__ void unalign(const uint4* from, Stored* to, u64 rows, u32 size) {
    if (!to) return;
    const u32 width = (size + LANE_ELEMENTS - 1) / LANE_ELEMENTS;
    for (u64 i = blockIdx.x * u64(blockDim.x) + threadIdx.x; i < rows * width; i += gridDim.x * u64(blockDim.x)) {
        const u32 column = i % width * LANE_ELEMENTS;
        Stored* at = to + i / width * size + column;
        union { uint4 v; Stored e[LANE_ELEMENTS]; u32 words[4]; } packed;
        packed.v = from[i];
        if (size * ELEMENT % 4 == 0) {
            for (u32 w = 0; w < 4; ++w)
                if (column * ELEMENT + w * 4 < size * ELEMENT) ((u32*)at)[w] = packed.words[w];
        } else {
            for (u32 e = 0; e < LANE_ELEMENTS; ++e)
                if (column + e < size) at[e] = packed.e[e];
        }
    }
}

extern "C" __global__ void align_rows(
    const Stored* from0, uint4* to0, u64 rows0, u32 size0, const Stored* from1, uint4* to1, u64 rows1, u32 size1,
    const Stored* from2, uint4* to2, u64 rows2, u32 size2, u32* missing, u64 words) {
    align(from0, to0, rows0, size0);
    align(from1, to1, rows1, size1);
    align(from2, to2, rows2, size2);
    for (u64 i = blockIdx.x * u64(blockDim.x) + threadIdx.x; i < words; i += gridDim.x * u64(blockDim.x))
        missing[i] = 0xffffffffu;
}

extern "C" __global__ void unalign_rows(
    const uint4* from0, Stored* to0, u64 rows0, u32 size0, const uint4* from1, Stored* to1, u64 rows1, u32 size1,
    const uint4* from2, Stored* to2, u64 rows2, u32 size2) {
    unalign(from0, to0, rows0, size0);
    unalign(from1, to1, rows1, size1);
    unalign(from2, to2, rows2, size2);
}
