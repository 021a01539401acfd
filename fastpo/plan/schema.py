"""What a plan says, in numbers: the content of `--json` and of the table alike."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Flops(_Record):
    """TFLOP per pair, by part; a multiply-add is two operations.

    Attributes:
        policy_forward: The policy on both sides.
        policy_backward: Its backward pass, without what checkpointing repeats.
        policy_recompute: What gradient checkpointing repeats.
        reference: The reference's forward pass.
        annotators: The moving averages' forward passes.
        vae: Encoding both images.
        text: Encoding the prompt.
    """

    policy_forward: float
    policy_backward: float
    policy_recompute: float
    reference: float = 0.0
    annotators: float = 0.0
    vae: float = 0.0
    text: float = 0.0

    @property
    def policy(self) -> float:
        """The policy's whole share."""
        return self.policy_forward + self.policy_backward + self.policy_recompute

    @property
    def total(self) -> float:
        """All parts."""
        return self.policy + self.reference + self.annotators + self.vae + self.text


class Memory(_Record):
    """Bytes on the device of one process, at the step's peak.

    Attributes:
        weights: The policy, its frozen base included.
        gradients: Gradients of the trainable weights.
        optimizer: The optimizer's states, and the float32 copy DeepSpeed's engine steps on.
        reference: A frozen copy of the policy.
        annotators: The moving averages that vote.
        averages: The moving average that is exported.
        encoders: VAE and text encoders.
        batch: Latents, embeddings, noise, predictions.
        communication: Buckets of the gradients, and weights gathered by ZeRO-3.
        activations: The largest of the step's phases, an estimate.
        phase: That phase.
        allowance: CUDA context and libraries, assumed.
        host: In host memory instead, by offloading; not in the total.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int = 0
    annotators: int = 0
    averages: int = 0
    encoders: int = 0
    batch: int
    communication: int = 0
    activations: int
    phase: str
    allowance: int
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The parts that add up to the total."""
        return {k: v for k, v in self.model_dump().items() if k not in ("phase", "host")}

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return sum(self.parts.values())


class Cost(_Record):
    """One way to train the same model on the same batch.

    Attributes:
        name: This configuration, plain fine-tuning, or a released recipe.
        what: What it runs beside the policy.
        flops: TFLOP per pair.
        tflop: Their sum.
        memory: Bytes per process.
        peak_bytes: Their sum.
        fits: Whether that is within the GPU's memory.
        seconds_per_pair: Of one process.
        pairs_per_second: Pairs that all processes together train on in a second.
        hours: Hours of the whole run; None where its number of visits is not known.
        slower: Seconds per pair over this configuration's.
    """

    name: str
    what: str
    flops: Flops
    tflop: float
    memory: Memory
    peak_bytes: int
    fits: bool
    seconds_per_pair: float
    pairs_per_second: float
    hours: float | None
    slower: float


class Preparing(_Record):
    """What is computed before training, in seconds of one process.

    Attributes:
        pair: Encoding both images and the prompt, once.
        visit: The cached reference's pass for each visit; 0 where it is not cached.
        source: Encoding an image that edits begin from, once.
    """

    pair: float
    visit: float
    source: float = 0.0


class CacheSize(_Record):
    """The prepared cache on disk; None where the number of pairs is not known.

    Attributes:
        latent_bytes_per_pair: Mean and log-variance of both images.
        text_bytes_per_prompt: States and pooled state; see `text_at_most`.
        reference_bytes_per_pair: Two floats for each visit, where the reference is cached.
        latents: All pairs' bytes.
        text: All distinct prompts' bytes; see `text_at_most`.
        text_at_most: Whether prompts are stored as long as they are, and their bytes here are those
            of the longest that are encoded whole; `total` then is an upper bound too.
        reference: All pairs' bytes.
        source_bytes_per_image: Latents of an image that edits begin from; 0 where there are none.
        sources: All distinct source images' bytes, one for each pair where they are not counted.
        total: The sum.
        prepare_hours: Of encoding and, where cached, of the reference's errors, on all processes.
    """

    latent_bytes_per_pair: int
    text_bytes_per_prompt: int
    reference_bytes_per_pair: int
    latents: int | None
    text: int | None
    text_at_most: bool = False
    reference: int | None
    source_bytes_per_image: int = 0
    sources: int | None = None
    total: int | None
    prepare_hours: float | None


class Assumptions(_Record):
    """What the numbers rest on.

    Attributes:
        gpu: Full name.
        bf16_tflops: Its dense peak.
        memory_gb: Its memory, in 1e9 bytes.
        utilization: Share of the peak that is reached.
        world_size: Processes.
        sharding: How memory is shared among them.
        micro_batch_size: Pairs per process and pass.
        accumulation_steps: Passes per step.
        pairs: Pairs in the data, if known.
        prompts: Distinct prompts, if known.
        visits: Pairs drawn in the run, if known.
        resolution: In pixels.
        precision: The denoiser's passes run in it.
        checkpointing: Whether activations are computed again; `offload`: with the checkpoints in
            host memory.
        trainable: Weights in training.
        parameters: Weights of the policy, adapters included.
    """

    gpu: str
    bf16_tflops: float
    memory_gb: float
    utilization: float
    world_size: int
    sharding: str
    micro_batch_size: int
    accumulation_steps: int
    pairs: int | None
    prompts: int | None
    visits: int | None
    resolution: int
    precision: str
    checkpointing: bool | Literal["offload"]
    trainable: int
    parameters: int


class LiveCost(_Record):
    """What a pair costs on average where some have no backward pass, by `train.backward`.

    Attributes:
        live: The share of pairs that need a backward pass, if the plan was made for one.
        share: The share of pairs that get one.
        passes: Passes through the policy a pair, as in `backward/cost` of a run's metrics: as long
            as processes wait for the one with the most.
        tflop: TFLOP a pair, all parts, of these passes.
        seconds_per_pair: Of one process.
        pairs_per_second: Of all processes.
        hours: Hours of the whole run; None where its number of visits is not known.
    """

    live: float | None
    share: float
    passes: float
    tflop: float
    seconds_per_pair: float
    pairs_per_second: float
    hours: float | None


class Backward(_Record):
    """A run with `train.backward: alive` or `sampled`, beside the cost of every backward pass.

    Attributes:
        mode: `alive` or `sampled`.
        source: Where the share comes from: a run's metrics, or an option; None: it is not known.
        steps: How many steps of a run it is the mean of, if of one.
        costs: One, of that share; where it is not known one for each quarter of live pairs.
    """

    mode: Literal["alive", "sampled"]
    source: str | None
    steps: int | None
    costs: tuple[LiveCost, ...]


class Largest(_Record):
    """The largest sizes that fit on the card, everything else as configured; 0: none does.

    Attributes:
        pairs: Pairs a process and pass, at the configured resolution.
        resolution: Pixels of a side, with the configured pairs a pass.
    """

    pairs: int
    resolution: int


class Plan(_Record):
    """A run, planned.

    Attributes:
        schema_version: Raised when a field changes its meaning.
        family: The name of the model's family, as in `fastpo.models.registry`.
        architecture: Where the modules' configurations came from.
        method: `lora` or `full`.
        objective: Its name.
        assumptions: What the numbers rest on.
        costs: This configuration first, then plain fine-tuning, then the released recipes; all with
            a backward pass for every pair.
        backward: This configuration's cost where some pairs have none; None: `train.backward: all`.
        cache: On disk.
        largest: What fits at most.
        verdict: The answer in sentences.
        notes: What is estimated, assumed or left out.
    """

    schema_version: Literal[1] = 1
    family: str
    architecture: str
    method: Literal["lora", "full"]
    objective: str
    assumptions: Assumptions
    costs: tuple[Cost, ...]
    backward: Backward | None = None
    cache: CacheSize
    largest: Largest
    verdict: tuple[str, ...]
    notes: tuple[str, ...]
