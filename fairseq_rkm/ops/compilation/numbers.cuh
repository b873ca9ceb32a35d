// Numbers as tensors store them and as kernels compute with them, on the tensor cores too. Macros: ELEMENT, bytes of a
// stored number, 2 or 4; BF16, whether one of 2 bytes is bfloat16, else float16.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#if ELEMENT == 4
typedef float Stored;
__device__ __forceinline__ float widen(Stored x) { return x; }
__device__ __forceinline__ Stored narrow(float x) { return x; }
#else
typedef u16 Stored;
#if BF16
__device__ __forceinline__ float widen(Stored x) { return __uint_as_float(u32(x) << 16); }
__device__ __forceinline__ Stored narrow(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
__device__ __forceinline__ float widen(Stored x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ Stored narrow(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif
#endif

#if ELEMENT == 4
#define MMA "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
#elif BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

// Add the product of 16 x 32 by 32 x 8 bytes to a tile of 16 x 8 sums; a lane holds four of them.
__device__ __forceinline__ void multiply_tile(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
