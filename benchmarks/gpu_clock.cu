// What time it is on each multiprocessor, in cycles of its own clock and in nanoseconds of the chip's timer.
#include "ptx.cuh"

struct Arguments {
    ulonglong2* readings;  // (multiprocessors): cycles, nanoseconds
};

DEVICE u64 nanoseconds_now() {
    u64 nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}

DEVICE u32 multiprocessor() {
    u32 number;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
    return number;
}

// Of several blocks on a multiprocessor one wins: its store is of both words at once.
extern "C" __global__ void gpu_clock(const __grid_constant__ Arguments arguments) {
    griddepcontrol_wait();
    const u64 cycles = clock64(), nanoseconds = nanoseconds_now();
    arguments.readings[multiprocessor()] = make_ulonglong2(cycles, nanoseconds);
}
