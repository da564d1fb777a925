"""Measurements."""

from offline_prune.runtime.threads import sleep_while_waiting

# Before a module of this package imports torch.
sleep_while_waiting()
