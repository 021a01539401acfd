"""Plans: counts against torch's own on real tensors, against arithmetic, and against the models."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from fastpo.cli import main
from fastpo.config import load_config, parse_config
from fastpo.errors import ModelError
from fastpo.plan import Plan, make_plan, print_plan
from fastpo.plan.architecture import resolve_architecture
from fastpo.plan.fit import find_largest, scaled
from fastpo.plan.gpus import GPUS, find_gpu
from fastpo.plan.measure import build_parts, measure_training
from fastpo.plan.memory import ALLOWANCE, step_memory
from fastpo.plan.planner import make_shapes, measure
from fastpo.plan.recipes import own_recipe
from fastpo.plan.table import gigabytes, tflop
from fastpo.train.sharding import Sharding

ROOT = Path(__file__).parents[2]
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

    def plan(*, gpu="h100", world_size=1, utilization=0.4, **train):
        key = repr((gpu, world_size, utilization, train))
        if key not in made:
            chosen = config(tiny_pipelines["sdxl"], resolution=32, **train)
            made[key] = make_plan(chosen, gpu=gpu, world_size=world_size, utilization=utilization)
        return made[key]

    return plan


# Whole plans.


def test_sd15_costs_its_published_forward_pass():
    """About 0.4 T multiply-adds an image at 512 x 512, of which a pair has two."""
    plan = make_plan(config(SD15, resolution=512))
    assert plan.costs[0].flops.policy_forward == pytest.approx(1.6, rel=0.01)
    assert plan.costs[0].flops.policy == pytest.approx(3 * 1.6, rel=0.02)
    assert plan.family == "sd15"
    assert "packaged" in plan.architecture


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_larger_batch_holds_what_is_foretold_and_the_largest_is_the_last_that_fits(
    tiny_pipelines, method
):
    chosen = config(tiny_pipelines["sd15"], resolution=64, method=method, precision="bf16")
    architecture = resolve_architecture(chosen)
    shapes = make_shapes(chosen, architecture)
    measured = measure(architecture, chosen, shapes)
    policy = build_parts(architecture, chosen.train, reference=False).denoisers.policy
    wide = replace(shapes, height=2 * shapes.height, width=2 * shapes.width)
    for factor, larger in ((9, replace(shapes, pairs=9)), (4, wide)):
        real = measure_training(policy, larger, "bf16", checkpointing=False)[1].peak
        foretold = scaled(measured, factor).training.peak
        assert real <= foretold * 1.001 and foretold < 1.35 * real
    own = own_recipe(chosen.train, 1)
    room = step_memory(own, scaled(measured, 50), Sharding()).total
    most = find_largest(measured, own, Sharding(), room=room, shapes=shapes, step=64)
    assert (most.pairs, most.resolution) == (50, 64 * 7)  # seven squared is 49
    none = find_largest(measured, own, Sharding(), room=1e9, shapes=shapes, step=64)
    assert (none.pairs, none.resolution) == (0, 0)


def test_the_verdict_says_what_fits_at_most(tiny):
    plan = tiny(gpu="rtx4060")
    pairs, side = plan.largest.pairs, plan.largest.resolution
    assert f"{pairs} pair(s) a pass at 32 x 32; {side} x {side} with 1 pair" in plan.verdict[1]


def test_checkpointing_holds_less_and_batches_hold_in_proportion(tiny):
    plain, less = tiny(precision="bf16"), tiny(precision="bf16", gradient_checkpointing=True)
    more = tiny(precision="bf16", micro_batch_size=8)
    one, other, eight = (p.costs[0].memory.activations for p in (plain, less, more))
    assert other < one < eight <= 8 * one
    assert more.costs[0].flops == plain.costs[0].flops


def test_offloaded_checkpoints_are_in_host_memory(tiny):
    """In bf16 autocast: what leaves the device is what the host gets, of twice the batch twice."""
    kept, away, more = (
        tiny(precision="bf16", gradient_checkpointing=way, micro_batch_size=pairs)
        for way, pairs in ((True, 1), ("offload", 1), ("offload", 2))
    )
    here, there = kept.costs[0].memory, away.costs[0].memory
    assert here.host == 0 < there.host
    assert here.activations - there.host <= there.activations < here.activations
    assert more.costs[0].memory.host == 2 * there.host
    assert here.model_copy(update={"activations": 0}) == there.model_copy(
        update={"activations": 0, "host": 0}
    )
    assert away.costs[0].flops == kept.costs[0].flops
    assert any("Offloaded checkpoints" in note for note in away.notes)
    assert not any("Offloaded checkpoints" in note for note in kept.notes)


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
    plan = tiny(world_size=4, utilization=0.5, micro_batch_size=2, precision="bf16")
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


def test_annotators_in_one_pass_are_held_together():
    ema = {"kind": "ema", "decays": [0.9, 0.5], "batched": True}
    adaptive = {"objective": {"name": "adaptive_dpo"}, "method": "lora"}
    elements = 2 * 4 * 128 * 128
    recipes = [
        own_recipe(config(annotators=annotators, **adaptive).train, elements)
        for annotators in ({**ema, "batched": False}, ema, {**ema, "batched": "auto"})
    ]
    assert [recipe.annotators_at_once for recipe in recipes] == [1, 3, 1]
    together = config(annotators=ema, **adaptive).train
    assert own_recipe(together, elements, whole=False).annotators_at_once == 1
    assert own_recipe(config(objective={"name": "mapo"}).train, elements).annotators_at_once == 0


def test_mapo_costs_what_fine_tuning_costs(tiny):
    plan = tiny(objective={"name": "mapo"})
    assert plan.costs[0].tflop == pytest.approx(plan.costs[1].tflop)
    assert "1.00x the bare policy" in " ".join(plan.verdict)


def test_the_cache_is_counted_by_hand(tiny_pipelines, tiny_data):
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


def test_a_line_that_preparing_leaves_out_is_not_counted(tiny_pipelines, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "winner": "w", "loser": "l"}\n[]\n')
    data = {"source": "folder", "path": str(tmp_path)}
    plan = make_plan(config(tiny_pipelines["sdxl"], resolution=32, data=data))
    assert plan.assumptions.pairs == 1


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


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_preparing_pays_when_both_ways_have_cost_the_same(tiny_pipelines, reference):
    """At the number that is told, our preparing and visits and the recipe's visits are equal."""
    chosen = config(tiny_pipelines["sdxl"], resolution=32, reference=reference)
    plan = make_plan(chosen, pairs=1000)
    own, _, *released = (cost.seconds_per_pair for cost in plan.costs)
    preparing = plan.cache.prepare_hours * 3600 / 1000  # of a pair
    visit = plan.costs[2].flops.reference * preparing_rate(plan) if reference == "cached" else 0.0
    encoding = preparing - math.ceil(plan.assumptions.visits / 1000) * visit
    line = next(text for text in plan.verdict if text.startswith("with its preparing"))
    for name, recipe in zip(("Diffusion-DPO", "MaPO", "Adaptive-DPO"), released, strict=True):
        saved = recipe - own - visit
        when = f"{encoding / saved:.1f} epochs" if saved > 0 else "never in one run"
        assert f"{name} {when}" in line
    assert ("each further run" in line) == (reference == "cached")


def preparing_rate(plan):
    """Seconds per TFLOP of the UNet's passes, from plain fine-tuning's row."""
    return plan.costs[1].seconds_per_pair / plan.costs[1].tflop


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
    print_plan(plan, Console())
    table = capsys.readouterr().out
    for cost in plan.costs:
        assert tflop(cost.tflop) in table
        assert gigabytes(cost.peak_bytes) in table
        assert f"{cost.pairs_per_second:.3g}" in table
    assert gigabytes(plan.cache.total) in table
    for line in plan.verdict:
        assert line in " ".join(table.split())


def test_the_table_reads_at_80_columns(tiny, capsys):
    plan = tiny(
        deepspeed="zero2_offload",
        objective={"name": "adaptive_dpo"},
        annotators={"kind": "ema"},
        ema_decay=0.9,
        gradient_checkpointing=True,
        world_size=2,
    )
    large = plan.costs[0].memory.model_copy(update={"activations": 2 * 10**11})
    costs = [c.model_copy(update={"memory": large, "hours": 12345.6}) for c in plan.costs]
    print_plan(plan.model_copy(update={"costs": tuple(costs)}), Console(width=80))
    out = capsys.readouterr().out
    assert "…" not in out
    lines = [line.strip() for line in out.splitlines()]
    assert any(line.split() == ["config", "tuning", "DPO", "MaPO", "DPO"] for line in lines)
    labels = ("policy, recomputed", "exported average", "batch, answers, loss", "in host memory")
    for label in (*labels, "hours", "time, ours = 1"):
        row = next(line.removeprefix(label) for line in lines if line.startswith(label))
        assert len(row.split()) == 5, label


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--gpu", "h1000"), "did you mean h100?"),
        (("--utilization", "1.5"), "(0, 1]"),
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
    assert {8, 10, 12, 16, 24} <= {gpu.memory_gb for gpu in GPUS.values()}
    for name, memory in (("RTX 4060", 8), ("rtx3060", 12), ("rtx-4080", 16)):
        assert find_gpu(name).memory_gb == memory
        assert gpu.rate("bf16") > gpu.rate("fp32", convolutions=True) >= gpu.rate("fp32")


@pytest.mark.parametrize(("checkpointing", "told"), [(False, "below 0.67"), (True, "below 0.75")])
def test_what_leaving_out_backward_passes_may_save_is_said(tiny, checkpointing, told):
    notes = tiny(backward="sampled", gradient_checkpointing=checkpointing).notes
    (note,) = [note for note in notes if note.startswith("train.backward")]
    assert told in note
