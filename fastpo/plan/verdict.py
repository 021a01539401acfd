"""The plan in sentences: whether it fits, how fast it is, what dominates, what is assumed."""

from __future__ import annotations

from fastpo.config import Config
from fastpo.plan.backward import tell_backward
from fastpo.plan.dataset import DataSize
from fastpo.plan.schema import Assumptions, Backward, CacheSize, Cost, Largest, Preparing

PARTS = {
    "policy_forward": "the policy's forward pass",
    "policy_backward": "the policy's backward pass",
    "policy_recompute": "the policy's recomputation",
    "reference": "the reference's forward pass",
    "annotators": "the annotators' forward passes",
    "vae": "the VAE",
    "text": "the text encoders",
}


def make_verdict(
    costs: tuple[Cost, ...],
    backward: Backward | None,
    assumed: Assumptions,
    preparing: Preparing,
    most: Largest,
) -> tuple[str, ...]:
    """Fit, the largest that fits, rate, ratios, when preparing pays, and the part that dominates.

    Args:
        costs: This configuration, plain fine-tuning, the released recipes.
        backward: What leaving out backward passes saves, where that is asked for.
        assumed: The GPU and its memory.
        preparing: What comes before training.
        most: What fits at most.
    """
    own, bare, *released = costs
    share, part = max((value / own.tflop, name) for name, value in own.flops.model_dump().items())
    held = own.memory.parts
    largest = max(held, key=held.__getitem__)
    room = assumed.memory_gb - own.peak_bytes / 1e9
    fit = f"fits in {assumed.memory_gb:g} GB" if own.fits else "does NOT fit"
    spare = f"{room:.1f} GB to spare" if own.fits else f"{-room:.1f} GB too much"
    advice = "" if own.fits else f"; {_advice(assumed)}"
    return (
        f"{fit} of {assumed.gpu}: {own.peak_bytes / 1e9:.1f} GB at the peak, {spare}{advice}",
        _most(assumed, most),
        f"{own.pairs_per_second:.3g} pairs/s on {assumed.world_size} GPU(s) at "
        f"{assumed.utilization:.0%} of the peak"
        + ("" if own.hours is None else f", {own.hours:.3g} h for {assumed.visits:,} visits"),
        *(() if backward is None else (tell_backward(backward, own),)),
        f"{own.seconds_per_pair / bare.seconds_per_pair:.2f}x the bare policy's forward and "
        f"backward; the released recipes: "
        + ", ".join(f"{c.name.split(',')[0]} {c.slower:.2f}x ours" for c in released),
        _break_even(own, released, preparing),
        f"most of the time goes to {PARTS[part]} ({share:.0%}), "
        f"most of the memory to {largest} ({held[largest] / own.peak_bytes:.0%})",
    )


def _most(assumed: Assumptions, largest: Largest) -> str:
    """The largest batch and resolution, by the memory model alone."""
    size, side = assumed.resolution, largest.resolution
    pairs = (
        f"{largest.pairs} pair(s) a pass at {size} x {size}"
        if largest.pairs
        else (f"no batch at {size} x {size}")
    )
    pixels = f"{side} x {side}" if side else "no resolution"
    return (
        f"at most fit, by this estimate: {pairs}; {pixels} with {assumed.micro_batch_size} pair(s) "
        "a pass"
    )


def _break_even(own: Cost, released: list[Cost], preparing: Preparing) -> str:
    """From how many epochs on a run with its preparing is the faster one.

    `n` visits of a pair cost us `pair + n (own + visit)`, a recipe that encodes at each `n recipe`.
    """
    told = []
    for recipe in released:
        saved = recipe.seconds_per_pair - own.seconds_per_pair - preparing.visit
        when = f"{preparing.pair / saved:.1f} epochs" if saved > 0 else "never in one run"
        told.append(f"{recipe.name.split(',')[0]} {when}")
    text = "with its preparing, one run is the faster one from so many epochs on: "
    text += ", ".join(told)
    if preparing.visit:
        text += "; each further run with this reference cache saves the reference's passes too"
    return text


def _advice(assumed: Assumptions) -> str:
    ways = []
    if not assumed.checkpointing:
        ways.append("train.gradient_checkpointing: true")
    elif assumed.checkpointing is True:
        ways.append("train.gradient_checkpointing: offload")
    if assumed.micro_batch_size > 1:
        ways.append("a smaller train.micro_batch_size")
    if assumed.trainable == assumed.parameters:
        ways.append("train.optim.name: adamw_8bit or adafactor")
        ways.append("ZeRO on more processes, or train.method: lora")
    return "try " + ", ".join(ways) if ways else "a GPU with more memory is needed"


def make_notes(
    config: Config, assumed: Assumptions, cache: CacheSize, size: DataSize
) -> tuple[str, ...]:
    """What is estimated, assumed or left out."""
    notes = [
        "FLOPs: torch's counter on the real modules; a fused attention's second pass over the "
        "scores is not in them (2 % at SDXL's 1024 x 1024).",
        "Activations: an estimate, the largest sum of live tensors in the order of the run, with "
        "fused attention and autocast's casts; kernels' workspaces and fragmentation are not in "
        "it. GB are 1e9 bytes; 1 GB is assumed for the CUDA context and libraries.",
        "Hours: FLOPs at the stated share of the data sheet's dense peak; float32 convolutions "
        "(the recipes' VAE) at its TF32 peak. Optimizer, loss, data and collectives are not in "
        "them.",
        "Released recipes: on this model, method, batch and sharding, as their code is described; "
        "swaps through host memory and graphs built for nothing are not held against them.",
    ]
    if config.train.gradient_checkpointing:
        notes.append(
            "Checkpointing repeats less than the whole forward pass: torch stops a block's "
            "recomputation at the last tensor that its backward needs."
        )
    if config.train.gradient_checkpointing == "offload":
        notes.append(
            "Offloaded checkpoints are copied to host memory and back once in a pass; the copies "
            "are not in the hours."
        )
    if config.train.weights == "bf16" and config.train.accumulation_steps > 1:
        notes.append(
            f"bf16 weights: their gradients are summed over {config.train.accumulation_steps} "
            "micro-batches in bf16, with an rms error of 1.3 % after 128 and 2.7 % after 512."
        )
    if config.train.backward != "all":
        notes.append(_sparse(bool(config.train.gradient_checkpointing)))
    if config.train.reads_reference_errors and cache.prepare_hours is not None:
        notes.append(
            "The reference cache costs one forward pass for each visit, once; it is in the hours "
            "of preparing, and saves time where it serves more than one run."
        )
    if cache.text_at_most:
        notes.append(
            "Text on disk: at most. Each prompt is counted as long as it can be, and stored as "
            "long as it is, without its padding."
        )
    if assumed.pairs is None:
        notes.append("The number of pairs is not known: --pairs gives cache size and hours.")
    else:
        notes.append(f"Pairs: {assumed.pairs:,}, from {size.source}.")
    return tuple(notes)


def _sparse(checkpointing: bool) -> str:
    """What the table's first column holds, and what `train.backward` may save beside it."""
    dense = 4 if checkpointing else 3
    return (
        "train.backward: the table's columns are counted as if every pair had a backward pass "
        f"({dense} passes through the policy, with its forward pass as one). Where a share s below "
        f"{(dense - 1) / dense:.2f} of the pairs is live, they take 1 + {dense} s, and more on "
        "several processes, which wait for the one with the most; behind a gate that the ledger "
        "has closed a pair takes 1 in any case. A run counts a backward pass as two; TFLOP and "
        "hours are those of the modules."
    )
