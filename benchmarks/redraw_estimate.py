"""Whether drawing the noise again should pay: instructions and bytes, counted, without a GPU.

    python benchmarks/redraw_estimate.py [--out benchmarks/results/redraw.md]

Instructions: what a tile of twice the size adds to the machine code for sm_90, by pair-element
(one element of both sides), so that what a program does once is left out. Time: the larger of bytes
over memory bandwidth and instructions over issue slots, by the vendors' figures and with perfect
overlap. A prediction, nothing measured.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from aot_cases import DTYPES, OBJECTIVES, SDXL, Batch, loss_case, target_bytes
from fake_gpu import FakeGpu, install
from torch import Tensor
from triton import knobs

from fastpo.files import write_text
from fastpo_kernels.pair_loss import PairTarget
from fastpo_kernels.pair_loss.gpu.launch import LaunchConfig, launches_as

# Bytes a second, and instructions a second of one thread: SMs x 4 schedulers x 32 lanes x clock.
GPUS = {
    "H200": (4.8e12, 132 * 128 * 1.755e9),
    "A100 80GB": (2.04e12, 108 * 128 * 1.41e9),
    "RTX 4090": (1.008e12, 128 * 128 * 2.52e9),
}
SMALL, LARGE = LaunchConfig(1024, 16, 8), LaunchConfig(2048, 16, 8)
# Bytes of one pair-element: a pass's predictions, and what the noise kernel writes of a target.
PREDICTIONS = 8
WAYS = {
    "epsilon, stored": 4,
    "epsilon, redrawn": 0,
    "v, target stored": 8,
    "v, noise stored": 4,
    "v, redrawn": 0,
    "v of a posterior, redrawn": 0,
}
BATCH = Batch(16, SDXL, DTYPES["bf16"])


def target_of(way: str) -> Tensor | PairTarget:
    """What the losses get."""
    stored = {"epsilon, stored": BATCH.shared, "v, target stored": BATCH.rows}
    if way in stored:
        return stored[way](DTYPES["fp32"])
    formed = {
        "epsilon, redrawn": "epsilon redrawn",
        "v, noise stored": "v from noise",
        "v, redrawn": "v redrawn",
        "v of a posterior, redrawn": "v and posterior redrawn",
    }
    return BATCH.formed(formed[way])


def instructions(kernel: Any) -> int:
    """Machine instructions of a compiled kernel, padding left out."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text, re.M)
    return len(found) - found.count("NOP")


def per_element(gpu: FakeGpu, target: Tensor | PairTarget) -> list[float]:
    """Instructions a pair-element, forward and backward: what four elements a thread more add."""
    case = loss_case("", "bf16", OBJECTIVES["dpo"], BATCH, sources=[BATCH.rows()], target=target)
    counts = []
    for config in (SMALL, LARGE):
        before = len(gpu.compiled)
        with launches_as(config):
            case.run()
        counts.append([instructions(made.kernel) for made in gpu.compiled[before:]])
    return [(large - small) / 4 for small, large in zip(*counts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        "Per pair-element, bf16 predictions and latents, float32 noise and target; plain DPO. "
        "Picoseconds of both passes and of the noise kernel's extra writes: predicted, not "
        "measured.",
        "",
        f"| target | written, B | read a pass, B | instructions fwd / bwd | {' | '.join(GPUS)} |",
        "|---" * (4 + len(GPUS)) + "|",
    ]
    gpu = install("sm_90")
    for way, written in WAYS.items():
        target = target_of(way)
        counts, read = per_element(gpu, target), target_bytes(target, BATCH.pairs)
        cells = []
        for bandwidth, rate in GPUS.values():
            passes = [max((PREDICTIONS + read) / bandwidth, count / rate) for count in counts]
            cells.append(f"{1e12 * (written / bandwidth + sum(passes)):.1f}")
        work = " / ".join(f"{count:.0f}" for count in counts)
        lines.append(f"| {way} | {written} | {read} | {work} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
