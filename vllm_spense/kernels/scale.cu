// out = (out + addend) · scale of the token · scale of the column, in place: what follows a library's GEMMs where no
// kernel of the compiler's takes their scales in.
//
// Set by the compiler's caller (scale.py): THREADS of a block.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

constexpr int WIDTH = 8;

struct Arguments {
    bf16* out;                // (tokens, n)
    const bf16* addend;       // (tokens, n), or null
    const float* x_scale;     // (tokens)
    const float* w_scale;     // (n)
    int n, blocks_each;       // of a row
};

__device__ __forceinline__ void load(const bf16* from, float (&v)[WIDTH]) {
    const uint4 eight = *reinterpret_cast<const uint4*>(from);
    const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(pairs[i] << 16);
        v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

extern "C" __global__ __launch_bounds__(THREADS) void scale(const __grid_constant__ Arguments arguments) {
    const int token = blockIdx.x / arguments.blocks_each;
    const int column = (blockIdx.x % arguments.blocks_each * THREADS + threadIdx.x) * WIDTH;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (column >= arguments.n) return;
    const u64 at = u64(token) * arguments.n + column;
    const float x_scale = arguments.x_scale[token];
    float v[WIDTH];
    load(arguments.out + at, v);
    if (arguments.addend) {
        float other[WIDTH];
        load(arguments.addend + at, other);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v[i] += other[i];
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] *= x_scale * arguments.w_scale[column + i];
    *reinterpret_cast<uint4*>(arguments.out + at) =
        make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}
