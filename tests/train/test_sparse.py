"""Steps without backward passes that bring nothing: `train.backward`."""

import copy
import json
import math
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from fastpo.config import load_config
from fastpo.config.objectives import OBJECTIVES, ObjectiveConfig
from fastpo.errors import ConfigError
from fastpo.loss import dpo
from fastpo.models.denoisers import Denoisers
from fastpo.reference_cache import prepare_reference
from fastpo.train import train
from fastpo.train.distributed import Processes, joined
from fastpo.train.live_share import LiveShare
from fastpo.train.loop import setup
from fastpo.train.objective import LOSSES
from fastpo.train.run_folder import RunFolder
from fastpo.train.sparse import backward_weights, gradient_scale
from fastpo.train.window import Window
from fastpo.types import PairBatch

ADAPTIVE = {"name": "adaptive_dpo", "beta": 500.0, "weight_kind": "gate"}
GATE = {"objective": ADAPTIVE, "annotators": {"kind": "ledger"}}
VERDICTS = torch.tensor([1.0, -1.0] * 5 + [1.0])  # right, wrong, right, ...
PROBED, AT_ONCE = 0.1, 1.0


class Forced(Processes):
    """As under DeepSpeed, where a step needs one backward pass though no pair has a gradient."""

    must_differentiate = True


class BesideFullOne(Processes):
    """Another process draws all of its pairs."""

    def longest(self, numbers):
        mine = super().longest(numbers)
        return [max(mine) for _ in mine]  # the last of the lists is that of the pairs themselves


@contextmanager
def moved(config, share=AT_ONCE, verdicts=VERDICTS, pair_weight=None, sizes=None, kind=Processes):
    """A trainer whose weights have moved, its first step's batches, and what its optimizer gets.

    Args:
        config: The experiment.
        share: The running share before the step.
        verdicts: The pairs' sums of votes.
        pair_weight: Weights of the data.
        sizes: Of the margins in the timesteps' bins.
        kind: What the processes are taken for.
    """
    with joined(config.train) as processes:
        processes = copy.copy(processes)
        processes.__class__ = kind
        made = setup(config, processes, RunFolder(config.train.output_dir, main=True))
        trainer, state = made.trainer, made.trainer.state
        made.data.cache.pair_weight = pair_weight
        torch.manual_seed(0)
        for parameter in state.trainable.values():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        state.ledger.total[:] = verdicts[: len(state.ledger)]
        state.ledger.visits[:] = 3
        if sizes is not None:
            state.ledger.moments[0] = 1e6
            state.ledger.moments[1] = 1e6 * sizes.double().log()
        if state.live_share is not None:
            state.live_share.value = share
        given = {}

        def keep(*_):
            given.update({name: p.grad.clone() for name, p in state.trainable.items()})

        state.optimizer.optimizer.register_step_pre_hook(keep)
        stream = iter(made.data.loader(processes, 0, workers=0))
        batches = [next(stream) for _ in range(config.train.accumulation_steps)]
        stream.close()
        yield trainer, batches, given


@pytest.fixture
def one_step(experiment):
    """Gradients and rows of one step: `one_step(share, verdicts, **options)`; see `moved`."""

    def run(
        share=AT_ONCE,
        verdicts=VERDICTS,
        *,
        overrides=(),
        pair_weight=None,
        sizes=None,
        kind=Processes,
        **keys,
    ):
        keys = {"accumulation_steps": 2, "micro_batch_size": 4, **keys}
        config = load_config(experiment(**keys), overrides)
        with moved(config, share, verdicts, pair_weight, sizes, kind) as (trainer, batches, given):
            table = trainer.optimizer_step(iter(batches), 0).read()
        return given, table

    return run


def assert_same_gradient(a, b, *, tolerance=2e-5):
    apart = math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))
    length = math.sqrt(sum(a[name].square().sum().item() for name in a))
    assert a.keys() == b.keys()
    assert 0 < length
    assert apart <= tolerance * length


CASES = {
    "gate, at once": (AT_ONCE, GATE),
    "gate, probed": (PROBED, GATE),
    "hinge": (PROBED, {"objective": {"name": "hinge", "beta": 2000.0}}),
    "kto": (PROBED, {"objective": {"name": "kto", "beta": 500.0}}),
    "sdpo": (PROBED, {"objective": {"name": "sdpo", "beta": 500.0}, "statistics": "micro_batch"}),
    "full, checkpointing, captions": (
        AT_ONCE,
        {
            **GATE,
            "method": "full",
            "gradient_checkpointing": True,
            "empty_prompt_rate": 0.5,
            "snr_gamma": 5.0,
        },
    ),
}


@pytest.mark.parametrize(("share", "options"), CASES.values(), ids=CASES)
def test_a_step_without_needless_backward_passes_has_the_same_gradient(one_step, share, options):
    whole, expected = one_step(**options)
    sparse, table = one_step(share, backward="alive", **options)
    assert_same_gradient(whole, sparse)
    assert table["index"].equal(expected["index"])
    # In a batch of other rows a prediction rounds otherwise, and so do errors, which are about 1.
    rounding = 4 * torch.finfo(torch.float32).eps
    slope = options["objective"]["beta"]
    columns = {"margin": rounding, "error_winner": rounding, "loss": slope * rounding, "weight": 0}
    for column, atol in columns.items():
        torch.testing.assert_close(
            table[column], expected[column], atol=atol, rtol=1e-7, equal_nan=True
        )
    assert table["kept"].bool().equal(table["scale"] != 0)
    needed = 4.0 if options.get("gradient_checkpointing") else 3.0
    kept = table["kept"].bool().double().mean().item()
    expected = 1.0 + needed * kept if share == PROBED else needed * kept + 1.0 - kept
    assert table.cost.passes == pytest.approx(expected)
    assert table.cost.share == pytest.approx(kept)


@pytest.mark.parametrize("share", [AT_ONCE, PROBED])
def test_on_cached_errors_of_the_reference_too(one_step, experiment, tiny_caches, tmp_path, share):
    cache = shutil.copytree(tiny_caches / "sdxl", tmp_path / "cache")
    options = {**GATE, "reference": "cached", "max_steps": 1}
    options |= {"accumulation_steps": 2, "micro_batch_size": 4}
    overrides = [f"prepare.cache_dir={cache}"]
    prepare_reference(load_config(experiment(**options), overrides), progress=False)
    whole, _ = one_step(overrides=overrides, **options)
    sparse, table = one_step(share, overrides=overrides, backward="alive", **options)
    assert_same_gradient(whole, sparse)
    assert table.cost.passes < 3.0


LONG = pytest.param(AT_ONCE, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("share", [LONG, PROBED])
def test_of_compiled_blocks_too(one_step, share):
    """Packs have sizes of their own, with and without gradients: each is a variant of the code."""
    options = {**GATE, "compile": True, "data": {"limit": 2}}
    options |= {"micro_batch_size": 2, "accumulation_steps": 1}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole, _ = one_step(**options)
    sparse, table = one_step(share, backward="alive", **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same_gradient(whole, sparse, tolerance=1e-4)  # code for another size rounds otherwise
    assert table["kept"].sum() == 1


@pytest.mark.parametrize("share", [AT_ONCE, PROBED])
def test_weights_of_the_data_multiply_those_of_the_timesteps(one_step, share):
    """Batches that are made of some of a step's pairs bring the pairs' own weights."""
    options = {"objective": {"name": "hinge", "beta": 2000.0}, "snr_gamma": 1.0}
    given = torch.linspace(0.0, 2.5, 11)
    plain, table = one_step(**options)
    whole, expected = one_step(pair_weight=given, **options)
    torch.testing.assert_close(expected["weight"], table["weight"] * given[table["index"].long()])
    apart = max((plain[name] - whole[name]).abs().max().item() for name in plain)
    assert apart > 0
    sparse, found = one_step(share, pair_weight=given, backward="alive", **options)
    assert_same_gradient(whole, sparse)
    assert found["weight"].equal(expected["weight"])
    assert not found["kept"][found["index"] == 0].any()  # of weight 0
    ones, _ = one_step(pair_weight=torch.ones(11), **options)
    assert all(plain[name].equal(ones[name]) for name in plain)


@pytest.mark.parametrize("share", [AT_ONCE, PROBED])
def test_closed_pairs_get_no_backward_pass_and_still_have_their_margin(one_step, share):
    _, table = one_step(share, backward="alive", **GATE)
    closed = VERDICTS[table.index] < 0
    assert 0 < closed.sum() < len(closed)
    assert table["closed"].bool().equal(closed)
    assert table["kept"].equal((~closed).double())
    assert (table["margin"] != 0).all()


@pytest.mark.parametrize("share", [AT_ONCE, PROBED])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_closed_pairs_alone_moves_nothing_but_the_optimizer(
    one_step, share, accumulation
):
    options = {"accumulation_steps": accumulation, "backward": "alive", **GATE}
    gradients, table = one_step(share, ALL_CLOSED, **options)
    assert gradients
    assert not any(g.any() for g in gradients.values())
    assert table.grad_norm == 0.0
    assert table.metrics(step=1, epoch=1.0, seconds=1.0)["backward/effective"] == 0.0


@pytest.fixture
def policy_passes(monkeypatch):
    """The policy's passes of a full fine-tuning: pairs, and whether with gradients, of each."""
    seen, predict = [], Denoisers.predict

    def watched(self, model, noised, conditions):
        if model is not self.frozen:
            seen.append((len(noised.index), torch.is_grad_enabled()))
        return predict(self, model, noised, conditions)

    monkeypatch.setattr(Denoisers, "predict", watched)
    return seen


ALL_CLOSED = torch.full((11,), -1.0)
ONE_OPEN = torch.where(torch.arange(11) == 4, 1.0, -1.0)
WINDOWS = [(1, 4), (4, 2), (2, 3)]


@pytest.mark.parametrize("share", [AT_ONCE, PROBED])
@pytest.mark.parametrize("verdicts", [VERDICTS, ONE_OPEN, ALL_CLOSED], ids=["some", "one", "all"])
@pytest.mark.parametrize(("size", "micro_batches"), WINDOWS)
def test_the_cost_is_that_of_every_pass(
    one_step, policy_passes, share, verdicts, size, micro_batches
):
    options = {"micro_batch_size": size, "accumulation_steps": micro_batches, "method": "full"}
    _, table = one_step(share, verdicts, backward="alive", kind=Forced, **options, **GATE)
    pairs = len(table["index"])
    closed = int(table["closed"].sum())
    rows = sum(rows * (3 if with_gradient else 1) for rows, with_gradient in policy_passes)
    assert table.cost.passes == pytest.approx(rows / pairs)
    forced = closed == pairs
    looked_at = pairs if share == PROBED else closed
    assert rows == looked_at + 3 * (pairs - closed + forced)
    assert table.cost.share == pytest.approx((pairs - closed + forced) / pairs)


def test_a_step_waits_for_the_process_with_the_most_pairs(one_step, policy_passes):
    """Beside one that draws all of its pairs looking first costs 4, and the next step won't."""
    options = {"micro_batch_size": 1, "accumulation_steps": 4, "method": "full", **GATE}
    options["kind"] = BesideFullOne
    _, table = one_step(PROBED, backward="alive", **options)
    assert table.cost == (4.0, 1.0)
    assert policy_passes == [(1, False)] * 4 + [(1, True)] * 4
    policy_passes.clear()
    _, table = one_step(AT_ONCE, backward="alive", **options)
    assert table["closed"].any()
    assert table.cost == (3.0, 1.0)  # that of `all`: looking at closed pairs would only add to it
    assert policy_passes == [(1, True)] * 4


def test_packs_hold_whole_micro_batches_where_asked():
    def batch(pairs, size):
        sides = torch.zeros(2 * pairs, 4, size, size)
        key = torch.arange(pairs)
        return PairBatch(key, key, key, key > 0, sides, sides, {})

    window = Window([batch(4, 8), batch(2, 8), batch(2, 4), batch(4, 8)], size=4)
    wanted = [torch.tensor(w).bool() for w in ([1, 0, 1, 1], [1, 1], [0, 1], [1, 0, 0, 0])]
    assert window.packed(wanted) == [
        [(0, 0), (0, 2), (0, 3), (1, 0)],
        [(1, 1), (3, 0)],
        [(2, 1)],
    ]
    assert window.packed(wanted, together=True) == [
        [(0, 0), (0, 2), (0, 3), (3, 0)],
        [(1, 0), (1, 1)],
        [(2, 1)],
    ]
    assert window.pairs([(0, 3), (3, 0)]).index.tolist() == [3, 0]


def test_sampled_pairs_weigh_what_they_stand_for(one_step):
    options = {"objective": {"name": "dpo", "beta": 500.0}}
    sampled = {"backward": "sampled", "backward_threshold": 1.5}
    _, table = one_step(PROBED, **options, **sampled)
    chance = (table["scale"] / 1.5).clamp(max=1.0)
    kept = table["kept"] > 0
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(table["kept"][kept], 1.0 / chance[kept], rtol=1e-6, atol=0)
    told = table.metrics(step=1, epoch=1.0, seconds=1.0)
    assert told["backward/share"] == kept.double().mean()
    assert told["backward/cost"] == pytest.approx(1.0 + 3.0 * told["backward/share"])
    # every kept pair weighs threshold at most, and all of them alike where the chance is below 1
    assert told["backward/effective"] == pytest.approx(kept.sum().item(), rel=0.1)


@pytest.mark.parametrize("name", ["dpo", "linear_dpo", "hinge"])
@pytest.mark.parametrize("share", [AT_ONCE, PROBED])
def test_the_scale_does_not_depend_on_how_large_margins_are_at_a_timestep(one_step, share, name):
    """With a slope so small that every pair is as where policy and reference agree."""
    options = {"slope_by_timestep": True, "backward": "sampled", "backward_threshold": 4.0}
    sizes = torch.logspace(-1, 1, 10)
    objective = {"name": name, "beta": 1e-3}
    _, table = one_step(share, torch.ones(11), sizes=sizes, objective=objective, **options)
    bins = table["timestep"].long() // 100
    assert (sizes[bins].log().max() - sizes[bins].log().min()) > 1.0
    torch.testing.assert_close(table["scale"], torch.ones_like(table["scale"]), rtol=1e-3, atol=0)


def test_draws_do_not_depend_on_the_micro_batches(one_step):
    options = {"data": {"limit": 3}, "backward": "sampled", "backward_threshold": 3.0}
    ones, rows = one_step(PROBED, micro_batch_size=1, accumulation_steps=3, **options)
    three, others = one_step(PROBED, micro_batch_size=3, accumulation_steps=1, **options)
    kept = [dict(zip(t["index"].tolist(), t["kept"].tolist(), strict=True)) for t in (rows, others)]
    assert kept[0] == pytest.approx(kept[1], rel=1e-4)
    assert 0 < sum(map(bool, kept[0].values())) < 3
    assert_same_gradient(ones, three, tolerance=1e-3)


def test_the_mean_of_many_sampled_steps_is_the_gradient_of_all(experiment):
    """Over 20,000 seeds of the draw: three standard errors of the mean, 2.5 % of the gradient.

    Weights stay, so a step's gradient depends on the pairs drawn alone, and one step of each set of
    pairs is made.
    """
    options = {"data": {"limit": 4}, "micro_batch_size": 2, "accumulation_steps": 3}
    options |= {"optim": {"lr": 1e-12, "max_grad_norm": 1e9}, "objective": {"name": "dpo"}}
    sampled = {"backward": "sampled", "backward_threshold": 1.5}
    with moved(load_config(experiment(**options))) as (trainer, batches, given):
        trainer.optimizer_step(iter(batches), 0)
        whole = flat(given)
    with moved(load_config(experiment(**options, **sampled)), PROBED) as (trainer, batches, given):
        table = trainer.optimizer_step(iter(batches), 0).read()
        chance = trainer.state.live_share.chance(table["scale"])
        every = pairs(*(torch.cat([getattr(b, n) for b in batches]) for n in ("pair_key", "visit")))
        counts, gradients = Counter(), {}
        for seed in range(20_000):
            drawn = tuple((backward_weights(chance, every, seed=seed) > 0).tolist())
            counts[drawn] += 1
            if drawn not in gradients:
                found = replace(trainer, seed=seed).optimizer_step(iter(batches), 0).read()
                assert (found["kept"] > 0).tolist() == list(drawn)
                gradients[drawn] = flat(given)
    assert len(gradients) > 4
    part = torch.tensor([counts[drawn] / counts.total() for drawn in gradients]).double()
    each = torch.stack(list(gradients.values())).double()
    mean = part @ each
    error = ((part @ (each - mean).square()).sum() / counts.total()).sqrt()
    assert 3 * error < 0.025 * whole.norm()
    assert (mean - whole).norm() <= 3 * error


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def pairs(key, visit):
    nothing = torch.zeros(0)
    return PairBatch(key, key, visit, key > 0, nothing, nothing, {})


def test_the_mean_of_sampled_gradients_is_the_gradient():
    """A linear model: 4 pairs, 40,000 visits; four standard errors of the mean."""
    torch.manual_seed(0)
    n_pairs, visits = 4, 40_000
    model = torch.nn.Linear(6, 6, bias=False)
    seen, target = torch.randn(2 * n_pairs, 6), torch.randn(n_pairs, 6)
    policy = model(seen)
    out = dpo(policy, torch.rand(2 * n_pairs), target, beta=2.0)
    (slopes,) = torch.autograd.grad(out.loss, policy, retain_graph=True)
    scale = gradient_scale(slopes, out.policy_error.detach(), unit=1.0)
    chance = (scale / 1.5).clamp(max=1.0)
    assert chance.min() < 0.3
    key = torch.arange(n_pairs).repeat(visits)
    visit = torch.arange(visits).repeat_interleave(n_pairs)
    weight = backward_weights(chance.repeat(visits), pairs(key, visit), seed=3)
    weight = weight.view(visits, n_pairs)
    by_pair = torch.stack(
        [
            torch.autograd.grad((policy[i::n_pairs] * slopes[i::n_pairs]).sum(), model.weight,
                                retain_graph=True)[0].flatten()
            for i in range(n_pairs)
        ]
    ).double()  # fmt: skip
    drawn = weight @ by_pair
    error = drawn.std(0) / math.sqrt(visits)
    (whole,) = torch.autograd.grad(out.loss, model.weight)
    assert ((drawn.mean(0) - whole.flatten().double()).abs() <= 4 * error + 1e-7).all()
    assert backward_weights(chance, pairs(key[:4], visit[:4]), seed=3).equal(weight[0])
    assert not backward_weights(0 * chance, pairs(key[:4], visit[:4]), seed=3).any()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_gradient_scale_is_one_where_policy_and_reference_agree(name):
    section = TypeAdapter(ObjectiveConfig).validate_python({"name": name})
    policy = torch.randn(8, 64, generator=torch.manual_seed(0)).requires_grad_()
    target = torch.randn(4, 64)
    options = section.model_dump(exclude={"name"})
    judges = [policy.detach().clone()] if section.needs_reference else []
    if name.startswith("adaptive"):
        options["minority"] = torch.zeros(4)
        options["weight_kind"] = "gate"
    out = LOSSES[name](policy, *judges, target, **options)
    (slopes,) = torch.autograd.grad(out.loss, policy)
    scale = gradient_scale(slopes, out.policy_error.detach(), section.fresh_slope())
    if name == "mapo":  # the winner's error alone gives 1, the preference adds to it
        assert (scale >= 1.0 - 1e-6).all()
    else:
        torch.testing.assert_close(scale, torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_gradient_scale_falls_as_a_pair_is_settled():
    e_w, e_l, beta = 0.5, torch.tensor([0.5, 0.6, 0.9]), 10.0
    errors = torch.cat([torch.full((3,), e_w), e_l])
    policy = errors.sqrt()[:, None].expand(6, 5).clone().requires_grad_()
    out = dpo(policy, torch.full((6,), 0.5), torch.zeros(6, 5), beta=beta)
    (slopes,) = torch.autograd.grad(out.loss, policy)
    scale = gradient_scale(slopes, out.policy_error.detach(), unit=beta / 2)
    expected = 2 * torch.sigmoid(-beta * (e_l - e_w)).double()
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0)


def test_a_pair_without_gradient_or_error_has_scale_zero():
    slopes = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [0.0, 0.0], [0.0, 0.0]])
    scale = gradient_scale(slopes, torch.tensor([0.0, 1.0, 0.0, 1.0]), unit=1.0)
    assert scale[0] == 0
    assert scale[1] > 0  # its square is no float32


def test_looking_first_is_cheaper_below_two_thirds(experiment):
    config = load_config(experiment(backward="sampled", backward_threshold=0.5)).train
    share = LiveShare(config)
    for value, cheaper in ((1.0, False), (0.67, False), (0.66, True)):
        share.value = value
        assert (share.looking < share.dense) is cheaper
    checkpointed = LiveShare(config.model_copy(update={"gradient_checkpointing": True}))
    for value, cheaper in ((0.76, False), (0.74, True)):
        checkpointed.value = value
        assert (checkpointed.looking < checkpointed.dense) is cheaper
    chance = share.chance(torch.tensor([0.0, 0.1, 0.7, math.nan], dtype=torch.float64))
    torch.testing.assert_close(chance, torch.tensor([0.0, 0.2, 1.0, 1.0], dtype=torch.float64))


def test_a_run_goes_over_to_looking_first_and_resumes_to_the_bit(experiment, read_metrics):
    options = {"max_steps": 8, "backward": "sampled", "backward_threshold": 8.0}
    whole = train(load_config(experiment(name="whole", **options)), progress=False)
    steps = read_metrics(whole)
    assert steps[0]["backward/cost"] == 3.0  # all at once
    assert steps[-1]["backward/cost"] < 3.0
    path = experiment(name="parts", **options)
    train(load_config(path, ["train.max_steps=6"]), progress=False)
    parts = train(load_config(path), resume=True, progress=False)
    assert read_metrics(parts) == steps


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backward": "alive", "lora": {"dropout": 0.1}}, "use train.lora.dropout: 0"),
        ({"backward": "alive", "backward_threshold": 0.3}, "is for train.backward: sampled"),
    ],
)
def test_what_does_not_go_together_is_refused(experiment, options, text):
    with pytest.raises(ConfigError, match=text):
        load_config(experiment(**options))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_with_dropout_of_its_own_is_refused(experiment, light_pipelines, tmp_path, method):
    folder = shutil.copytree(light_pipelines["sdxl"], tmp_path / "dropping")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dropout": 0.3}))
    path, model = experiment(method=method, max_steps=1), f"model.path={folder}"
    for kind in ("alive", "sampled"):
        config = load_config(path, [model, f"train.backward={kind}"])
        with pytest.raises(ConfigError, match=r"drops 0\.3 in \S+dropout and \d+ other") as error:
            train(config, progress=False)
        assert f"train.backward: {kind}" in str(error.value)
        assert "\n" not in str(error.value)
    train(load_config(path, [model]), progress=False)


def test_pairs_whose_logit_is_beyond_four_are_counted(one_step):
    _, table = one_step(objective={"name": "dpo", "beta": 20_000.0})
    settled = (20_000.0 * table["margin"]).abs() > 4.0
    assert 0 < settled.sum() < len(settled)
    told = table.metrics(step=1, epoch=1.0, seconds=1.0)
    assert told["rewards/saturated"] == settled.double().mean()
    _, table = one_step(objective={"name": "ipo", "tau": 10.0})
    assert "rewards/saturated" not in table.metrics(step=1, epoch=1.0, seconds=1.0)
