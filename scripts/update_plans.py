"""Writes what the shipped configurations cost, as `fastpo plan` tells it: the README's table, and
the line in each configuration's header that begins with "Planned for".

    python scripts/update_plans.py

Runs without weights, data or a GPU; about half a minute a configuration.
"""

import re
from pathlib import Path

from rich.progress import track

from fastpo.bench.table import with_section
from fastpo.config import load_config
from fastpo.plan import Plan, make_plan
from fastpo.system.files import write_text

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONFIGS = ROOT / "fastpo" / "configs"
# Configuration, GPU, processes: as in the files' headers.
ROWS = (
    ("sdxl-lora-24gb", "rtx4090", 1),
    ("sd15-full-24gb", "rtx4090", 1),
    ("sdxl-full-80gb", "h100", 1),
    ("sdxl-full-8x80gb-zero2", "h100", 8),
    ("sdxl-full-multinode-zero3", "h100", 16),
    ("mapo-published", "h100", 8),
    ("diffusion-dpo-published", "a100", 16),
    ("adaptive-dpo-published", "a100", 1),
)
RIVALS = {"mapo": "MaPO", "adaptive_dpo": "Adaptive-DPO"}


def line(name: str, plan: Plan) -> str:
    """One row of the table."""
    ours, floor = plan.costs[:2]
    rival = RIVALS.get(plan.objective, "Diffusion-DPO")
    recipe = next(cost for cost in plan.costs[2:] if cost.name.startswith(rival))
    about = plan.assumptions
    gpus = f"{about.world_size} x {about.gpu.removeprefix('NVIDIA ')}"
    cells = (
        f"`{name}`",
        gpus,
        f"{about.micro_batch_size}",
        f"{ours.tflop:.1f}",
        f"{ours.tflop / floor.tflop:.2f}x",
        f"{recipe.slower:.2f}x",
        f"{ours.peak_bytes / 1e9:.0f}" + ("" if ours.fits else " (does not fit)"),
        f"{recipe.peak_bytes / 1e9:.0f}" + ("" if recipe.fits else " (does not fit)"),
    )
    return "| " + " | ".join(cells) + " |"


def header(plan: Plan) -> str:
    """The line in a configuration's header."""
    ours, about = plan.costs[0], plan.assumptions
    gpus = f"{about.world_size} x {about.gpu.removeprefix('NVIDIA ')}"
    pairs = about.world_size * about.micro_batch_size * about.accumulation_steps
    hours = f"{ours.hours:.3g} h at {about.utilization:.0%} of the peak"
    return (
        f"# Planned for {gpus}, {about.micro_batch_size} pair(s) a pass, {pairs:,} a step: "
        f"{ours.peak_bytes / 1e9:.0f} GB, {hours}."
    )


def main() -> None:
    """Plans every row, and rewrites the headers' lines and the text between the README's marks."""
    lines = [
        "| configuration | GPUs | pairs a pass | TFLOP a pair | over the bare policy "
        "| released recipe, time | peak, GB | recipe's peak, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gpu, processes in track(ROWS, "plans"):
        path = CONFIGS / f"{name}.yaml"
        plan = make_plan(load_config(path), gpu=gpu, world_size=processes)
        lines.append(line(name, plan))
        text = re.sub("^# Planned for.*$", header(plan), path.read_text(), flags=re.MULTILINE)
        write_text(path, text)
    text = (
        "\n".join(lines)
        + "\n\nPlanned, not measured: FLOPs by torch's counter on the real modules, activations "
        "estimated. The recipe is the\nreleased trainer's of the same objective, on the same "
        "model, method and batch; its time is relative to ours."
    )
    write_text(README, with_section(README.read_text(), "plans", text))


if __name__ == "__main__":
    main()
