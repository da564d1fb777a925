"""The checkpoint on disk: writing it block by block, going on after a crash, verifying and evaluating it.

May import: `model`, `methods`, `runtime`, and of `vllm_spense` what describes a checkpoint. Knows no settings.
"""
