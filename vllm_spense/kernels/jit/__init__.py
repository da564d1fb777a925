"""CUDA C++ at run time: compiling with NVRTC, loading and launching through the driver."""
