// Numbers as tensors store them and as kernels compute with them. Macros: ELEMENT, bytes of a stored number, 2 or 4;
// BF16, whether one of 2 bytes is bfloat16, else float16.

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
