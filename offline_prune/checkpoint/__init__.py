"""The checkpoint on disk: writing it block by block, going on after a crash, verifying and evaluating it.

May import: `model`, `methods.fp8`, `runtime`. Knows no settings.
"""
