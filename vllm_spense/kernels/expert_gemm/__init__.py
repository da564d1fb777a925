"""The GEMMs of a mixture of experts: one launch for all experts of a layer, each with a sparse and a dense region.

`mixture` runs a whole one: `routing` takes tokens to their experts and back, `gemm` launches what `instances` compiles,
`reference` packs weights and has every kernel's twin in plain torch. May import: a problem's description, its packing
and its reference, the elementwise kernels, `jit`.
"""
