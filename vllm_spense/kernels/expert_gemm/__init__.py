"""The GEMMs of a mixture of experts: one launch for all experts of a layer, each with a sparse and a dense region.

`reference` packs weights and is the twin in plain torch, `instances` compiles `expert_gemm.cu`, `gemm` launches it. May
import: a problem's description and its packing, the elementwise kernels, `jit`, `tuning`.
"""
