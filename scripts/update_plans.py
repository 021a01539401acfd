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
from fastpo.plan.architecture import resolve_architecture
from fastpo.plan.memory import step_memory
from fastpo.plan.planner import latent_elements, make_shapes, measure
from fastpo.plan.recipes import own_recipe
from fastpo.system.files import write_text
from fastpo.train.sharding import read_sharding

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LARGE_RUNS = ROOT / "docs" / "large-runs.md"
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
    ("z-image-lora-24gb", "rtx4090", 1),
    ("flux2-klein-lora-24gb", "rtx4090", 1),
    ("flux1-dev-qlora-24gb", "rtx4090", 1),
    ("qwen-image-qlora-24gb", "rtx4090", 1),
    ("qwen-image-lora-80gb", "h100", 1),
    ("qwen-image-lora-8x80gb-zero2", "h100", 8),
    ("sd3.5-medium-full-80gb", "h100", 1),
)
# The table of docs/large-runs.md: one configuration, how it is shared, processes.
SHARED = "sdxl-full-8x80gb-zero2"
MODES = (None, "zero1", "zero2", "zero3", "zero2_offload")
PROCESSES = (1, 8, 64)
PARTS = ("weights", "gradients", "optimizer", "activations", "communication")
RIVALS = {"mapo": "MaPO", "adaptive_dpo": "Adaptive-DPO"}


def line(name: str, plan: Plan) -> str:
    """One row of the table."""
    ours, floor = plan.costs[:2]
    rival = RIVALS.get(plan.objective, "Diffusion-DPO")
    released = plan.costs[2:]  # of flow-matching models one, whatever the objective
    recipe = next((cost for cost in released if cost.name.startswith(rival)), released[0])
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


def memory_table() -> str:
    """The memory of one process by how weights, gradients and states are shared, and its parts."""
    lines = [
        f"| `train.deepspeed` | GPUs | {' | '.join(PARTS)} | rest | all | in host memory |",
        "|---" * (len(PARTS) + 5) + "|",
    ]
    config = load_config(CONFIGS / f"{SHARED}.yaml")
    architecture = resolve_architecture(config)
    shapes = make_shapes(config, architecture)
    measured = measure(architecture, config, shapes)  # the same, however it is shared
    recipe = own_recipe(config.train, latent_elements(architecture, shapes), whole=True)
    for mode in MODES:
        train = config.train.model_copy(update={"deepspeed": mode})
        for processes in PROCESSES if mode else (1,):
            memory = step_memory(recipe, measured, read_sharding(train, processes))
            shown = [memory.parts[part] for part in PARTS]
            numbers = [*shown, memory.total - sum(shown), memory.total, memory.host]
            gpus = f"{processes}" if mode else "any"
            cells = [f"`{mode}`" if mode else "none", gpus, *(f"{n / 1e9:.1f}" for n in numbers)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plans every row; rewrites the headers' lines and the text between the pages' marks."""
    pages = LARGE_RUNS.read_text()
    write_text(LARGE_RUNS, with_section(pages, "memory", memory_table()))
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
        "estimated. The recipe is the\nreleased trainer's of the same objective (of "
        "flow-matching models Flow-Factory's offline DPO), on the same model, method\nand batch; "
        "its time is relative to ours."
    )
    write_text(README, with_section(README.read_text(), "plans", text))


if __name__ == "__main__":
    main()
