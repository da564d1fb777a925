"""CUDA C++ at run time: compiling with NVRTC, loading and launching through the driver.

May import: `tuning.plan_cache`, which keeps what was compiled.
"""
