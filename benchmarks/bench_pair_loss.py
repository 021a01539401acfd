"""Pair losses: ours against eager, our reference and torch.compile.

    python benchmarks/bench_pair_loss.py [--objectives dpo] [--latents sdxl] [--pairs 1 16] ...

Without a GPU our kernels do not run; eager, the compiled CPU path and ours, the default on a CPU,
are timed and the CSV says so.
"""

import sys

from fastpo.bench.script import main

if __name__ == "__main__":
    tests = ("tests/loss/test_loss.py", "tests/kernels/test_pair_loss.py")
    sys.exit(main("pair_loss", __doc__, tests))
