"""Finding the fastest plan: random operands, timing, comparison of candidates, and the cache of what was found.

May import: `region_gemm`'s description of a problem, `jit`.
"""
