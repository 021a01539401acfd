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

import triton
from aot_report import FORMED, SEPARATE, SHARED, TARGETS, Case, Target, source_of
from aot_report import pair_loss_backward as backward
from aot_report import pair_loss_forward as forward
from triton import knobs

from fastpo_kernels.pair_loss.launch import LaunchConfig

# Bytes a second, and instructions a second of one thread: SMs x 4 schedulers x 32 lanes x clock.
GPUS = {
    "H200": (4.8e12, 132 * 128 * 1.755e9),
    "A100 80GB": (2.04e12, 108 * 128 * 1.41e9),
    "RTX 4090": (1.008e12, 128 * 128 * 2.52e9),
}
SMALL, LARGE = LaunchConfig(1024, 16, 8), LaunchConfig(2048, 16, 8)
# Bytes of one pair-element: the predictions of a pass, and the target's parts read by a pass.
PREDICTIONS = {"fwd": 8, "bwd": 8}
# Name, the kernels' target, what the noise kernel writes for it.
WAYS: dict[str, tuple[Target, int]] = {
    "epsilon, stored": (SHARED, 4),
    "epsilon, redrawn": (FORMED["epsilon redrawn"], 0),
    "v, target stored": (SEPARATE, 8),
    "v, noise stored": (FORMED["v from noise"], 4),
    "v, redrawn": (FORMED["v redrawn"], 0),
    "v of a posterior, redrawn": (FORMED["v and posterior redrawn"], 0),
}


def read_bytes(target: Target) -> int:
    """Bytes of a target's parts that a pass reads: noise float32, latents and log-variance bf16."""
    noise = ("noise" in target.parts) * (8 if target.formula == "separate" else 4)
    return noise + 4 * (("latents" in target.parts) + ("logvar" in target.parts))


def instructions(case: Case) -> int:
    """Machine instructions of a kernel for sm_90, padding left out."""
    options = {"num_warps": case.num_warps}
    compiled = triton.compile(source_of(case), target=TARGETS["sm_90"], options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text, re.M)
    return len(found) - found.count("NOP")


def per_element(target: Target, direction: str) -> float:
    """Instructions a pair-element: what four elements a thread more add to the kernel."""
    make = forward if direction == "fwd" else backward
    small, large = (instructions(make("", "bf16", target=target, config=c)) for c in (SMALL, LARGE))
    return (large - small) / 4


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
    for name, (target, written) in WAYS.items():
        counts = {d: per_element(target, d) for d in ("fwd", "bwd")}
        read = read_bytes(target)
        cells = []
        for bandwidth, rate in GPUS.values():
            seconds = written / bandwidth
            for d, count in counts.items():
                seconds += max((PREDICTIONS[d] + read) / bandwidth, count / rate)
            cells.append(f"{1e12 * seconds:.1f}")
        work = f"{counts['fwd']:.0f} / {counts['bwd']:.0f}"
        lines.append(f"| {name} | {written} | {read} | {work} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
