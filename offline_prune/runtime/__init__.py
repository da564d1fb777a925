"""What everything runs on: devices, ranks, sums in a fixed order, memory for activations, time spent.

May import: torch and the errors of `vllm_spense`; nothing else of the pruner.
"""
