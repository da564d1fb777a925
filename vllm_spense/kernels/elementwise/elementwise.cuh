// What the kernels between GEMMs share: eight values of a row at once, BF16 in memory and float in registers, to FP8.
#pragma once
#include "ptx.cuh"

constexpr int WIDTH = 8;                               // values that a thread takes at once
constexpr float LARGEST = 448;                         // of E4M3
constexpr float SMALLEST_SCALE = 1 / (LARGEST * 512);  // as vLLM's: rows of zeros have a scale too

DEVICE void load(const bf16* from, float (&v)[WIDTH]) {
    const uint4 eight = *reinterpret_cast<const uint4*>(from);
    const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(pairs[i] << 16);
        v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}

DEVICE void load(const float* from, float (&v)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}

DEVICE void store(bf16* to, const float (&v)[WIDTH]) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// v · factor, in FP8.
DEVICE void store_fp8(byte* to, const float (&v)[WIDTH], float factor) {
    *reinterpret_cast<uint2*>(to) = make_uint2(
        pack_fp8(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor),
        pack_fp8(v[4] * factor, v[5] * factor, v[6] * factor, v[7] * factor));
}
