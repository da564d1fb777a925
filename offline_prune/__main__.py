"""`python -m offline_prune` is `spense prune`."""

import sys

from vllm_spense.cli import main

main(["prune", *sys.argv[1:]])
