"""The source model: reading its files, one decoder block at a time, and finding the gated MLP in each.

May import: `runtime`, the format of `vllm_spense`. Knows no pruning method, no settings.
"""
