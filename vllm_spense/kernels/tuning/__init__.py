"""Finding the fastest plan: random operands, timing, comparison of candidates, and the cache of what was found.

May import: `region_gemm`'s problem, `one_launch`'s semaphores, `jit`.
"""
