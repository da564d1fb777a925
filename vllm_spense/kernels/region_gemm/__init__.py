"""GEMMs of a sparse and a dense region: a problem's description, the packed weight, and a file for each path.

Paths: `reference` (plain torch), `library` (by `cusparselt` and `cublaslt`), `one_launch` (our kernel), `dense` (a
copy). `unpruned_gemm` runs layers without a sparse region. May import: `one_launch`, `tuning`, `jit`.
"""
