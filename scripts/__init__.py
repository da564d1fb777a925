"""Set-up, demo, and what tests and benchmarks share with them."""

from offline_prune.runtime.threads import sleep_while_waiting

# Before a module of this package imports torch.
sleep_while_waiting()
