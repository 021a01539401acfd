"""What a plan says of `train.backward: alive` and `sampled`: by a share of live pairs."""

import json

import pytest
import yaml
from rich.console import Console

from fastpo.config import dump_config, load_config, parse_config
from fastpo.errors import ConfigError, DataError
from fastpo.plan import Plan, make_plan, print_plan
from fastpo.plan.backward import plan_backward
from fastpo.train import train
from tests.plan.test_plan import call, raw


@pytest.fixture
def configured(tiny_pipelines, tmp_path):
    """The tiny SDXL: `configured(**train_options)`."""

    def make(**options):
        options = {"backward": "alive", "output_dir": str(tmp_path / "run"), **options}
        return parse_config(raw(tiny_pipelines["sdxl"], resolution=32, **options))

    return make


@pytest.fixture
def plan(configured):
    """`plan(live_share=None, **train_options)`."""

    def make(live_share=None, **options):
        return make_plan(configured(**options), world_size=2, live_share=live_share)

    return make


def note(folder, steps, **changed):
    """Leaves what a run leaves: its configuration, and (share, cost) of its steps."""
    folder.mkdir()
    train = {"output_dir": str(folder), "backward": "alive", **changed}
    (folder / "config.yaml").write_text(dump_config(parse_config(raw(**train))))
    lines = [
        {"step": n, "backward/share": share, "backward/cost": cost}
        for n, (share, cost) in enumerate(steps, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("checkpointing", "cases"),
    [
        (False, [(0.25, 1.75, 0.25), (0.66, 2.98, 0.66), (0.67, 3.0, 1.0), (1.0, 3.0, 1.0)]),
        (True, [(0.25, 2.0, 0.25), (0.74, 3.96, 0.74), (0.75, 4.0, 1.0)]),
    ],
)
def test_a_share_of_live_pairs_takes_the_passes_of_the_formula(configured, checkpointing, cases):
    config = configured(gradient_checkpointing=checkpointing)
    whole = make_plan(config, world_size=2)
    own, flops = whole.costs[0], whole.costs[0].flops
    for live, passes, share in cases:
        backward = plan_backward(config, own, live, 2)
        assert backward is not None
        (cost,) = backward.costs
        assert (cost.live, cost.share) == (live, share)
        assert cost.passes == pytest.approx(passes)
        forward = flops.policy_forward * (1.0 if share == 1.0 else 1.0 + live)
        back = share * (flops.policy_backward + flops.policy_recompute)
        assert cost.tflop == pytest.approx(flops.reference + forward + back)
        assert cost.hours / own.hours == pytest.approx(cost.tflop / own.tflop)
        assert cost.pairs_per_second == pytest.approx(2 / cost.seconds_per_pair)
        hours = whole.assumptions.visits / cost.pairs_per_second / 3600
        assert cost.hours == pytest.approx(hours)


def test_each_quarter_is_told_where_no_share_is_known(plan):
    planned = plan()
    assert [cost.passes for cost in planned.backward.costs] == [1.75, 2.5, 3.0, 3.0]
    assert planned.backward.source is None and planned.backward.steps is None
    (line,) = [text for text in planned.verdict if text.startswith("train.backward: alive")]
    assert "25%, 50%, 75%, 100% of the pairs live: 1.75, 2.5, 3, 3 passes" in line
    for cost in planned.backward.costs:
        assert f"{cost.hours:.3g} h" in line
    assert planned.backward.costs[-1].hours == pytest.approx(planned.costs[0].hours)


def test_with_every_backward_pass_nothing_is_said(plan):
    planned = plan(backward="all")
    assert planned.backward is None
    assert "train.backward" not in " ".join([*planned.verdict, *planned.notes])


def test_a_run_in_the_folder_tells_its_share(experiment, read_metrics):
    path = experiment(max_steps=8, backward="sampled", backward_threshold=8.0)
    config = load_config(path)
    steps = read_metrics(train(config, progress=False))
    costs = [step["backward/cost"] for step in steps]
    assert min(costs) < 3.0 == costs[0]  # both ways of a step
    planned = make_plan(config)
    (cost,), flops = planned.backward.costs, planned.costs[0].flops
    assert planned.backward.source == str(config.train.output_dir / "metrics.jsonl")
    assert (planned.backward.steps, cost.live) == (8, None)
    assert cost.passes == pytest.approx(sum(costs) / 8)
    assert cost.share == pytest.approx(sum(step["backward/share"] for step in steps) / 8)
    policy = 0.0
    for step in steps:
        share = step["backward/share"]
        probed = step["backward/cost"] == pytest.approx(1.0 + 3.0 * share)
        policy += flops.policy_forward * (1.0 + probed * share) + flops.policy_backward * share
    assert cost.tflop == pytest.approx(flops.total - flops.policy + policy / 8)
    (line,) = [text for text in planned.verdict if text.startswith("train.backward: sampled")]
    assert f"by 8 steps in {planned.backward.source}, where {cost.share:.0%} of the pairs" in line
    other = load_config(path, ["train.backward_threshold=4.0"])  # another rule, another share
    assert make_plan(other).backward.source is None


@pytest.mark.parametrize(("checkpointed", "cost"), [(False, 2.6), (True, 3.4)])
def test_closed_gates_of_a_run_are_no_second_forward_pass(plan, tmp_path, checkpointed, cost):
    """At once 1 + 2 s or, with checkpointing, 1 + 3 s; planned without it."""
    note(tmp_path / "run", [(0.8, cost)] * 3, gradient_checkpointing=checkpointed)
    planned = plan()
    (found,), flops = planned.backward.costs, planned.costs[0].flops
    assert found.passes == pytest.approx(2.6)
    policy = flops.policy_forward + 0.8 * flops.policy_backward
    assert found.tflop == pytest.approx(flops.total - flops.policy + policy)


def test_processes_that_wait_cost_what_they_wait_for(plan, tmp_path):
    """Looking first takes 1.75 of a quarter of the pairs; 2.2 where one process has 0.4."""
    note(tmp_path / "run", [(0.25, 2.2), (1.0, 3.0)])
    planned = plan()
    (found,), flops = planned.backward.costs, planned.costs[0].flops
    assert (found.share, found.passes) == (0.625, pytest.approx(2.6))
    policy = (1.4 + 1.0) / 2 * flops.policy_forward + (0.4 + 1.0) / 2 * flops.policy_backward
    assert found.tflop == pytest.approx(flops.total - flops.policy + policy)


def test_the_user_s_share_comes_before_the_run_s(plan, tmp_path):
    note(tmp_path / "run", [(0.5, 2.5)])
    assert plan().backward.costs[0].share == 0.5
    given = plan(0.25)
    assert given.backward.source == "--live-share"
    assert given.backward.costs[0].share == 0.25


def test_a_run_without_these_metrics_is_none(plan, tmp_path):
    note(tmp_path / "run", [(0.5, 2.5)])
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')
    assert plan().backward.source is None
    (tmp_path / "run" / "metrics.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1"):
        plan()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_what_is_no_share_is_refused(plan, share):
    with pytest.raises(ConfigError, match=r"^--live-share must be in \(0, 1\], got "):
        plan(share)
    with pytest.raises(ConfigError, match=r"is for train\.backward: alive or sampled"):
        plan(0.5, backward="all")


def test_the_command_tells_it_in_the_table_and_in_json(
    capsys, tiny_pipelines, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw(tiny_pipelines["sdxl"], resolution=32, backward="sampled")))
    code, out, _ = call(capsys, path, "--live-share", "0.25", "--json")
    assert code == 0
    planned = Plan.model_validate_json(out)
    assert planned == make_plan(load_config(path), live_share=0.25)
    (cost,) = planned.backward.costs
    print_plan(planned, Console())
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if "25% of backward passes" in line)
    words = " ".join(" ".join(lines[start : start + 4]).split())
    assert f"pairs/s {cost.pairs_per_second:.3g} hours {cost.hours:.3g}" in words
    code, _, err = call(capsys, path, "--live-share", "0")
    assert code == 2
    assert " ".join(err.split()).endswith("--live-share must be in (0, 1], got 0")
