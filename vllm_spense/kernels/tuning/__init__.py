"""Finding the fastest plan: random operands, timing, comparison of paths, and the cache of what was found."""
