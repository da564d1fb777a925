// The tensor core instructions of compute capability 9.0 for FP8 E4M3: a warpgroup multiplies 64 rows of W, the left
// operand, with N tokens of x, the right operand, and adds to accumulators in its registers.
//
// An instruction names all of its registers, N / 2 in each thread, so there is one function for each N:
//
//     Wgmma<N>::dense(accum, w, x)             64 × 32 values of W
//     Wgmma<N>::sparse(accum, w, x, metadata)  64 × 64 values of W, the half that 2:4 keeps of them in memory
//
// w and x are descriptors of operands in shared memory. The instructions are asynchronous: wgmma_fence comes before the
// first that uses a register, wgmma_commit_and_wait after the last.
#pragma once
#include "ptx.cuh"

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit_and_wait() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

enum Swizzle { SWIZZLE_128B = 1, SWIZZLE_64B = 2 };

// Of a K-major operand: its address, and the bytes from eight swizzled rows to the next eight.
template <Swizzle SWIZZLE>
DEVICE u64 wgmma_descriptor(u32 address) {
    constexpr u64 stride = SWIZZLE == SWIZZLE_128B ? 1024 : 512;
    return u64(SWIZZLE) << 62 | (stride >> 4) << 32 | u64(1) << 16 | (address & 0x3ffff) >> 4;
}

template <int N>
struct Wgmma;

// The instruction's list of registers, and the same list as operands of `asm`.
#define REGISTERS_4 "%0, %1, %2, %3"
#define REGISTERS_8 REGISTERS_4 ", %4, %5, %6, %7"
#define REGISTERS_16 REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 REGISTERS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128 REGISTERS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define ACCUM_4(i) "+f"(accum[i]), "+f"(accum[i + 1]), "+f"(accum[i + 2]), "+f"(accum[i + 3])
#define ACCUM_8(i) ACCUM_4(i), ACCUM_4(i + 4)
#define ACCUM_16(i) ACCUM_8(i), ACCUM_8(i + 8)
#define ACCUM_32(i) ACCUM_16(i), ACCUM_16(i + 16)
#define ACCUM_64(i) ACCUM_32(i), ACCUM_32(i + 32)
#define ACCUM_128(i) ACCUM_64(i), ACCUM_64(i + 64)

// COUNT = N / 2 accumulators are operands 0 … COUNT − 1; W, X and METADATA are the numbers of the operands after them.
#define DEFINE_WGMMA(N, COUNT, W, X, METADATA)                                                                         \
    template <>                                                                                                        \
    struct Wgmma<N> {                                                                                                  \
        static DEVICE void dense(float (&accum)[COUNT], u64 w, u64 x) {                                                \
            asm volatile(                                                                                              \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3"                                             \
                " {" REGISTERS_##COUNT "}, %" #W ", %" #X ", 1, 1, 1;"                                                 \
                : ACCUM_##COUNT(0) : "l"(w), "l"(x));                                                                  \
        }                                                                                                              \
        static DEVICE void sparse(float (&accum)[COUNT], u64 w, u64 x, u32 metadata) {                                 \
            asm volatile(                                                                                              \
                "wgmma.mma_async.sp.sync.aligned.m64n" #N "k64.f32.e4m3.e4m3"                                          \
                " {" REGISTERS_##COUNT "}, %" #W ", %" #X ", %" #METADATA ", 0, 1, 1, 1;"                              \
                : ACCUM_##COUNT(0) : "l"(w), "l"(x), "r"(metadata));                                                   \
        }                                                                                                              \
    };

DEFINE_WGMMA(8, 4, 4, 5, 6)
DEFINE_WGMMA(16, 8, 8, 9, 10)
DEFINE_WGMMA(32, 16, 16, 17, 18)
DEFINE_WGMMA(64, 32, 32, 33, 34)
DEFINE_WGMMA(128, 64, 64, 65, 66)
DEFINE_WGMMA(256, 128, 128, 129, 130)

#undef DEFINE_WGMMA
