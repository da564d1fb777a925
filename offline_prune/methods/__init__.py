"""The mathematics of pruning: which weights stay, what they become, how they are rounded to FP8.

Functions of tensors, with a Triton twin where a loop is slow. May import: `calibration`, `runtime`, and of
`vllm_spense` errors, format and layout. Knows no settings: a `Recipe` says what to do.
"""
