"""Plans: counts against torch's own on real tensors, against arithmetic, and against the models."""

import contextlib
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastpo.cli import main
from fastpo.config import load_config, parse_config
from fastpo.errors import ConfigError, ModelError
from fastpo.plan import Plan, make_plan
from fastpo.plan.architecture import resolve_architecture
from fastpo.plan.gpus import GPUS, find_gpu
from fastpo.plan.measure import (
    Shapes,
    build_parts,
    measure_forward,
    measure_texts,
    measure_training,
    measure_vae,
    unet_inputs,
)
from fastpo.plan.memory import ALLOWANCE, Sharding, Trained, count_trained, held, read_sharding
from fastpo.plan.modes import CudaForward, StorageTracker, flop_counter
from fastpo.plan.table import gigabytes, tflop

CONFIGS = sorted((Path(__file__).parents[2] / "fastpo" / "configs").glob("*.yaml"))
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CPU = torch.device("cpu")


def raw(path=SDXL, *, resolution=1024, data=None, **train):
    """A configuration; `train` overrides."""
    return {
        "model": {"path": str(path)},
        "data": data or {"source": "pickapic", "path": "yuvalkirstain/pickapic_v2"},
        "prepare": {"cache_dir": "no-cache", "resolution": resolution},
        "train": {
            "output_dir": "no-run",
            "method": "full",
            "objective": {"name": "dpo"},
            "max_steps": 10,
            **train,
        },
    }


def config(*args, **options):
    return parse_config(raw(*args, **options))


@pytest.fixture(scope="module")
def tiny(tiny_pipelines):
    """Plans the tiny SDXL: `tiny(world_size=8, **train_options)`."""

    made = {}

    def plan(*, gpu="h100", world_size=1, utilisation=0.4, **train):
        key = repr((gpu, world_size, utilisation, train))
        if key not in made:
            chosen = config(tiny_pipelines["sdxl"], resolution=32, **train)
            made[key] = make_plan(chosen, gpu=gpu, world_size=world_size, utilisation=utilisation)
        return made[key]

    return plan


def tiny_unet(folder, *, full=True, precision="fp32", pairs=3):
    """The tiny UNet on the CPU with weights, as training sets it up, and a batch's sizes."""
    from fastpo.models import load_unet, setup_denoisers

    method = "full" if full else "lora"
    train = config(folder, resolution=32, method=method, precision=precision).train
    unet = setup_denoisers(load_unet(folder), train, needs_reference=False).policy
    return unet, train, Shapes(pairs=pairs, height=8, width=8, vae_factor=4, tokens=77)


# The published models.


@pytest.fixture(scope="module")
def sdxl():
    train = config(precision="bf16").train
    return build_parts(resolve_architecture(config()), train, reference=False)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_packaged_architectures_have_the_published_number_of_weights(sdxl):
    assert count(sdxl.denoisers.policy) == 2_567_463_684
    assert count(sdxl.vae) == 83_653_863
    assert [count(text) for text in sdxl.texts] == [123_060_480, 694_659_840]
    parts = build_parts(resolve_architecture(config(SD15)), config().train, reference=False)
    assert count(parts.denoisers.policy) == 859_520_964
    assert [count(text) for text in parts.texts] == [123_060_480]


def test_sdxl_costs_what_the_published_table_says(sdxl):
    """TFLOP of a pair at 1024 x 1024: 13.5 forward, 40.5 with backward, VAE 9.8, text 0.1."""
    shapes = Shapes(pairs=1, height=128, width=128, vae_factor=8, tokens=77)
    forward, whole, repeated = measure_training(
        sdxl.denoisers.policy, shapes, "bf16", checkpointing=False
    )
    assert forward.flops / 1e12 == pytest.approx(13.5, rel=0.01)
    assert whole.flops / 1e12 == pytest.approx(40.5, rel=0.01)
    assert repeated == 0
    assert measure_vae(sdxl.vae, shapes, "fp32").flops / 1e12 == pytest.approx(9.8, rel=0.01)
    assert measure_texts(sdxl.texts, shapes).flops / 1e12 == pytest.approx(0.1, abs=0.02)


@pytest.mark.slow
def test_checkpointing_sdxl_repeats_less_than_the_forward_pass(sdxl):
    """A whole forward more would be 54.0 TFLOP; torch stops each block's recomputation early."""
    shapes = Shapes(pairs=1, height=128, width=128, vae_factor=8, tokens=77)
    unet = build_parts(
        resolve_architecture(config()), config(precision="bf16").train, reference=False
    ).denoisers.policy
    forward, whole, repeated = measure_training(unet, shapes, "bf16", checkpointing=True)
    assert (whole.flops - repeated) / 1e12 == pytest.approx(40.5, rel=0.01)
    assert 0.7 * forward.flops < repeated < forward.flops
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        _, nominal, _ = measure_training(unet, shapes, "bf16", checkpointing=True)
    assert whole.flops < nominal.flops <= 1.01 * 54.0e12


def test_sd15_costs_its_published_forward_pass():
    """About 0.4 T multiply-adds an image at 512 x 512, of which a pair has two."""
    plan = make_plan(config(SD15, resolution=512))
    assert plan.costs[0].flops.policy_forward == pytest.approx(1.6, rel=0.01)
    assert plan.costs[0].flops.policy == pytest.approx(3 * 1.6, rel=0.02)
    assert plan.family == "sd15"
    assert "packaged" in plan.architecture


# Counting, against arithmetic and against torch on real tensors.


def test_a_convolution_and_an_attention_cost_what_arithmetic_says():
    with flop_counter() as counter, torch.device("meta"):
        conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.empty(2, 16, 8, 8, requires_grad=True)
        conv(x).sum().backward()
    forward = 2 * (2 * 8 * 8) * 32 * (16 * 9)
    assert counter.get_total_flops() == 3 * forward
    q, k, v = (torch.empty(2, 4, 64, 16, device="meta", requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        with CudaForward(torch.bfloat16):
            out = F.scaled_dot_product_attention(q, k, v)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    scores = 2 * 4 * 64 * 64
    assert counter.get_total_flops() == 3 * (2 * 2 * scores * 16)


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counts_equal_torch_s_counter_on_real_tensors(tiny_pipelines, full, checkpointing):
    unet, train, shapes = tiny_unet(tiny_pipelines["sdxl"], full=full)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        unet(**unet_inputs(unet, shapes, CPU), return_dict=False)[0].sum().backward()
    architecture = resolve_architecture(config(tiny_pipelines["sdxl"], resolution=32))
    meta = build_parts(architecture, train, reference=False).denoisers.policy
    _, whole, repeated = measure_training(meta, shapes, "fp32", checkpointing=checkpointing)
    assert whole.flops == real.get_total_flops()
    assert (repeated > 0) == checkpointing


class Saved:
    """A tensor that autograd keeps, for as long as it keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(unet, inputs, context):
    """Bytes of the distinct tensors that autograd keeps of a forward pass, beside its inputs."""
    given = [*unet.parameters(), *torch.utils._pytree.tree_leaves(inputs)]
    outside = {t.untyped_storage().data_ptr() for t in given if torch.is_tensor(t)}
    kept = weakref.WeakSet()

    def pack(tensor):
        saved = Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor), context:
        prediction = unet(**inputs, return_dict=False)[0]
    storages = [saved.tensor.untyped_storage() for saved in kept]
    assert prediction.requires_grad
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in outside}.values())


class NormsInFloat32(torch.overrides.TorchFunctionMode):
    """Adds to the CPU's autocast what CUDA's does besides: normalisation in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.group_norm, F.layer_norm):
            args = tuple(a.float() if torch.is_tensor(a) else a for a in args)
            kwargs = {k: a.float() if torch.is_tensor(a) else a for k, a in kwargs.items()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_activations_equal_what_autograd_keeps_on_a_cpu(
    tiny_pipelines, precision, checkpointing, full
):
    unet, train, shapes = tiny_unet(tiny_pipelines["sdxl"], full=full, precision=precision)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    context = contextlib.ExitStack()
    if precision == "bf16":
        context.enter_context(torch.autocast("cpu", torch.bfloat16))
        context.enter_context(NormsInFloat32())
    real = saved_bytes(unet, unet_inputs(unet, shapes, CPU), context)
    architecture = resolve_architecture(config(tiny_pipelines["sdxl"], resolution=32))
    meta = build_parts(architecture, train, reference=False).denoisers.policy
    forward, whole, _ = measure_training(meta, shapes, precision, checkpointing=checkpointing)
    answer = 6 * 4 * 8 * 8 * (2 if precision == "bf16" else 4)
    assert forward.kept - answer == pytest.approx(real, rel=2e-3)
    assert whole.peak >= forward.kept


def test_checkpointing_holds_less_and_batches_hold_in_proportion(tiny):
    plain, less = tiny(precision="bf16"), tiny(precision="bf16", gradient_checkpointing=True)
    more = tiny(precision="bf16", micro_batch_size=8)
    one, other, eight = (p.costs[0].memory.activations for p in (plain, less, more))
    assert other < one < eight <= 8 * one
    assert more.costs[0].flops == plain.costs[0].flops


def test_the_tracker_adds_and_takes_away():
    """1 KiB each: x, then y while x lives, then z in y's place."""
    with StorageTracker() as tracker:
        x = torch.empty(256, device="meta")
        y = x * 2
        view = y.view(16, 16)
        assert tracker.live == 2048
        del y, view
        z = x + 1
        assert (tracker.live, tracker.peak) == (2048, 2048)
        del x, z
    assert (tracker.live, tracker.peak) == (0, 2048)


def test_gradients_leave_the_tracker_when_they_are_whole():
    layer = nn.Linear(64, 64, bias=False, device="meta")
    tracker = StorageTracker(layer.parameters())
    with tracker:
        layer(torch.empty(1, 64, device="meta")).sum().backward()
    assert tracker.peak >= 64 * 64 * 4
    assert tracker.live == 0
    assert layer.weight.grad is not None


def test_the_step_under_the_scaler_takes_one_float32_copy(tiny_pipelines):
    unet, train, _ = tiny_unet(tiny_pipelines["sdxl"])
    weights = list(unet.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights, foreach=True)
    optimizer.step()
    with StorageTracker(weights) as tracker:
        optimizer.step()
    assumed = count_trained(weights, train.model_copy(update={"precision": "fp16"}))
    assert assumed.step == pytest.approx(tracker.peak, rel=0.02)
    assert assumed.states == 8 * count(unet)


# Memory.

THOUSAND = Trained(1000, 1500, trainable=4000, frozen=1000, states=8000, step=0)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 5000, 4000, 8000),
        (1, 5000, 4000, 1500),  # (8000 + 4000) / 8
        (2, 5000, 500, 1500),
        (3, 625, 500, 1500),
    ],
)
def test_zero_shares_what_its_paper_says(stage, weights, gradients, optimizer):
    """1,000 trainable float32 weights and 500 frozen bf16 ones on 8 processes, by hand."""
    parts = held(THOUSAND, Sharding(8, stage, bucket=10, live=150))
    assert (parts["weights"], parts["gradients"]) == (weights, gradients)
    assert parts["optimizer"] == optimizer
    # The copies of DDP's buckets; DeepSpeed's bucket; 150 of 1,500 weights of 10/3 bytes each.
    assert parts["communication"] == {0: 4000, 1: 40, 2: 40, 3: 40 + 500}[stage]


def test_offloading_moves_parts_to_the_host():
    one = held(THOUSAND, Sharding(8, 2, offload_optimizer=True))
    assert (one["optimizer"], one["gradients"], one["host"]) == (0, 0, 2000)
    two = held(THOUSAND, Sharding(8, 3, offload_optimizer=True, offload_param=True))
    assert (two["weights"], two["host"]) == (0, 2625)


def test_every_stage_and_every_process_holds_less():
    def held_by(processes, stage):
        parts = held(THOUSAND, Sharding(processes, stage, bucket=0, live=0))
        return sum(parts[k] for k in ("weights", "gradients", "optimizer"))

    by_stage = [held_by(16, stage) for stage in (0, 1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)
    by_processes = [held_by(n, 3) for n in (1, 2, 4, 8, 16)]
    assert by_processes == sorted(by_processes, reverse=True)


def settings(tmp_path, **zero):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def test_deepspeed_s_file_is_read(tmp_path):
    train = config().train
    away = {"device": "cpu"}
    name = settings(tmp_path, stage=2, overlap_comm=True, offload_optimizer=away)
    sharding = read_sharding(train.model_copy(update={"deepspeed": name}), 4)
    assert sharding == Sharding(4, 2, offload_optimizer=True, buckets=2)
    assert "ZeRO-2" in str(sharding)
    assert read_sharding(train, 4) == Sharding(4)


@pytest.mark.parametrize("text", ["[]", "not json", '{"zero_optimization": {"stage": 7}}'])
def test_a_bad_deepspeed_file_is_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    train = config().train.model_copy(update={"deepspeed": str(path)})
    with pytest.raises(ConfigError, match="bad"):
        read_sharding(train, 1)


# Whole plans.


def test_full_training_holds_sixteen_bytes_a_weight(tiny):
    memory = tiny(precision="bf16").costs[0].memory
    count = tiny(precision="bf16").assumptions.trainable
    assert memory.weights == memory.gradients == 4 * count
    assert memory.optimizer == 8 * count
    assert 2 * count <= memory.reference < 2.1 * count  # norms are float32
    assert memory.allowance == ALLOWANCE


def test_lora_holds_its_base_in_half_precision_and_no_reference(tiny):
    plan = tiny(method="lora", precision="bf16")
    memory, a = plan.costs[0].memory, plan.assumptions
    assert memory.weights == 2 * (a.parameters - a.trainable) + 4 * a.trainable
    assert memory.optimizer == 8 * a.trainable
    assert memory.reference == 0


def test_the_parts_add_up_and_the_rates_follow(tiny):
    plan = tiny(world_size=4, utilisation=0.5, micro_batch_size=2, precision="bf16")
    own, bare, *released = plan.costs
    parts = own.flops.model_dump()
    assert own.tflop == pytest.approx(sum(parts.values()))
    assert own.seconds_per_pair == pytest.approx(own.tflop / (989.4 * 0.5))
    assert own.pairs_per_second == pytest.approx(4 / own.seconds_per_pair)
    assert plan.assumptions.visits == 10 * 4 * 2
    assert own.hours == pytest.approx(80 / own.pairs_per_second / 3600)
    assert bare.tflop == pytest.approx(own.flops.policy)
    assert bare.peak_bytes < own.peak_bytes
    dpo, mapo, adaptive = released
    assert dpo.flops.reference == own.flops.reference > 0
    assert dpo.flops.vae == mapo.flops.vae == adaptive.flops.vae > 0
    assert mapo.flops.reference == mapo.memory.reference == 0
    assert adaptive.flops.annotators == pytest.approx(2 * own.flops.policy_forward)
    vae = dpo.flops.vae / (494.7 * 0.5)  # float32 convolutions run in TF32
    assert dpo.seconds_per_pair == pytest.approx(
        (dpo.flops.policy + dpo.flops.reference + dpo.flops.text) / (989.4 * 0.5) + vae
    )
    assert dpo.slower == pytest.approx(dpo.seconds_per_pair / own.seconds_per_pair)


def test_moving_averages_cost_passes_and_the_ledger_none(tiny):
    adaptive = {"name": "adaptive_dpo"}
    ema = tiny(objective=adaptive, annotators={"kind": "ema", "decays": [0.9, 0.5, 0.1]})
    ledger = tiny(objective=adaptive, annotators={"kind": "ledger"})
    assert ema.costs[0].flops.annotators == pytest.approx(3 * ema.costs[0].flops.policy_forward)
    assert ema.costs[0].memory.annotators == 3 * 4 * ema.assumptions.trainable
    assert ledger.costs[0].flops.annotators == ledger.costs[0].memory.annotators == 0
    assert "ledger" in ledger.costs[0].what


def test_mapo_costs_what_fine_tuning_costs(tiny):
    plan = tiny(objective={"name": "mapo"})
    assert plan.costs[0].tflop == pytest.approx(plan.costs[1].tflop)
    assert "1.00x the bare policy" in " ".join(plan.verdict)


def test_the_cache_is_counted_by_hand(tiny_pipelines, tiny_data, tmp_path):
    """8 x 8 latents of 4 channels and 77 x 40 + 20 text values, in fp16; 11 pairs, 3 prompts."""
    chosen = config(
        tiny_pipelines["sdxl"],
        resolution=32,
        data={"source": "folder", "path": str(tiny_data)},
    )
    cache = make_plan(chosen).cache
    assert cache.latent_bytes_per_pair == 2 * 2 * 4 * 8 * 8 * 2
    assert cache.latents == 11 * cache.latent_bytes_per_pair
    assert cache.text_bytes_per_prompt == (77 * 40 + 20) * 2
    assert cache.text == 4 * cache.text_bytes_per_prompt
    assert cache.total == cache.latents + cache.text


def test_the_prepared_cache_tells_the_number_of_pairs(experiment):
    plan = make_plan(load_config(experiment()))
    assert plan.assumptions.pairs == 11
    assert plan.assumptions.prompts == 4  # the empty one is prepared too
    assert make_plan(load_config(experiment()), pairs=5).assumptions.pairs == 5


def test_a_small_gpu_is_told_from_a_large_one(tiny):
    assert "fits in 24 GB" in tiny(gpu="RTX 4090").verdict[0]
    plan = tiny(gpu="rtx4090", micro_batch_size=2_000_000)
    assert not plan.costs[0].fits
    assert "does NOT fit" in plan.verdict[0]
    assert "gradient_checkpointing" in plan.verdict[0]


# The command.


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *map(str, arguments)])
    out = capsys.readouterr()
    return stopped.value.code, out.out, out.err


def written(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_json_is_the_table(capsys, tiny_pipelines, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = written(tmp_path, raw(tiny_pipelines["sdxl"], resolution=32))
    options = ("--gpu", "a100", "--world-size", 2, "--pairs", 1000)
    code, out, _ = call(capsys, path, *options, "--json")
    assert code == 0
    plan = Plan.model_validate_json(out)
    assert plan == make_plan(load_config(path), gpu="a100", world_size=2, pairs=1000)
    code, table, _ = call(capsys, path, *options)
    assert code == 0
    for cost in plan.costs:
        assert tflop(cost.tflop) in table
        assert gigabytes(cost.peak_bytes) in table
        assert f"{cost.pairs_per_second:.3g}" in table
    assert gigabytes(plan.cache.total) in table
    for line in plan.verdict:
        assert line in " ".join(table.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--gpu", "h1000"), "did you mean h100?"),
        (("--utilisation", "1.5"), "(0, 1]"),
        (("--world-size", "0"), "--world-size"),
        (("--pairs", "0"), "--pairs"),
        (("--set", "model.path=someone/unknown"), "downloads nothing"),
        (("--set", "model.path=/no/such/folder"), "no such folder"),
        (("--set", "model.vae=someone/unknown"), "model.vae"),
        (("--set", "prepare.resolution=1001"), "not a multiple"),
    ],
)
def test_mistakes_are_named(capsys, tmp_path, options, expected):
    code, _, err = call(capsys, written(tmp_path, raw()), *options)
    assert code == 2
    assert expected in " ".join(err.split())
    assert "Traceback" not in err


def test_a_hub_id_is_known_in_any_case_and_with_another_vae():
    changed = raw(SDXL.upper())
    changed["model"]["vae"] = "madebyollin/sdxl-vae-fp16-fix"
    architecture = resolve_architecture(parse_config(changed))
    assert architecture.family == "sdxl"
    assert architecture.vae["scaling_factor"] == 0.13025
    with pytest.raises(ModelError, match="downloads nothing"):
        resolve_architecture(config("stabilityai/stable-diffusion-3"))


def test_the_hub_s_copy_on_this_machine_comes_before_the_packaged_one(
    tiny_pipelines, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    repo = tmp_path / f"models--{SDXL.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / "abc").symlink_to(tiny_pipelines["sdxl"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    architecture = resolve_architecture(config())
    assert "copy on this machine" in architecture.source
    assert architecture.unet["block_out_channels"] == [16, 24]


def test_every_gpu_is_faster_in_half_precision():
    for name, gpu in GPUS.items():
        assert find_gpu(name.upper()) is gpu
        assert gpu.rate("bf16") > gpu.rate("fp32", convolutions=True) >= gpu.rate("fp32")


def is_hub_config(path):
    return "/" in yaml.safe_load(path.read_text())["model"]["path"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_packaged_configuration_plans_on_a_tiny_model(path, tiny_pipelines):
    family = "sd15" if "sd15" in path.stem else "sdxl"
    small = (f"model.path={tiny_pipelines[family]}", "prepare.resolution=32", "model.vae=null")
    plan = make_plan(load_config(path, small), world_size=8)
    assert plan.costs[0].fits
    assert plan.costs[0].flops.vae == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in CONFIGS if is_hub_config(p)], ids=lambda p: p.stem)
def test_every_packaged_configuration_plans_at_its_real_size(path):
    plan = make_plan(load_config(path), world_size=8)
    assert "packaged" in plan.architecture
    assert plan.costs[0].slower <= plan.costs[-1].slower


def test_measure_forward_of_the_adapters_off(tiny_pipelines):
    """LoRA's reference is the base: it costs less than the policy with its adapters."""
    chosen = config(tiny_pipelines["sdxl"], resolution=32, method="lora")
    parts = build_parts(resolve_architecture(chosen), chosen.train, reference=False)
    shapes = Shapes(pairs=1, height=8, width=8, vae_factor=4, tokens=77)
    with parts.denoisers.reference() as model:
        off = measure_forward(model, shapes, "bf16").flops
    on = measure_forward(parts.denoisers.policy, shapes, "bf16").flops
    assert 0 < off < on
