"""One-shot pruning of a Hugging Face causal LM into a Spense checkpoint."""
