"""The one-launch kernel: its CUDA source, the instances that it is compiled to, its schedule and its semaphores.

`region_gemm.one_launch` plans with it and launches it. May import: a problem's description and its packing, `jit`.
"""
