"""What vLLM calls: the quantization config, linear methods, weight loaders, norms and activations of pruned models.

The only package that imports vLLM. May import: `ops`, `kernels`, and the modules beside it that describe a checkpoint.
"""
