"""What stands between the GEMMs: activation, norms and quantization as CUDA kernels, each with its launcher.

May import: `region_gemm`'s problem and reference, `jit`.
"""
