"""Kernels and what finds the fastest: no policy, no vLLM. May import: the format, torch, CUDA's bindings."""
