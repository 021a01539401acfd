"""`python -m fastpo.train CONFIG`, the module that launchers start."""

import sys

from fastpo.cli import main

# The `deepspeed` launcher gives each process its rank as an argument, and in LOCAL_RANK.
main(["train", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))])
