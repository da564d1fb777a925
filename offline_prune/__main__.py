"""`python -m offline_prune` is `spense prune`."""

import sys

from offline_prune.cli import main

main(["prune", *sys.argv[1:]])
