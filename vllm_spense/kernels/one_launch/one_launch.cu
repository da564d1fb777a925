// out[m, n] = Σ_k x[m, k] · W[n, k] with FP8 E4M3 x and W, W 2:4 in one region and dense in the other, in one launch.
//
// W is the left operand of the tensor core, because only that side may be sparse; x is the right one. What each thread
// block computes stands in a table (schedule.py): segments, each a stretch of K of one output tile of 128 rows of W ×
// TOKENS. A thread block has three warpgroups:
//
//     warpgroup 0: producer        warpgroup 1: consumer          warpgroup 2: consumer
//     one thread starts copies     rows 0 … 63 of the tile        rows 64 … 127
//              │                   accum: 64 × TOKENS float32     accum
//              │ TMA                        ▲ wgmma                      ▲ wgmma
//              ▼                            │                            │
//     ┌─────────────────┬─────────────────┬─┴─────────────── … ┬─────────┴───────┐
//     │ stage 0         │ stage 1         │ stage 2            │ stage STAGES−1  │   ring in shared memory
//     │ W  x  metadata  │ W  x  metadata  │ W  x  metadata     │ W  x  metadata  │
//     └─────────────────┴─────────────────┴─────────────────── … ┴───────────────┘
//        producer ── full[stage]: all bytes of a step are there ──▶ consumers
//        producer ◀── empty[stage]: both consumers have read it ─── consumers
//
// A step takes one stage: SPARSE_K columns of a compressed weight with their metadata, or DENSE_K of a dense one.
//
// Where there are fewer tiles than multiprocessors, K of a tile is cut into splits, each computed by a thread block of
// its own. They are added up in float32 and always in the same order, so that results repeat to the bit: splits in a
// cluster through shared memory (ClusterReduction), others through global memory (SplitKReduction). No thread block
// waits for work that may not have begun, so launches on two streams cannot block each other. These two, and how outputs
// are written (Epilogue), are in reduction.cuh; this file has all that comes before.
#include "one_launch.cuh"
#include "reduction.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

constexpr Swizzle SPARSE_SWIZZLE = SPARSE_ROW_BYTES == 128 ? SWIZZLE_128B : SWIZZLE_64B;

// Walks the steps of all segments of a thread block.
struct Cursor {
    const Segment* next;
    Segment segment;
    int step = 0;
    bool done = false;

    DEVICE explicit Cursor(const Segment* first) : next(first) { enter(); }

    DEVICE void enter() {
        segment = *next++;
        step = 0;
        while (!segment.steps()) {
            done = segment.last;
            if (done) return;
            segment = *next++;
        }
    }

    DEVICE void advance() {
        if (++step < segment.steps()) return;
        done = segment.last;
        if (!done) enter();
    }
};

struct Producer {
    const Arguments& arguments;
    const SharedMemory& shared;
    u64 w_policy, x_policy;   // the L2 cache may drop W first, and x last

    DEVICE Producer(const Arguments& arguments, const SharedMemory& shared) : arguments(arguments), shared(shared) {
        w_policy = createpolicy_evict_first();
        x_policy = createpolicy_evict_last();
        // Tiles of other tokens read the same W.
        if (arguments.tokens > TOKENS) w_policy = x_policy;
    }

    // W is there before the previous kernel ends: only x has to wait for it.
    DEVICE void run(const Segment* first) const {
        Cursor w(first), x(first);
        PipelineState<STAGES> pipe;
        int ahead = 0;
        for (; ahead < STAGES && !w.done; ++ahead, w.advance()) copy_w(w, ahead);
        griddepcontrol_wait();
        // Not earlier: what the next kernel reads without waiting may come from a kernel before the previous one.
        griddepcontrol_launch_dependents();
        for (; ahead; --ahead, x.advance(), pipe.advance()) copy_x(x, pipe.stage);
        for (; !w.done; w.advance(), pipe.advance()) {
            mbarrier_wait(shared.empty + 8 * pipe.stage, pipe.phase ^ 1);
            copy_w(w, pipe.stage);
            copy_x(w, pipe.stage);
        }
    }

    DEVICE void copy_w(const Cursor& at, int stage) const {
        const Segment& segment = at.segment;
        const u32 full = shared.full + 8 * stage;
        const int dense = at.step - segment.sparse_steps();
        if (dense < 0) {
            const int step = segment.sparse_begin + at.step;
            mbarrier_arrive_expect_tx(full, SPARSE_STEP_BYTES);
            cp_async_bulk_tensor_3d(
                shared.w(stage), &arguments.values, step * SPARSE_ROW_BYTES, segment.row, segment.projection, full,
                w_policy);
            // In items of 8 bytes.
            cp_async_bulk_tensor_3d(
                shared.metadata(stage), &arguments.metadata, step * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES / 8,
                segment.row / 64, segment.projection, full, w_policy);
        } else {
            const int column = (segment.dense_begin + dense) * DENSE_K;
            mbarrier_arrive_expect_tx(full, DENSE_STEP_BYTES);
            cp_async_bulk_tensor_3d(
                shared.w(stage), &arguments.dense, column, segment.row, segment.projection, full, w_policy);
        }
    }

    DEVICE void copy_x(const Cursor& at, int stage) const {
        const Segment& segment = at.segment;
        const int dense = at.step - segment.sparse_steps();
        const int boxes = dense < 0 ? X_BOXES : 1;
        const int column = dense < 0 ? (segment.sparse_begin + at.step) * SPARSE_K
                                     : arguments.dense_column + (segment.dense_begin + dense) * DENSE_K;
        for (int box = 0; box < boxes; ++box)
            cp_async_bulk_tensor_3d(
                shared.x(stage) + box * X_BOX_BYTES, &arguments.x, column + box * 128, segment.token, 0,
                shared.full + 8 * stage, x_policy);
    }
};

struct Consumer : ConsumerThread {
    PipelineState<STAGES> pipe;

    DEVICE explicit Consumer(const SharedMemory& shared) : ConsumerThread(shared) {}

    DEVICE void multiply(Accum& accum, const Segment& segment) {
#pragma unroll
        for (int i = 0; i < 4 * QUADS; ++i) accum[i] = 0;
        for (int step = segment.sparse_begin; step < segment.sparse_end; ++step) {
            mbarrier_wait(shared.full + 8 * pipe.stage, pipe.phase);
            sparse_step(accum);
            release_stage();
        }
        for (int step = segment.dense_begin; step < segment.dense_end; ++step) {
            mbarrier_wait(shared.full + 8 * pipe.stage, pipe.phase);
            dense_step(accum);
            release_stage();
        }
    }

    DEVICE void sparse_step(Accum& accum) const {
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
            Wgmma<TOKENS>::sparse(
                accum, wgmma_descriptor<SPARSE_SWIZZLE>(w + k * 32),
                wgmma_descriptor<SWIZZLE_128B>(shared.x(pipe.stage) + k / 2 * X_BOX_BYTES + k % 2 * 64), words[k]);
    }

    DEVICE void dense_step(Accum& accum) const {
        const u32 w = shared.w(pipe.stage) + group * MMA_ROWS * DENSE_K;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DENSE_INSTRUCTIONS; ++k)
            Wgmma<TOKENS>::dense(
                accum, wgmma_descriptor<SWIZZLE_128B>(w + k * 32),
                wgmma_descriptor<SWIZZLE_128B>(shared.x(pipe.stage) + k * 32));
    }

    // The other consumer multiplies meanwhile. Until here the tensor cores may still read the metadata's registers.
    DEVICE void release_stage() {
        wgmma_commit_and_wait();
        if (thread == 0) mbarrier_arrive(shared.empty + 8 * pipe.stage);
        pipe.advance();
    }
};

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
void gemm(const __grid_constant__ Arguments arguments) {
    extern __shared__ byte raw[];
    const SharedMemory shared(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(shared.full + 8 * stage, 1);
            mbarrier_init(shared.empty + 8 * stage, CONSUMERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    const Segment* segments = arguments.segments + blockIdx.x * arguments.segments_each;
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) Producer(arguments, shared).run(segments);
        if (CLUSTER > 1) {   // see ClusterReduction
            __syncwarp();
            cluster_sync();
            cluster_sync();
        }
    } else {
        setmaxnreg_inc<232>();
        griddepcontrol_wait();
        Consumer consumer(shared);
        Accum accum;
        for (bool last = false; !last; ++segments) {
            const Segment segment = *segments;
            last = segment.last;
            consumer.multiply(accum, segment);
            if (CLUSTER > 1) ClusterReduction{accum, segment, arguments, consumer}.reduce_and_store();
            else if (segment.split_count > 1) SplitKReduction{accum, segment, arguments, consumer}.reduce_and_store();
            else Epilogue{segment, arguments, consumer}.store_tile(accum);
        }
    }
}
