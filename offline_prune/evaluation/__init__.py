"""What pruning cost: perplexity, KL divergence and agreement with the dense model, on text that calibration left out.

Of each model one decoder block at a time is in memory; `streamed.py` is where that happens.
"""
