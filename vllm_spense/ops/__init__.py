"""Custom ops that torch.compile sees, and the choice of a kernel for each number of tokens.

May import: `kernels`, the format. Knows no vLLM.
"""
