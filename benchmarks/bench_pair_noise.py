"""The noised pair: ours against eager, torch.compile and a generator's `randn`.

python benchmarks/bench_pair_noise.py [--predictions flow] [--latents sdxl] [--pairs 1 16] ...
"""

import sys

from fastpo.bench.script import main

if __name__ == "__main__":
    tests = ("tests/kernels/test_pair_noise.py", "tests/kernels/test_pair_noise_kernel.py")
    sys.exit(main("pair_noise", __doc__, tests))
