"""Calibration: the text, the hidden states that it makes in front of each block, and Hessians of them.

May import: `model`, `runtime`, the errors of `vllm_spense`. Knows no pruning method, no settings.
"""
