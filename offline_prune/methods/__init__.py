"""The mathematics of pruning: which weights stay, what they become, how they are rounded to FP8.

Pure functions of tensors, with a Triton twin where a loop is slow. May import: `calibration`, `model`,
`runtime`; no settings.
"""
