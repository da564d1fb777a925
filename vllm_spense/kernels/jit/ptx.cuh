// Every PTX instruction that CUDA C++ has no function for, one function each, named as in the PTX manual. No kernel
// contains any other inline assembly, except wgmma.cuh's tensor core instructions.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char byte;
typedef unsigned short bf16;

#define DEVICE __device__ __forceinline__

// The address that PTX wants for shared memory.
DEVICE u32 shared_address(const void* pointer) { return __cvta_generic_to_shared(pointer); }

// --- Programmatic dependent launch: a kernel may start while the one before it still runs. GPUs before compute
// capability 9.0 never overlap launches, so there these do nothing.

// Returns once the previous kernel has finished and its writes are visible.
DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start as soon as every thread block has come here.
DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- Arithmetic. Subnormal results and operands are zero (ftz), which saves the instructions that would rescale them.

// 2 to the power of x.
DEVICE float ex2_approx_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a / b, by way of 1 / b.
DEVICE float div_approx_ftz(float a, float b) {
    float y;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// The larger of two numbers; NaN if either is.
DEVICE float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// --- Conversions.

// Two floats as a pair of bfloat16, rounded to nearest even.
DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Four floats as FP8 E4M3, the first in the lowest byte; beyond ±448 they saturate.
DEVICE u32 pack_fp8(float a, float b, float c, float d) {
    unsigned short low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return low | u32(high) << 16;
}

// --- Caches and global memory.

DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.L2 [%0];" ::"l"(address)); }

DEVICE u64 createpolicy_evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE u64 createpolicy_evict_last() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Adds, and orders this thread's memory operations before and after it among all threads of the GPU.
DEVICE u64 atom_add_acq_rel_gpu(u64* address, u64 value) {
    u64 old;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;" : "=l"(old) : "l"(address), "l"(value) : "memory");
    return old;
}

DEVICE u64 ld_acquire_gpu(const u64* address) {
    u64 value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

// --- Shared memory, by the addresses of shared_address.

DEVICE uint4 ld_shared_u32x4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

DEVICE float4 ld_shared_f32x4(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}

DEVICE u64 ld_shared_u64(u32 address) {
    u64 value;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
    return value;
}

DEVICE void st_shared_u64(u32 address, u64 value) {
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
}

// Stores 8 × 8 matrices of 16-bit items transposed; lane 8 · i + j names row j of matrix i.
DEVICE void stmatrix_x2_trans(u32 address, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
        : "memory");
}

DEVICE void stmatrix_x4_trans(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::
        "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// --- Barriers of a thread block.

DEVICE void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// After all mbarrier_init: the copy engine and other thread blocks of the cluster see them.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and lets the barrier also wait for `bytes` of copies.
DEVICE void mbarrier_arrive_expect_tx(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// Barrier 1, among COUNT threads; __syncthreads is barrier 0.
template <int COUNT>
DEVICE void bar_sync_1() {
    asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory");
}

// --- The copy engine (TMA): a box of a tensor map to shared memory.

DEVICE void cp_async_bulk_tensor_3d(u32 to, const void* tensor_map, int x, int y, int z, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;"
        ::"r"(to), "l"(tensor_map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy) : "memory");
}

// A tensor map among a kernel's arguments, which is wanted soon.
DEVICE void prefetch_tensormap(const void* tensor_map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

// --- Clusters of thread blocks.

DEVICE u32 cluster_ctarank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE void barrier_cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void barrier_cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

DEVICE void cluster_sync() {
    barrier_cluster_arrive();
    barrier_cluster_wait();
}

// Stores at `address` in the shared memory of thread block `rank` of the cluster.
DEVICE void st_cluster_f32(u32 address, u32 rank, float value) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.f32 [remote], %2;\n"
        "}\n" ::"r"(address), "r"(rank), "f"(value) : "memory");
}

DEVICE void st_cluster_f32x4(u32 address, u32 rank, float a, float b, float c, float d) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
        "}\n" ::"r"(address), "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// --- Registers of a warpgroup: what one gives back another may take.

template <int COUNT>
DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
