"""What vLLM calls: the quantization config, linear methods, weight loaders, norms and activations of pruned models.

The only package here that imports vLLM. May import: `ops` and everything below it.
"""
