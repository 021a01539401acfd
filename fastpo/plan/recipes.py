"""What a training step runs: this configuration's, and the released trainers' as described.

The released trainers encode images (in float32) and prompts in every step and hold the encoders for
it. All but MaPO's run a reference. Adaptive-DPO's also runs two moving averages of the whole UNet,
which it keeps in half precision and swaps in through host memory; the swaps are not counted here,
nor is that its averages' passes build a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpo.config import EmaAnnotators, LedgerAnnotators, Precision, TrainConfig
from fastpo.train.lora_batched import in_one_pass

RELEASED_AVERAGES = 2
"""Moving averages of the released Adaptive-DPO."""


@dataclass(frozen=True)
class Recipe:
    """What is run for a pair beside the policy's forward and backward.

    Attributes:
        name: How the table calls it.
        reference: Whether the reference's forward pass runs.
        averages: Moving averages that vote, one forward pass each.
        whole_averages: Whether they average all weights, in half precision, not only the
            trainable ones, in float32.
        encodes: Whether images are encoded in the step.
        encodes_text: Whether prompts are, too.
        vae_precision: The VAE runs in it, if it runs.
        exports_average: Whether a further average of the trainable weights is kept.
        together: Whether reference and averages run as one forward pass, on as many rows more.
    """

    name: str
    reference: bool = False
    averages: int = 0
    whole_averages: bool = False
    encodes: bool = False
    encodes_text: bool = False
    vae_precision: Precision = "fp32"
    exports_average: bool = False
    together: bool = False

    @property
    def annotators_at_once(self) -> int:
        """Annotators in the largest forward pass without gradients."""
        annotators = self.reference + self.averages
        return annotators if self.together else min(annotators, 1)

    @property
    def what(self) -> str:
        """What it runs, in words."""
        parts = ["policy"]
        if self.reference:
            parts.append("reference")
        if self.averages:
            parts.append(f"{self.averages} moving averages")
        if self.encodes:
            text = " and text" if self.encodes_text else ""
            parts.append(f"VAE ({self.vae_precision}){text}")
        return ", ".join(parts)


BARE = Recipe("plain fine-tuning")
RELEASED = (
    Recipe("Diffusion-DPO, released", reference=True, encodes=True, encodes_text=True),
    Recipe("MaPO, released", encodes=True, encodes_text=True),
    Recipe(
        "Adaptive-DPO, released",
        reference=True,
        averages=RELEASED_AVERAGES,
        whole_averages=True,
        encodes=True,
        encodes_text=True,
    ),
)
RELEASED_FLOW = (
    Recipe("Flow-Factory, offline DPO", reference=True, encodes=True, vae_precision="bf16"),
)
"""Of flow-matching models. It caches what prompts give, and encodes both images in every step; the
reference is the policy without its adapters, or a copy, on winners and losers."""


def own_recipe(train: TrainConfig, n_elements: int, *, whole: bool = True) -> Recipe:
    """The step that a configuration asks for.

    Args:
        train: Its training section.
        n_elements: Elements of the noisy latents.
        whole: Whether every process holds whole weights, as it does below ZeRO's stage 3.
    """
    annotators = train.annotators
    averages = len(annotators.decays) if isinstance(annotators, EmaAnnotators) else 0
    return Recipe(
        "this configuration",
        reference=train.runs_reference,
        averages=averages,
        exports_average=train.ema_decay is not None,
        together=whole and in_one_pass(train, n_elements),
    )


def describe_own(train: TrainConfig, recipe: Recipe) -> str:
    """What this configuration runs, with what it reads instead."""
    cached = ["cached latents"]
    if train.reads_reference_errors:
        cached.append("cached reference")
    if isinstance(train.annotators, LedgerAnnotators):
        cached.append("ledger")
    return f"{recipe.what}; {', '.join(cached)}"
