"""Held-out pairs: which they are, what is measured on them, and what follows from it."""

import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastpo.config import load_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.held_out import is_held_out
from fastpo.errors import ConfigError
from fastpo.reference_cache import prepare_reference
from fastpo.report.figures import curve_panels, curves_figure
from fastpo.report.runs import load_run
from fastpo.train import Observer, train
from fastpo.train.best import BestHeldOut
from fastpo.train.checkpoint_folders import list_checkpoints
from fastpo.train.held_out import summarize
from tests.conftest import raw_config, read_metrics
from tests.train.ending import EndAt

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def settings(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """`settings("run", "train.max_steps=6", ...)`: a small run that holds pairs out."""
    base = tmp_path_factory.mktemp("held-out")
    raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches)
    raw["data"]["held_out"] = 0.3
    path = base / "run.yaml"
    path.write_text(yaml.safe_dump(raw))

    def make(name, *overrides):
        return load_config(path, [f"train.output_dir={base / name}", *overrides])

    return make


def measured(folder):
    """The held-out metrics by step."""
    rows = {
        m["step"]: {k: v for k, v in m.items() if "held_out" in k} for m in read_metrics(folder)
    }
    return {step: row for step, row in rows.items() if row}


def same_weights(one, two):
    a, b = (load_file(folder / LORA) for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps_kept(folder):
    return [int(path.name[-8:]) for path in list_checkpoints(folder)]


def test_the_share_is_kept_and_a_larger_one_holds_out_the_same_pairs():
    names = [f"pair {i}" for i in range(20_000)]
    small = {n for n in names if is_held_out(n, 0.02)}
    assert len(small) / len(names) == pytest.approx(0.02, abs=0.004)
    assert small < {n for n in names if is_held_out(n, 0.1)}
    random.Random(0).shuffle(names)
    assert small == {n for n in [*names, "one more"] if is_held_out(n, 0.02)} - {"one more"}


def test_pairs_of_a_prompt_go_together(settings):
    cache = PairCache.open(settings("-", "data.held_out=0.5", "data.held_out_by=prompt"))
    for number in cache.prompt_index.unique():
        assert cache.held_out[cache.prompt_index == number].unique().numel() == 1
    assert 0 < int(cache.held_out.sum()) < len(cache)


@pytest.mark.parametrize(("share", "told"), [("1e-9", "holds out no pair"), ("1.0", "all of them")])
def test_a_share_that_leaves_nothing_is_refused(settings, share, told):
    with pytest.raises(ConfigError, match=rf"data\.held_out.*{told}"):
        PairCache.open(settings("-", f"data.held_out={share}"))


@pytest.mark.parametrize(
    "option", ["held_out_every=2", "held_out_draws=2", "keep_best=true", "early_stop=1"]
)
def test_keys_about_held_out_pairs_ask_for_some(settings, option):
    with pytest.raises(ConfigError, match=rf"train\.{option.partition('=')[0]} .*data\.held_out"):
        settings("-", "data.held_out=0", f"train.{option}")


class Oracle(Observer):
    """Computes the last measurement anew, pair by pair, and notes which pairs were drawn."""

    def __init__(self, cache, draws):
        self.cache, self.draws, self.drawn, self.expected = cache, draws, set(), {}

    def on_start(self, trainer, start):
        self.trainer = trainer

    def error(self, model, noised, batch):
        with torch.no_grad():
            prediction = self.trainer.denoisers.predict(model, noised, batch.conditions)
        target = torch.cat([noised.target] * (len(prediction) // len(noised.target)))
        return (prediction - target).double().square().mean(dim=(1, 2, 3)).numpy()

    def on_step(self, step, table, metrics):
        self.drawn.update(table.index.tolist())
        if step < 4:
            return
        denoisers, pairs = self.trainer.denoisers, []
        for pair in self.cache.held_out.nonzero().flatten().tolist():
            rows = []
            for draw in range(self.draws):
                batch = self.cache.read([pair], visit=draw)
                noised = self.trainer.noise.noised_pair(batch)
                own = self.error(denoisers.policy, noised, batch)
                if denoisers.frozen is not None:
                    rows.append((own, self.error(denoisers.frozen, noised, batch)))
                else:
                    with denoisers.reference() as model:
                        rows.append((own, self.error(model, noised, batch)))
            pairs.append(np.mean(rows, axis=0))
        self.pairs = np.array(pairs)  # pair, policy or reference, winner or loser


KINDS = {
    "lora": (),
    "full": ("train.method=full", "train.optim.lr=1e-4"),
    "cached": ("train.reference=cached",),
    "mapo": ("train.objective=mapo",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_measurement_is_that_of_each_pair_by_itself(settings, kind):
    """Errors of order 1 round by 1e-7 in batches; margins are differences of four."""
    config = settings(
        kind, *KINDS[kind], "train.held_out_every=2", "train.held_out_draws=2", "data.flip_rate=0.4"
    )
    if kind == "cached":
        prepare_reference(config, progress=False)
    cache = PairCache.open(config)
    seen = Oracle(cache, draws=2)
    folder = train(config, progress=False, observers=[seen])
    held = set(cache.held_out.nonzero().flatten().tolist())
    assert len(seen.drawn) > 4
    assert not seen.drawn & held
    found = measured(folder)
    assert list(found) == [2, 4]
    own, reference = seen.pairs[:, 0], seen.pairs[:, 1]
    gap = own if kind == "mapo" else own - reference
    margin, flipped = gap[:, 1] - gap[:, 0], cache.flipped[cache.held_out].numpy()
    expected = {"accuracy": (margin > 0).mean(), "margin": margin.mean()}
    expected |= {"error/winner": own[:, 0].mean(), "error/loser": own[:, 1].mean()}
    if kind != "mapo":
        expected |= {
            f"against_reference/{s}": gap[:, i].mean() for i, s in enumerate(("winner", "loser"))
        }
    for name, which in (("clean", ~flipped), ("flipped", flipped)):
        if which.any():
            expected[f"{name}/accuracy"] = (margin[which] > 0).mean()
            expected[f"{name}/margin"] = margin[which].mean()
    assert {k: pytest.approx(v, abs=1e-6) for k, v in expected.items()} == {
        k.removeprefix("held_out/"): v for k, v in found[4].items()
    }
    assert abs(found[4]["held_out/margin"]) > 1e-5


def test_flipped_labels_are_told_apart():
    class Labels:
        flipped = torch.tensor([False, True, False])

    rows = np.array([[1, 0, 3, 2, 2.5, 2.5], [-1] * 6, [2, 0, 1, 2, 1, 1], [0, 0, 1, 2, 1, 2.0]])
    found = summarize(rows, Labels())  # pyright: ignore[reportArgumentType]
    assert found["held_out/accuracy"] == pytest.approx(1 / 3)
    assert found["held_out/margin"] == pytest.approx((-1 + 1 + 0) / 3)
    assert found["held_out/clean/accuracy"] == 0.5
    assert found["held_out/flipped/margin"] == -1.0


def test_neither_the_result_nor_its_resumption_depends_on_measuring(settings):
    common = ("train.lora.dropout=0.3", "train.gradient_checkpointing=true", "train.max_steps=4")
    rare = train(settings("rare", *common), progress=False)
    often = settings("often", *common, "train.held_out_every=1", "train.held_out_draws=3")
    whole = train(often, progress=False)
    assert same_weights(rare / "final", whole / "final")
    assert list(measured(whole)) == [1, 2, 3, 4]
    broken = settings("broken", *common, "train.held_out_every=1", "train.held_out_draws=3")
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False, observers=[EndAt(3)])
    train(broken, resume=True, progress=False)
    assert same_weights(broken.train.output_dir / "final", whole / "final")
    assert read_metrics(broken.train.output_dir) == read_metrics(whole)


def test_the_best_checkpoint_is_kept_and_exported(settings):
    """The rate is so low that no measurement after the first is better."""
    frozen = ("train.optim.lr=1e-12", "train.objective=mapo", "train.max_steps=6")
    config = settings("best", *frozen, "train.keep_best=true", "train.keep_checkpoints=1")
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False, observers=[EndAt(5)])
    folder = train(config, resume=True, progress=False)
    assert steps_kept(folder) == [2, 6]
    saved = load_file(folder / "checkpoints" / "step-00000002" / "trainable.safetensors")
    best = load_file(folder / "best" / LORA)
    sums = [sorted(float(t.abs().sum()) for t in w.values()) for w in (saved, best)]
    assert sums[0] == pytest.approx(sums[1], abs=0)
    assert not same_weights(folder / "best", folder / "final")
    train(config, resume=True, progress=False)  # finished: nothing is written


def test_a_run_stops_early_and_goes_on_with_more_patience(settings, capsys):
    frozen = ("train.optim.lr=1e-12", "train.objective=mapo", "train.max_steps=9")
    options = (*frozen, "train.held_out_every=1", "train.checkpoint_every=50")
    folder = train(settings("early", *options, "train.early_stop=2"), progress=False)
    assert "stopped early after 3 steps" in capsys.readouterr().out
    assert (list(measured(folder)), steps_kept(folder)) == ([1, 2, 3], [3])
    assert (folder / "final").is_dir()
    train(settings("early", *options, "train.early_stop=2"), resume=True, progress=False)
    assert "it has stopped early, after 3 steps" in capsys.readouterr().out
    train(settings("early", *options, "train.early_stop=4"), resume=True, progress=False)
    assert list(measured(folder)) == [1, 2, 3, 4, 5]


def test_the_best_is_the_first_of_equal_ones():
    best = BestHeldOut()
    assert [best.take(s, a) for s, a in ((1, 0.5), (2, 0.5), (3, 0.6), (4, 0.1))] == [
        True,
        False,
        True,
        False,
    ]
    assert (best.step, best.accuracy, best.since) == (3, 0.6, 1)
    assert best.is_exhausted(1)
    assert not best.is_exhausted(2)


def test_the_page_draws_what_was_measured(settings):
    run = load_run(settings("often").train.output_dir)
    titles = [panel.title for panel in curve_panels([run])]
    assert "Accuracy on held-out pairs" in titles
    assert "Margin on held-out pairs" in titles
    assert curves_figure([run]).startswith(b"\x89PNG")
