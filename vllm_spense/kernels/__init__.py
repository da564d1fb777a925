"""GEMM back ends. One file per library or kernel; no policy and no vLLM in here."""
