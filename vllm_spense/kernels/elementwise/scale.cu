// out = (out + addend) · scale of the token · scale of the column, in place: what follows a library's GEMMs where no
// kernel of the compiler's takes their scales in.
#include "elementwise.cuh"

#ifndef THREADS
#define THREADS 128   // of a block
#endif

struct Arguments {
    bf16* out;                // (tokens, n)
    const bf16* addend;       // (tokens, n), or null
    const float* x_scale;     // (tokens)
    const float* w_scale;     // (n)
    int n, blocks_each;       // of a row
};

extern "C" __global__ __launch_bounds__(THREADS) void scale(const __grid_constant__ Arguments arguments) {
    const int token = blockIdx.x / arguments.blocks_each;
    const int column = (blockIdx.x % arguments.blocks_each * THREADS + threadIdx.x) * WIDTH;
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
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
    store(arguments.out + at, v);
}
