// Into a linear layer's FP8 input with one scale for each token, in one launch: from its input as it is, or (NORM) from
// the residual stream by way of x + residual and RMS normalization. x may be a GEMM's raw sums (SCALED), in two parts.
//
// A thread block takes a row. The next kernel may begin before this one has read anything: a GEMM then fetches its first
// weights meanwhile, and waits only for its x.
#include "elementwise.cuh"

#ifndef THREADS
#define THREADS 640   // of a block
#define VECTORS 1     // of eight values that a thread has
#define NORM 1        // add the residual and normalize; else only quantize
#define SCALED 0      // x is a GEMM's raw sums
#endif

constexpr int WARPS = THREADS / 32;

struct Arguments {
    const bf16* x;            // (tokens, size)
    const bf16* addend;       // (tokens, size), to raw sums; or null
    const bf16* residual;     // (tokens, size)
    const bf16* weight;       // (size), of the norm
    byte* out;                // (tokens, size)
    float* scale;             // (tokens)
    bf16* sum;                // (tokens, size): x + residual
    const float* x_scale;     // (tokens), of raw sums
    const float* w_scale;     // (size)
    int size;
    float epsilon;
};

extern "C" __global__ __launch_bounds__(THREADS) void norm_quant(const __grid_constant__ Arguments arguments) {
    __shared__ float squares_of[32], largest_of[32];
    griddepcontrol_launch_dependents();
    const int size = arguments.size, thread = threadIdx.x, lane = thread % 32;
    const u64 row = u64(blockIdx.x) * size;
    float values[VECTORS][WIDTH], squares = 0, largest = 0;
    float weight[VECTORS][WIDTH];
    if constexpr (NORM) {
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = (vector * THREADS + thread) * WIDTH;
            if (at >= size) break;
            load(arguments.weight + at, weight[vector]);
            // Into the cache only: as many registers again are not to be had.
            if constexpr (SCALED) prefetch_l2(arguments.w_scale + at);
        }
    }
    griddepcontrol_wait();
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = (vector * THREADS + thread) * WIDTH;
        if (at >= size) break;
        float(&v)[WIDTH] = values[vector];
        load(arguments.x + row + at, v);
        if constexpr (SCALED) {
            if (arguments.addend) {
                float addend[WIDTH];
                load(arguments.addend + row + at, addend);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) v[i] = __fadd_rn(v[i], addend[i]);
            }
            const float x_scale = arguments.x_scale[blockIdx.x];
            float w_scale[WIDTH];
            load(arguments.w_scale + at, w_scale);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], x_scale), w_scale[i]);
        }
        if constexpr (NORM) {
            float residual[WIDTH];
            load(arguments.residual + row + at, residual);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                v[i] = __fadd_rn(v[i], residual[i]); // rounded before and after, as the twin does it
                squares += v[i] * v[i];
            }
            store(arguments.sum + row + at, v);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) v[i] *= weight[vector][i];
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) largest = max_nan(fabsf(v[i]), largest);
    }
    const auto reduce = [&]() {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
            squares += __shfl_xor_sync(~0u, squares, offset);
            largest = max_nan(__shfl_xor_sync(~0u, largest, offset), largest);
        }
    };
    reduce();
    if (lane == 0) squares_of[thread / 32] = squares, largest_of[thread / 32] = largest;
    __syncthreads();
    squares = lane < WARPS ? squares_of[lane] : 0;
    largest = lane < WARPS ? largest_of[lane] : 0;
    reduce();
    const float norm = NORM ? rsqrtf(squares / size + arguments.epsilon) : 1;
    const float scale = max_nan(largest * norm / LARGEST, SMALLEST_SCALE), factor = norm / scale;
    if (thread == 0) arguments.scale[blockIdx.x] = scale;
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = (vector * THREADS + thread) * WIDTH;
        if (at >= size) break;
        store_fp8(arguments.out + row + at, values[vector], factor);
    }
}
