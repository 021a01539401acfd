"""The plan as a person reads it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpo.plan.schema import Cost, Plan

FLOPS = {
    "policy_forward": "policy, forward",
    "policy_backward": "policy, backward",
    "policy_recompute": "policy, recomputed",
    "reference": "reference",
    "annotators": "annotators",
    "vae": "VAE",
    "text": "text encoders",
}
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "reference": "frozen reference",
    "annotators": "annotators",
    "averages": "exported average",
    "encoders": "VAE and text encoders",
    "batch": "batch, answers, loss",
    "communication": "communication buffers",
    "activations": "activations (estimate)",
    "allowance": "CUDA context (assumed)",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the header, the tables, the verdict and the notes."""
    a = plan.assumptions
    console.print(
        f"[bold]{plan.family.upper()}, {plan.method}, {plan.objective}[/] at {a.resolution} x "
        f"{a.resolution}, {a.precision}, {a.micro_batch_size} pair(s) a process and pass, "
        f"{a.accumulation_steps} pass(es) a step"
        + (", gradient checkpointing" if a.checkpointing else "")
        + (" in host memory" if a.checkpointing == "offload" else "")
    )
    console.print(f"[dim]{escape(plan.architecture)}[/]", highlight=False)
    console.print(
        f"[dim]{a.trainable / 1e6:,.1f} M of {a.parameters / 1e6:,.1f} M weights in training; "
        f"{a.world_size} x {a.gpu}, {a.bf16_tflops:g} TFLOP/s, at {a.utilization:.0%}; "
        f"{a.sharding}[/]",
        highlight=False,
    )
    console.print(_costs_table(plan))
    console.print(_cache_table(plan))
    for i, line in enumerate(plan.verdict):
        color = "" if i else ("bold green" if plan.costs[0].fits else "bold red")
        console.print(f"[{color}]{escape(line)}[/]" if color else escape(line), highlight=False)
    for line in plan.notes:
        console.print(f"[dim]- {escape(line)}[/]", highlight=False)


def _costs_table(plan: Plan) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption="the last three: released recipes",
        caption_justify="right",
    )
    table.add_column("", no_wrap=True)
    for cost in plan.costs:
        table.add_column(_head(cost), justify="right", no_wrap=True)
    table.add_row("[bold]TFLOP per pair[/]")
    flops = [cost.flops.model_dump() for cost in plan.costs]
    for key, label in FLOPS.items():
        values = [each[key] for each in flops]
        if any(values):
            table.add_row(f"  {label}", *(tflop(v) for v in values))
    table.add_row("  all", *(f"[bold]{tflop(c.tflop)}[/]" for c in plan.costs), end_section=True)
    table.add_row("[bold]GB per process[/]")
    for key, label in MEMORY.items():
        values = [cost.memory.parts[key] for cost in plan.costs]
        if any(values):
            table.add_row(f"  {label}", *(gigabytes(v) for v in values))
    table.add_row("  peak", *(_peak(cost) for cost in plan.costs))
    hosts = [cost.memory.host for cost in plan.costs]
    if any(hosts):
        table.add_row("  in host memory", *(gigabytes(v) for v in hosts))
    table.add_section()
    table.add_row("[bold]pairs/s[/]", *(f"{c.pairs_per_second:.3g}" for c in plan.costs))
    table.add_row("[bold]hours[/]", *(hours(c.hours) for c in plan.costs))
    table.add_row("[bold]time, ours = 1[/]", *(f"{c.slower:.2f}x" for c in plan.costs))
    if plan.backward is not None and plan.backward.source is not None:
        (cost,) = plan.backward.costs
        table.add_section()
        table.add_row(f"[bold]{cost.share:.0%} of backward passes[/]")
        table.add_row("  TFLOP per pair", tflop(cost.tflop))
        table.add_row("  pairs/s", f"{cost.pairs_per_second:.3g}")
        table.add_row("  hours", hours(cost.hours))
    return table


def _head(cost: Cost) -> str:
    """A recipe's name in two short lines, so that all fit side by side into 80 columns."""
    own = {"this configuration": "this\nconfig", "plain fine-tuning": "plain\ntuning"}
    return own.get(cost.name, cost.name.removesuffix(", released").replace("-", "-\n"))


def _peak(cost: Cost) -> str:
    color = "green" if cost.fits else "red"
    return f"[bold {color}]{gigabytes(cost.peak_bytes)}[/]"


def _cache_table(plan: Plan) -> Table:
    cache = plan.cache
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("cache on disk", "each", "all"):
        table.add_column(name, justify="left" if name == "cache on disk" else "right")
    prompts, bound = plan.assumptions.prompts, " at most" if cache.text_at_most else ""
    rows = [
        ("latents (mean, log-variance), per pair", cache.latent_bytes_per_pair, cache.latents),
        (
            f"text{bound}, per distinct prompt" + (f" (at most {prompts:,})" if prompts else ""),
            cache.text_bytes_per_prompt,
            cache.text,
        ),
    ]
    if cache.reference_bytes_per_pair:
        rows.append(
            ("reference's errors, per pair", cache.reference_bytes_per_pair, cache.reference)
        )
    if cache.source_bytes_per_image:
        rows.append(
            ("source images, per distinct image", cache.source_bytes_per_image, cache.sources)
        )
    for label, each, total in rows:
        table.add_row(label, f"{each:,} B", "-" if total is None else f"{gigabytes(total)} GB")
    total = "-" if cache.total is None else f"[bold]{gigabytes(cache.total)} GB[/]"
    table.add_row(f"all{bound}; to prepare: {hours(cache.prepare_hours)} h, once", "", total)
    return table


def tflop(value: float) -> str:
    """TFLOP to two decimals; `-` for none."""
    return f"{value:.2f}" if value >= 0.005 else ("-" if value == 0 else f"{value:.2g}")


def gigabytes(value: int) -> str:
    """Bytes as GB (1e9); `-` for none."""
    return "-" if value == 0 else (f"{value / 1e9:.2f}" if value >= 5e6 else "<0.01")


def hours(value: float | None) -> str:
    """Hours to three digits or more; `-` where not known."""
    return "-" if value is None else (f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
