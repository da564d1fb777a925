"""Custom ops that torch.compile sees, and the choice of a kernel for each number of tokens.

May import: `kernels`, errors. Knows no vLLM.
"""
