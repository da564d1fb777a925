"""The commands of `spense`: their options, and what they show.

Each imports what it needs when it runs. `offline_prune/cli.py` gathers them.
"""
