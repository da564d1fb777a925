// From gate_up's raw sums to down's input: scales, SiLU, product, and FP8 with one scale for each token, in one launch.
//
// A token's row is divided among a cluster of thread blocks, because a decode step has fewer tokens than the chip has
// multiprocessors. They agree on the row's largest value through their shared memory.
//
// Set by the compiler's caller (silu_mul_quant.py): THREADS of a block, VECTORS of eight values that a thread has in a
// row, TOKENS that a cluster takes at once, so that it reads the weight's scales once for all of them, and RAW_FLOAT.
// elementwise.cuh comes before this.

constexpr int CLUSTER = 8, WARPS = THREADS / 32;

struct Arguments {
    const void* raw;          // (tokens, 2 · size): [gate sparse | up sparse | gate dense | up dense]
    const float* x_scale;     // (tokens)
    const float* w_scale;     // (2 · size)
    byte* out;                // (tokens, size)
    float* scale;             // (tokens)
    int tokens, size;
    int boundary;             // columns of a sparse region
};

__device__ __forceinline__ void load_raw(const void* raw, u64 at, float (&v)[WIDTH]) {
#if RAW_FLOAT
    load(static_cast<const float*>(raw) + at, v);
#else
    load(static_cast<const bf16*>(raw) + at, v);
#endif
}

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
void silu_mul_quant(const __grid_constant__ Arguments arguments) {
    __shared__ float of_warps[WARPS][TOKENS];
    __shared__ float of_blocks[CLUSTER][TOKENS];
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    // Nobody may write into a block's shared memory before it runs.
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    // The next kernel waits for this one's end, but may fetch its weights meanwhile.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int size = arguments.size, boundary = arguments.boundary, first = blockIdx.x / CLUSTER * TOKENS;
    const int count = min(TOKENS, arguments.tokens - first);
    const int thread = threadIdx.x, lane = thread % 32;
    const auto place = [&](int vector) { return ((vector * CLUSTER + int(rank)) * THREADS + thread) * WIDTH; };

    float values[TOKENS][VECTORS][WIDTH], largest[TOKENS] = {};
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = place(vector);
        if (at >= size) break;
        float gate_scale[WIDTH], up_scale[WIDTH];
        load(arguments.w_scale + at, gate_scale);
        load(arguments.w_scale + size + at, up_scale);
        const int gate_at = at < boundary ? at : at + boundary, up_at = at < boundary ? at + boundary : at + size;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (t >= count) break;
            const u64 row = u64(first + t) * 2 * size;
            const float scale = arguments.x_scale[first + t];
            float gate[WIDTH], up[WIDTH];
            load_raw(arguments.raw, row + gate_at, gate);
            load_raw(arguments.raw, row + up_at, up);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const float g = gate[i] * scale * gate_scale[i], u = up[i] * scale * up_scale[i];
                const float value = __fdividef(g, 1 + __expf(-g)) * u;
                values[t][vector][i] = value;
                largest[t] = larger(fabsf(value), largest[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2)
            largest[t] = larger(__shfl_xor_sync(~0u, largest[t], offset), largest[t]);
        if (lane == 0) of_warps[thread / 32][t] = largest[t];
    }
    __syncthreads();
    asm volatile("barrier.cluster.wait;" ::: "memory");
    if (thread < CLUSTER * TOKENS) {
        const int to = thread / TOKENS, t = thread % TOKENS;
        float mine = 0;
        for (int warp = 0; warp < WARPS; ++warp) mine = larger(of_warps[warp][t], mine);
        asm volatile(
            "{\n"
            ".reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "st.shared::cluster.f32 [remote], %2;\n"
            "}\n" ::"r"(u32(__cvta_generic_to_shared(&of_blocks[rank][t]))), "r"(to), "f"(mine) : "memory");
    }
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (t >= count) break;
        float all = 0;
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block) all = larger(of_blocks[block][t], all);
        const float scale = larger(all / LARGEST, SMALLEST_SCALE), inverse = 1 / scale;
        if (rank == 0 && thread == 0) arguments.scale[first + t] = scale;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = place(vector);
            if (at >= size) break;
            float q[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) q[i] = values[t][vector][i] * inverse;
            *reinterpret_cast<uint2*>(arguments.out + u64(first + t) * size + at) =
                make_uint2(pack_fp8(q[0], q[1], q[2], q[3]), pack_fp8(q[4], q[5], q[6], q[7]));
        }
    }
}
