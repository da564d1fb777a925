// out[t, n] = x_scale[t] · w_scale[e, n] · Σ_k x[t, k] · W[e, n, k] for the tokens t of every expert e, with FP8 E4M3 x
// and W, W 2:4 in one region and dense in the other: all experts of a layer in one launch.
//
// As in one_launch.cu, W is the left operand of the tensor core, and a producer warpgroup keeps a ring of shared memory
// filled for two consumer warpgroups, each of which multiplies 64 rows of W. What differs: which tiles there are is known
// on the device alone, from the experts' numbers of tokens. Every thread block works the order of tiles out for itself
// (expert_tiles.cuh) and takes those at blockIdx.x, blockIdx.x + gridDim.x, …, so the grid has any size and the launch
// may be captured in a graph whatever the routing will be. A tile is as wide as its expert has tokens, 8 to MAX_TOKENS;
// experts without tokens have no tile. Sums of a tile are one thread block's, in the order of K: results repeat to the
// bit, and a token's do not depend on its neighbours.
#include "expert_gemm.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

constexpr Swizzle SPARSE_SWIZZLE = SPARSE_ROW_BYTES == 128 ? SWIZZLE_128B : SWIZZLE_64B;

typedef Order<MAX_TOKENS, ROWS> TileOrder;
typedef PipelineState<STAGES> Pipe;

// Walks the steps of all tiles of a thread block.
struct Cursor {
    const TileOrder& order;
    int position, count;
    int step = 0;
    Tile tile;

    DEVICE explicit Cursor(const TileOrder& order) : order(order), position(blockIdx.x), count(order.count()) {
        if (!done()) tile = order.tile(position);
    }

    DEVICE bool done() const { return position >= count; }

    DEVICE void advance() {
        if (++step < tile.sparse_steps + tile.dense_steps) return;
        step = 0;
        position += gridDim.x;
        if (!done()) tile = order.tile(position);
    }
};

struct Producer {
    const Arguments& arguments;
    const SharedMemory& shared;
    u64 evict_first, evict_last;   // the L2 cache may drop W first, and x last

    DEVICE Producer(const Arguments& arguments, const SharedMemory& shared) : arguments(arguments), shared(shared) {
        evict_first = createpolicy_evict_first();
        evict_last = createpolicy_evict_last();
    }

    // W is there before the previous kernel ends: only x has to wait for it.
    DEVICE void run(const TileOrder& order) const {
        Cursor w(order), x(order);
        Pipe pipe;
        int ahead = 0;
        for (; ahead < STAGES && !w.done(); ++ahead, w.advance()) copy_w(w, ahead);
        griddepcontrol_wait();
        // Not earlier: what the next kernel reads without waiting may come from a kernel before the previous one.
        griddepcontrol_launch_dependents();
        for (; ahead; --ahead, x.advance(), pipe.advance()) copy_x(x, pipe.stage);
        for (; !w.done(); w.advance(), pipe.advance()) {
            mbarrier_wait(shared.empty + 8 * pipe.stage, pipe.phase ^ 1);
            copy_w(w, pipe.stage);
            copy_x(w, pipe.stage);
        }
    }

    DEVICE void copy_w(const Cursor& at, int stage) const {
        const Tile& tile = at.tile;
        const u32 full = shared.full + 8 * stage;
        const u64 policy = tile.shared ? evict_last : evict_first;
        const int dense = at.step - tile.sparse_steps;
        if (dense < 0) {
            mbarrier_arrive_expect_tx(full, sparse_step_bytes(tile.width));
            cp_async_bulk_tensor_3d(
                shared.w(stage), &arguments.values, at.step * SPARSE_ROW_BYTES, tile.row, tile.expert, full, policy);
            // In items of 8 bytes.
            cp_async_bulk_tensor_3d(
                shared.metadata(stage), &arguments.metadata, at.step * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES / 8,
                tile.row / MMA_ROWS, tile.expert, full, policy);
        } else {
            mbarrier_arrive_expect_tx(full, dense_step_bytes(tile.width));
            cp_async_bulk_tensor_3d(
                shared.w(stage), &arguments.dense, dense * DENSE_K, tile.row, tile.expert, full, policy);
        }
    }

    // Rows after the tile's last token are the next expert's, or zero after all of them: nobody stores their outputs.
    DEVICE void copy_x(const Cursor& at, int stage) const {
        const Tile& tile = at.tile;
        const int dense = at.step - tile.sparse_steps;
        const int boxes = dense < 0 ? X_BOXES : 1;
        const int column = dense < 0 ? at.step * SPARSE_K : arguments.dense_column + dense * DENSE_K;
        for (int box = 0; box < boxes; ++box)
            cp_async_bulk_tensor_3d(
                shared.x(stage) + box * tile.width * 128, &arguments.x[tile.index], column + box * 128, tile.token, 0,
                shared.full + 8 * stage, evict_last);
    }
};

struct Consumer {
    const Arguments& arguments;
    const SharedMemory& shared;
    Pipe pipe;
    int group, thread, lane, warp;   // warpgroup among the consumers; thread and warp in it

    DEVICE Consumer(const Arguments& arguments, const SharedMemory& shared) : arguments(arguments), shared(shared) {
        group = threadIdx.x / WARPGROUP - 1;
        thread = threadIdx.x % WARPGROUP;
        lane = thread % 32;
        warp = thread / 32;
    }

    DEVICE void run(const TileOrder& order) {
        const int count = order.count();
        for (int position = blockIdx.x; position < count; position += gridDim.x)
            compute_as_wide<8>(order.tile(position));
    }

    // WIDTH or more.
    template <int WIDTH>
    DEVICE void compute_as_wide(const Tile& tile) {
        if constexpr (WIDTH < MAX_TOKENS) {
            if (tile.width > WIDTH) return compute_as_wide<2 * WIDTH>(tile);
        }
        compute<WIDTH>(tile);
    }

    // Four consecutive accumulators are a quad: those of rows r and r + 8 (the last two) for two neighbouring tokens.
    template <int WIDTH>
    DEVICE void compute(const Tile& tile) {
        // This thread's rows r and r + 8; they are needed late, so they may come slowly.
        const int row = tile.row + group * MMA_ROWS + warp * 16 + lane / 4;
        const float* w_scale = arguments.w_scale + u64(tile.expert) * arguments.n + tile.column + row - tile.row;
        const float scales[2] = {row < tile.row_end ? w_scale[0] : 0, row + 8 < tile.row_end ? w_scale[8] : 0};
        // Of tokens lane, lane + 32, …: the warp's threads hand them to each other.
        float x_scale[(WIDTH + 31) / 32];
#pragma unroll
        for (int i = 0; i < (WIDTH + 31) / 32; ++i) {
            const int t = tile.token + 32 * i + lane;
            x_scale[i] = t < tile.token_end ? arguments.x_scale[t] : 0;
        }

        float accum[WIDTH / 2];
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) accum[i] = 0;
        for (int step = 0; step < tile.sparse_steps; ++step) {
            mbarrier_wait(shared.full + 8 * pipe.stage, pipe.phase);
            sparse_step<WIDTH>(accum);
            release_stage();
        }
        for (int step = 0; step < tile.dense_steps; ++step) {
            mbarrier_wait(shared.full + 8 * pipe.stage, pipe.phase);
            dense_step<WIDTH>(accum);
            release_stage();
        }
        store<WIDTH>(accum, tile, scales, x_scale);
    }

    template <int WIDTH>
    DEVICE void sparse_step(float (&accum)[WIDTH / 2]) const {
        const u32 selector = metadata_selector(lane);
        const u32 w = shared.w(pipe.stage) + group * MMA_ROWS * SPARSE_ROW_BYTES;
        const u32 metadata = shared.metadata(pipe.stage) + group * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES +
            warp * 128 + lane / 4 * 16;
        u32 words[SPARSE_INSTRUCTIONS];
#pragma unroll
        for (int k = 0; k < SPARSE_INSTRUCTIONS; ++k)
            words[k] = metadata_word(metadata + k * METADATA_TILE_BYTES, selector);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < SPARSE_INSTRUCTIONS; ++k)
            Wgmma<WIDTH>::sparse(
                accum, wgmma_descriptor<SPARSE_SWIZZLE>(w + k * 32),
                wgmma_descriptor<SWIZZLE_128B>(shared.x(pipe.stage) + k / 2 * WIDTH * 128 + k % 2 * 64), words[k]);
    }

    template <int WIDTH>
    DEVICE void dense_step(float (&accum)[WIDTH / 2]) const {
        const u32 w = shared.w(pipe.stage) + group * MMA_ROWS * DENSE_K;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DENSE_INSTRUCTIONS; ++k)
            Wgmma<WIDTH>::dense(
                accum, wgmma_descriptor<SWIZZLE_128B>(w + k * 32),
                wgmma_descriptor<SWIZZLE_128B>(shared.x(pipe.stage) + k * 32));
    }

    // The other consumer multiplies meanwhile. Until here the tensor cores may still read the metadata's registers.
    DEVICE void release_stage() {
        wgmma_commit_and_wait();
        if (thread == 0) mbarrier_arrive(shared.empty + 8 * pipe.stage);
        pipe.advance();
    }

    // Accumulators hold tokens side by side, memory wants rows side by side: each warp turns them in its staging memory,
    // in squares of 16 rows × 8 or 16 tokens.
    template <int WIDTH>
    DEVICE void store(
        const float (&accum)[WIDTH / 2], const Tile& tile, const float (&scales)[2],
        const float (&x_scale)[(WIDTH + 31) / 32]) const {
        constexpr int QUADS = WIDTH < 16 ? 1 : 2, AT_ONCE = WIDTH < 16 * SQUARES ? 1 : SQUARES;
        const u32 staging = shared.staging + (group * 4 + warp) * WARP_STAGING_BYTES;
        // Of the 8 × 8 matrices (rows r and r + 8, of tokens t, then of tokens t + 8) each lane names one row of one.
        const u32 target = staging + (lane / 16 * 8 + lane % 8) * STAGING_PITCH + lane / 8 % 2 * 16;
        const int row = group * MMA_ROWS + warp * 16 + lane % 2 * 8;
#pragma unroll
        for (int first = 0; first < WIDTH / 8; first += QUADS * AT_ONCE) {
            u32 pairs[AT_ONCE][2 * QUADS];
#pragma unroll
            for (int i = 0; i < QUADS * AT_ONCE; ++i) {
                const float* quad = &accum[4 * (first + i)];
                const int t = 8 * (first + i);
                const float a = __shfl_sync(~0u, x_scale[t / 32], t % 32 + lane % 4 * 2);
                const float b = __shfl_sync(~0u, x_scale[t / 32], t % 32 + lane % 4 * 2 + 1);
                u32* pair = &pairs[i / QUADS][i % QUADS * 2];
                pair[0] = pack_bf16(quad[0] * a * scales[0], quad[1] * b * scales[0]);
                pair[1] = pack_bf16(quad[2] * a * scales[1], quad[3] * b * scales[1]);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const u32 to = target + i * SQUARE_BYTES;
                if constexpr (QUADS == 1) stmatrix_x2_trans(to, pairs[i][0], pairs[i][1]);
                else stmatrix_x4_trans(to, pairs[i][0], pairs[i][1], pairs[i][2], pairs[i][3]);
            }
            __syncwarp();
            uint4 turned[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                turned[i] = ld_shared_u32x4(staging + i * SQUARE_BYTES + lane / 2 * STAGING_PITCH + lane % 2 * 16);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int t = tile.token + 8 * (first + i * QUADS) + lane / 2;
                if (lane < 16 * QUADS && t < tile.token_end && tile.row + row < tile.row_end)
                    *reinterpret_cast<uint4*>(arguments.out + u64(t) * arguments.n + tile.column + row) = turned[i];
            }
        }
    }
};

// Fills Order's tables; all threads call it.
DEVICE void read_offsets(const Arguments& arguments, const SharedMemory& shared) {
    if (arguments.choices.ids) {
        // The offsets that expert_route.cu is writing meanwhile.
        int* counts = shared.first;
        count_choices<EXPERTS, THREADS>(counts, arguments.choices, [&] { return arguments.choice_count; });
        if (threadIdx.x < 32) sum_up<EXPERTS>(shared.offsets, [&](int expert) { return counts[expert]; });
        __syncthreads();
    } else {
        for (int expert = threadIdx.x; expert <= EXPERTS; expert += THREADS)
            shared.offsets[expert] = arguments.offsets[expert * arguments.offset_words];
        __syncthreads();
    }
    if (threadIdx.x < 32)
        sum_up<EXPERTS>(shared.first, [&](int expert) {
            return token_tiles(shared.offsets[expert + 1] - shared.offsets[expert], MAX_TOKENS);
        });
    __syncthreads();
}

// Those that are there, before the offsets are known: a thread each of the last warp.
DEVICE void fetch_maps(const Arguments& arguments) {
    bool sparse = false, dense = false;
    for (const Band& band : arguments.bands) {
        sparse |= band.row_tiles && band.sparse_steps;
        dense |= band.row_tiles && band.dense_steps;
    }
    const int thread = int(threadIdx.x) - (THREADS - 32), index = thread - 3;
    if (thread == 0 && sparse) prefetch_tensormap(&arguments.values);
    if (thread == 1 && sparse) prefetch_tensormap(&arguments.metadata);
    if (thread == 2 && dense) prefetch_tensormap(&arguments.dense);
    if (index >= 0 && index < WIDTHS && 8 << index <= MAX_TOKENS) prefetch_tensormap(&arguments.x[index]);
}

extern "C" __global__ __launch_bounds__(THREADS, 1 + LEAN) void expert_gemm(const __grid_constant__ Arguments arguments) {
    extern __shared__ byte raw[];
    const SharedMemory shared(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(shared.full + 8 * stage, 1);
            mbarrier_init(shared.empty + 8 * stage, CONSUMERS);
        }
        fence_mbarrier_init();
    }
    fetch_maps(arguments);
    if (!arguments.choices.ids && !arguments.offsets_are_old) griddepcontrol_wait();
    read_offsets(arguments, shared);
    const TileOrder order{shared.offsets, shared.first, EXPERTS, arguments.bands};
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) Producer(arguments, shared).run(order);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        griddepcontrol_wait();
        Consumer(arguments, shared).run(order);
    }
}
