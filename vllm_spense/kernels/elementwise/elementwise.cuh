// What the kernels between GEMMs share: eight values of a row at once, BF16 in memory and float in registers, to FP8.
// Comes before each of their sources.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char byte;
typedef unsigned short bf16;

constexpr int WIDTH = 8;
constexpr float LARGEST = 448;                        // of E4M3
constexpr float SMALLEST_SCALE = 1 / (LARGEST * 512); // as vLLM's: rows of zeros have a scale too

__device__ __forceinline__ void load(const bf16* from, float (&v)[WIDTH]) {
    const uint4 eight = *reinterpret_cast<const uint4*>(from);
    const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(pairs[i] << 16);
        v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void load(const float* from, float (&v)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ void store(bf16* to, const float (&v)[WIDTH]) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

__device__ __forceinline__ u32 pack_fp8(float a, float b, float c, float d) {
    unsigned short low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return low | u32(high) << 16;
}

// Keeps a NaN, which must not vanish from the output.
__device__ __forceinline__ float larger(float a, float b) { return b != b || a <= b ? b : a; }
