"""The source model: reading its files, one decoder block at a time, and finding the gated MLP in each.

May import: `runtime`, and of `vllm_spense` errors, format and the reading of files. Knows no method, no settings.
"""
