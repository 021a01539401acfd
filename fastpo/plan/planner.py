"""Puts a plan together: measures each part once, and adds the parts up for every recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastpo.config import Config, Precision, TrainConfig
from fastpo.errors import ConfigError
from fastpo.models.geometry import make_geometry
from fastpo.plan.architecture import Architecture, resolve_architecture
from fastpo.plan.backward import check_share, plan_backward
from fastpo.plan.dataset import DataSize, cache_size, count_visits, find_size
from fastpo.plan.fit import find_largest
from fastpo.plan.gpus import Gpu, find_gpu
from fastpo.plan.measure import (
    Call,
    Pass,
    Shapes,
    build_parts,
    measure_forward,
    measure_texts,
    measure_training,
    measure_vae,
    module_bytes,
    unet_call,
)
from fastpo.plan.memory import Measured, quantized, step_memory
from fastpo.plan.recipes import (
    BARE,
    RELEASED,
    RELEASED_FLOW,
    Recipe,
    describe_own,
    own_recipe,
)
from fastpo.plan.schema import Assumptions, Cost, Flops, Plan, Preparing
from fastpo.plan.transformers import SOURCE_SIDE, text_length, text_tokens, transformer_call
from fastpo.plan.verdict import make_notes, make_verdict
from fastpo.precision import autocast_dtype
from fastpo.train.sharding import Sharding, count_trained, read_sharding

if TYPE_CHECKING:
    from fastpo.models.family import Denoiser

TERA = 1e12
LARGE = 64
"""Times a batch of which the second one is."""


@dataclass(frozen=True)
class Hardware:
    """The hardware that a run is planned for.

    Attributes:
        gpu: The GPU's data sheet.
        utilization: Share of the peak that is reached, in (0, 1].
        processes: Number of processes, one GPU each.
    """

    gpu: Gpu
    utilization: float
    processes: int

    def seconds(self, tflop: float, precision: Precision, *, convolutions: bool = False) -> float:
        """Seconds for some TFLOP in a precision."""
        return tflop / (self.gpu.rate(precision, convolutions=convolutions) * self.utilization)


def make_plan(
    config: Config,
    *,
    gpu: str = "h100",
    utilization: float = 0.4,
    world_size: int = 1,
    pairs: int | None = None,
    live_share: float | None = None,
    status: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plans a run: FLOPs, memory, disk and hours, beside the released recipes'.

    Args:
        config: The experiment; nothing of it need exist but, for a local model, its folder.
        gpu: A short name of `fastpo.plan.gpus`.
        utilization: Share of the GPU's dense peak that is reached.
        world_size: Processes, one GPU each.
        pairs: Pairs in the data; None takes them from the cache, the folder or the publication.
        live_share: With `train.backward: alive` or `sampled` the share of pairs that need a
            backward pass, in (0, 1]; None takes it from a run in `train.output_dir`, if any.
        status: Called with what is being counted.

    Raises:
        ConfigError: An unknown GPU, a number out of range, a resolution that the model cannot
            have, DeepSpeed settings that cannot be read, or a share that nothing asks for.
        DataError: Data on this disk, or the metrics of a run there, cannot be read.
        ModelError: The model is neither here nor packaged.
    """
    _check(utilization, world_size, pairs)
    check_share(live_share, config.train)
    hardware = Hardware(find_gpu(gpu), utilization, world_size)
    sharding = read_sharding(config.train, world_size)
    architecture = resolve_architecture(config)
    size = find_size(config, pairs)
    shapes = make_shapes(config, architecture, sources=size.sources)
    measured = measure(architecture, config, shapes, status)
    visits = count_visits(config, size, world_size)
    elements = latent_elements(architecture, shapes)
    own = own_recipe(config.train, elements, whole=sharding.stage < 3)
    others = RELEASED if architecture.flow is None else RELEASED_FLOW
    costs = [_cost(r, measured, config, hardware, sharding, visits) for r in (own, BARE, *others)]
    base = costs[0].seconds_per_pair
    costs = [c.model_copy(update={"slower": c.seconds_per_pair / base}) for c in costs]
    costs[0] = costs[0].model_copy(update={"what": describe_own(config.train, own)})
    backward = plan_backward(config, costs[0], live_share, world_size)
    assumptions = _assumptions(config, hardware, sharding, measured, size, visits)
    preparing = _preparing(config, measured, hardware, shapes)
    drawn = count_visits(config, size, world_size, distinct=True)
    hours = _prepare_hours(preparing, hardware, size, drawn)
    if visits and drawn:  # the reference's passes serve each visit that draws the same
        each = preparing.visit * drawn / visits
        preparing = preparing.model_copy(update={"visit": each})
    largest = find_largest(
        measured,
        own,
        sharding,
        room=hardware.gpu.memory_gb * 1e9,
        shapes=shapes,
        step=shapes.vae_factor * architecture.denoiser_factor,
    )
    cache = cache_size(config, architecture, shapes, size=size, visits=drawn, hours=hours)
    return Plan(
        family=architecture.family,
        architecture=architecture.source,
        method=config.train.method,
        objective=config.train.objective.name,
        assumptions=assumptions,
        costs=tuple(costs),
        backward=backward,
        cache=cache,
        largest=largest,
        verdict=make_verdict(tuple(costs), backward, assumptions, preparing, largest),
        notes=make_notes(config, assumptions, cache, size),
    )


def _check(utilization: float, world_size: int, pairs: int | None) -> None:
    if not 0.0 < utilization <= 1.0:
        raise ConfigError(f"--utilization must be in (0, 1], got {utilization:g}")
    if world_size < 1:
        raise ConfigError(f"--world-size must be at least 1, got {world_size}")
    if pairs is not None and pairs < 1:
        raise ConfigError(f"--pairs must be at least 1, got {pairs}")


def make_shapes(config: Config, architecture: Architecture, *, sources: int = 0) -> Shapes:
    """The square bucket's sizes; the other buckets have about as many pixels.

    Args:
        config: The experiment.
        architecture: The model's.
        sources: How many source images the pairs are known to begin from; some models need none.
    """
    factor = architecture.vae_factor
    make_geometry(
        config.prepare.resolution,
        use_buckets=config.prepare.buckets,
        vae_factor=factor,
        denoiser_factor=architecture.denoiser_factor,
    )
    side = config.prepare.resolution // factor
    if architecture.flow is not None:
        flow, source = architecture.flow, None
        most = max(sources, 1)
        if flow.edits == "must" or (sources and flow.takes_sources):
            source = (SOURCE_SIDE // factor, SOURCE_SIDE // factor)
        tokens = text_length(flow, config, most)
        pairs = config.train.micro_batch_size
        return Shapes(pairs, side, side, factor, tokens, source=source, sources=most)
    chunks = config.prepare.prompt_chunks
    tokens = chunks * architecture.texts[0].get("max_position_embeddings", 77)
    return Shapes(config.train.micro_batch_size, side, side, factor, tokens, chunks)


def denoiser_call(architecture: Architecture, policy: Denoiser, shapes: Shapes) -> Call:
    """A micro-batch of the architecture on the meta device, and a denoiser's pass on it."""
    if architecture.flow is None:
        return unet_call(policy, shapes)
    text = architecture.text(shapes.tokens)
    return transformer_call(architecture.flow, text, shapes, architecture.latent_channels)


def measure(
    architecture: Architecture,
    config: Config,
    shapes: Shapes,
    status: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Runs every part once on the meta device."""
    train = config.train
    status("building the modules without weights")
    copied = train.method == "full"  # the recipes hold a frozen copy even where we hold none
    parts = build_parts(architecture, train, reference=copied)
    policy = parts.denoisers.policy
    status("counting the encoders")
    vae = measure_vae(parts.vae, shapes, "fp32")
    read = None
    if architecture.flow is not None:
        read = [text_tokens(text, shapes.tokens) for text in architecture.texts]
    text = measure_texts(parts.texts, shapes, read)
    call = denoiser_call(architecture, policy, shapes)
    status("counting the reference's forward pass")
    with parts.denoisers.reference() as model:
        reference = measure_forward(model, shapes, train.precision, call)
    status("counting the policy's forward and backward")
    forward, training, recompute = measure_training(
        policy, shapes, train.precision, checkpointing=train.gradient_checkpointing, call=call
    )
    latent = latent_elements(architecture, shapes)
    trained = count_trained(policy.parameters(), train)
    dense = 0
    if train.quantize_base is not None:
        trained, dense = quantized(policy, trained, train.quantize_base)
    return Measured(
        forward=forward,
        training=training,
        recompute=recompute,
        reference=reference,
        vae=vae,
        text=text,
        trained=trained,
        reference_bytes=module_bytes(parts.denoisers.frozen) if parts.denoisers.frozen else 0,
        average_bytes=4 * trained.count,
        whole_average_bytes=2 * trained.parameters,
        vae_bytes=module_bytes(parts.vae, "fp32"),
        text_bytes=sum(module_bytes(text, train.precision) for text in parts.texts),
        batch_bytes=_batch_bytes(config, architecture, shapes, latent),
        prediction_bytes=latent * _answer_size(train),
        constant=_constant(architecture, policy, shapes, train, training),
        dense=dense,
    )


def _constant(
    architecture: Architecture,
    policy: Denoiser,
    shapes: Shapes,
    train: TrainConfig,
    training: Pass,
) -> int:
    """Bytes of a step's peak that do not grow with the batch: autocast's copies of the weights.

    From a second batch, which is large: the peak is the largest of several sums, and a chord of
    such a function lies above it. Of adapters they are too small to run it for.
    """
    if train.method == "lora":
        return 0
    large = replace(shapes, pairs=LARGE * shapes.pairs)
    checkpointing = train.gradient_checkpointing
    call = denoiser_call(architecture, policy, large)
    _, more, _ = measure_training(
        policy, large, train.precision, checkpointing=checkpointing, call=call
    )
    return max(0, (LARGE * training.peak - more.peak) // (LARGE - 1))


def latent_elements(architecture: Architecture, shapes: Shapes) -> int:
    """Elements of the noisy latents `(2B, C, h, w)`."""
    channels = architecture.latent_channels
    return 2 * shapes.pairs * channels * shapes.height * shapes.width


def _answer_size(train: TrainConfig) -> int:
    dtype = autocast_dtype(train.precision)
    return 4 if dtype is None else dtype.itemsize


def _batch_bytes(config: Config, architecture: Architecture, shapes: Shapes, latent: int) -> int:
    """Mean and log-variance and embeddings as stored; noisy latents and target in float32."""
    stored = {"fp32": 4}.get(config.prepare.store_precision, 2)
    width = architecture.text(shapes.tokens).sizes["prompt_embeds"]
    text = (
        shapes.pairs * math.prod(width) * (stored + 2 * 4)
    )  # as stored, and for both sides in float32
    return 2 * latent * stored + 2 * latent * 4 + text


def _flops(recipe: Recipe, m: Measured, pairs: int) -> Flops:
    each = TERA * pairs
    return Flops(
        policy_forward=m.forward.flops / each,
        policy_backward=(m.training.flops - m.forward.flops - m.recompute) / each,
        policy_recompute=m.recompute / each,
        reference=recipe.reference * m.reference.flops / each,
        annotators=recipe.averages * m.forward.flops / each,
        vae=recipe.encodes * m.vae.flops / each,
        text=recipe.encodes_text * m.text.flops / each,
    )


def _cost(
    recipe: Recipe,
    m: Measured,
    config: Config,
    hardware: Hardware,
    sharding: Sharding,
    visits: int | None,
) -> Cost:
    flops = _flops(recipe, m, config.train.micro_batch_size)
    memory = step_memory(recipe, m, sharding)
    half: Precision = "bf16"
    unet = flops.policy + flops.reference + flops.annotators
    seconds = (
        hardware.seconds(unet, config.train.precision)
        + hardware.seconds(flops.vae, recipe.vae_precision, convolutions=True)
        + hardware.seconds(flops.text, half)
    )
    rate = hardware.processes / seconds
    return Cost(
        name=recipe.name,
        what=recipe.what,
        flops=flops,
        tflop=flops.total,
        memory=memory,
        peak_bytes=memory.total,
        fits=memory.total <= hardware.gpu.memory_gb * 1e9,
        seconds_per_pair=seconds,
        pairs_per_second=rate,
        hours=None if visits is None else visits / rate / 3600,
        slower=1.0,
    )


def _preparing(config: Config, m: Measured, hardware: Hardware, shapes: Shapes) -> Preparing:
    """What preparing costs a process: encoding a pair, and the reference's pass of a visit."""
    each, prepare = TERA * config.train.micro_batch_size, config.prepare
    images = hardware.seconds(m.vae.flops / each, prepare.vae_precision, convolutions=True)
    source = 0.0
    if shapes.source is not None:  # of another size than the pair's two images
        source = images / 2 * math.prod(shapes.source) / (shapes.height * shapes.width)
    pair = images
    pair += hardware.seconds(m.text.flops / each, prepare.text_precision)
    if not config.train.reads_reference_errors:
        return Preparing(pair=pair, visit=0.0, source=source)
    visit = hardware.seconds(m.reference.flops / each, config.train.precision)
    return Preparing(pair=pair, visit=visit, source=source)


def _prepare_hours(
    seconds: Preparing, hardware: Hardware, size: DataSize, visits: int | None
) -> float | None:
    """Hours of preparing on all processes; each pair's last visit is prepared for all pairs."""
    pairs = size.pairs
    if pairs is None:
        return None
    sources = seconds.source * (pairs if size.images is None else size.images)
    passes = 0 if visits is None else math.ceil(visits / pairs)
    every = pairs * (seconds.pair + passes * seconds.visit) + sources
    return every / hardware.processes / 3600


def _assumptions(
    config: Config,
    hardware: Hardware,
    sharding: Sharding,
    m: Measured,
    size: DataSize,
    visits: int | None,
) -> Assumptions:
    train = config.train
    return Assumptions(
        gpu=hardware.gpu.name,
        bf16_tflops=hardware.gpu.bf16,
        memory_gb=hardware.gpu.memory_gb,
        utilization=hardware.utilization,
        world_size=hardware.processes,
        sharding=str(sharding),
        micro_batch_size=train.micro_batch_size,
        accumulation_steps=train.accumulation_steps,
        pairs=size.pairs,
        prompts=size.prompts,
        visits=visits,
        resolution=config.prepare.resolution,
        precision=train.precision,
        checkpointing=train.gradient_checkpointing,
        trainable=m.trained.count,
        parameters=m.trained.parameters,
    )
