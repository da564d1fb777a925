"""`python -m offline_prune` is `spense`, and `spense prune` where no command comes first."""

import sys

from offline_prune.cli import COMMANDS, main

words = sys.argv[1:]
main(words if {command.__name__ for command in COMMANDS} & set(words[:1]) else ["prune", *words])
