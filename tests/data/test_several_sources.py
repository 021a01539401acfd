"""Several data sets in one preparation and one run: whose a pair is, and how often it comes."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from fastpo.config import decided_values, dump_config, input_paths, parse_config, with_keys
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.loader import make_loader
from fastpo.data.mixing import MixedSampler, make_sampler, visits_per_epoch
from fastpo.data.prepare import prepare
from fastpo.data.sampler import PairSampler
from fastpo.errors import CacheError, ConfigError, TooManyBadRowsError
from fastpo.models.encoders import Encoders
from fastpo.plan.dataset import count_visits, find_size
from fastpo.reference_cache import prepare_reference
from fastpo.testing import pickapic_row, write_folder, write_pickapic
from fastpo.train import Observer, train


def lines(data, change):
    listing = data / "pairs.jsonl"
    entries = [json.loads(line) for line in listing.read_text().splitlines()]
    listing.write_text("".join(json.dumps(entry) + "\n" for entry in change(entries)))


@pytest.fixture(scope="module")
def made(tiny_pipelines, tmp_path_factory):
    """`mine` (folder), `more` (a folder with a pair of `mine`) and `picks` (Parquet), prepared."""
    base = tmp_path_factory.mktemp("several")
    write_folder(base / "mine", 5)
    write_folder(base / "more", 4, sizes=[(64, 32)])
    for side in ("winner", "loser"):
        shutil.copy(base / "mine" / f"{side}1.png", base / "more" / f"{side}1.png")
    (base / "more" / "winner2.png").unlink()
    rows = [pickapic_row(i, 0.5 if i == 1 else 1.0) for i in range(4)]
    write_pickapic(base / "picks" / "train-0.parquet", rows)
    raw = {
        "seed": 3,
        "model": {"path": str(tiny_pipelines["sd15"])},
        "data": [
            {"source": "folder", "path": str(base / "mine"), "repeats": 2},
            {"source": "folder", "path": str(base / "more")},
            {"source": "pickapic", "path": str(base / "picks"), "limit": 2, "name": "pap"},
        ],
        "prepare": {"cache_dir": str(base / "cache"), "resolution": 32, "shard_size": 3},
        "train": {
            "output_dir": str(base / "run"),
            "objective": {"name": "dpo", "beta": 500.0},
            "max_steps": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "checkpoint_every": 2,
            "trackers": [],
        },
    }
    prepare(parse_config(raw), progress=False)
    return raw


def changed(raw, **values):
    return parse_config(with_keys(raw, {key.replace("__", "."): v for key, v in values.items()}))


def test_the_cache_knows_whose_each_pair_is_and_counts_each_alone(made):
    cache = PairCache.open(parse_config(made), verify=True)
    assert cache.source_names == ["mine", "more", "pap"]
    assert cache.source_index.tolist() == [0] * 5 + [1] * 3 + [2] * 2
    assert list(cache.pair_ids[:7]) == [
        *(f"mine/p{i}" for i in range(5)),
        "more/p0",
        "more/p1",
    ]
    assert cache.pair_ids[8].startswith("pap/1000:")
    first, *each = cache.summary().splitlines()
    assert first.startswith(
        "10 of 12 pairs; left out: 1 tie, 1 bad row or image; kept: 1 that an earlier data set has "
        f"too; listed in {cache.folder / 'quarantine.jsonl'}, first reason (more/p2): winner"
    )
    assert each == [
        "mine: 5 pairs",
        "more: 3 of 4 pairs; left out: 1 bad row or image; kept: 1 that an earlier data set has "
        "too",
        "pap: 2 of 3 pairs; left out: 1 tie",
    ]
    [left_out] = map(json.loads, (cache.folder / "quarantine.jsonl").read_text().splitlines())
    assert (left_out["source"], left_out["pair_id"]) == ("more", "more/p2")


def test_a_pair_has_the_latents_of_its_data_set_alone(made, tmp_path):
    """The other data sets and the place in their row do not matter."""
    whole = PairCache.open(parse_config(made))
    one = made["data"][1]
    alone = prepare(
        changed(
            made | {"data": {k: one[k] for k in ("source", "path")}}, prepare__cache_dir=tmp_path
        ),
        progress=False,
    )
    for i in range(3):
        got, expected = whole.read([5 + i], 0), alone.read([i], 0)
        torch.testing.assert_close(got.latent_mean, expected.latent_mean, atol=1e-3, rtol=1e-3)
        assert whole.prompts[whole.prompt_index[5 + i]] == alone.prompts[alone.prompt_index[i]]


def test_what_is_encoded_is_reused_when_a_data_set_comes_along(made, tmp_path, monkeypatch):
    seen = []
    encode = Encoders.encode_images
    monkeypatch.setattr(
        Encoders, "encode_images", lambda self, x: (seen.append(len(x)), encode(self, x))[1]
    )
    write_folder(tmp_path / "new", 7)
    lines(tmp_path / "new", lambda entries: entries[5:])
    sources = [{"source": "folder", "path": str(tmp_path / "new")}, *made["data"]]
    raw = made | {"data": {"sources": sources}}
    config = changed(
        raw, prepare__cache_dir=tmp_path / "cache", prepare__reuse=made["prepare"]["cache_dir"]
    )
    cache = prepare(config, progress=False)
    assert sum(seen) == 4 and len(cache) == 12
    with pytest.raises(CacheError, match=r"data\.sources\.0\.name: .*with prepare\.reuse="):
        prepare(changed(raw), progress=False)


def test_bad_rows_count_for_their_own_data_set(made, tmp_path):
    for name, count in (("good", 200), ("bad", 4)):
        write_folder(tmp_path / name, 4)
        lines(tmp_path / name, lambda entries, n=count: entries * (n // 4))
    (tmp_path / "bad" / "winner2.png").unlink()
    data = [{"source": "folder", "path": str(tmp_path / name)} for name in ("good", "bad")]
    data[1]["max_bad"] = "10%"
    with pytest.raises(TooManyBadRowsError, match=r"bad/pairs\.jsonl: 1 of 4 rows are bad, .*0\.1"):
        prepare(changed(made | {"data": data}, prepare__cache_dir=tmp_path / "c"), progress=False)


def draws(sampler, epochs):
    per_epoch = sampler.micro_batches_per_epoch
    found = [sampler.draw(n) for n in range(epochs * per_epoch)]
    return [pair for visits, pairs in found for pair in zip(pairs, visits, strict=True)]


def test_an_epoch_repeats_the_pairs_of_one_data_set(made):
    config = parse_config(made)
    sampler = make_sampler(PairCache.open(config), config)
    assert isinstance(sampler, MixedSampler)
    one = draws(sampler, 1)
    assert sorted(one) == sorted(
        [(i, v) for i in range(5) for v in (0, 1)] + [(i, 0) for i in range(5, 10)]
    )
    two = draws(sampler, 2)
    assert two[: len(one)] == one and len(set(two)) == 30
    assert {v for i, v in two if i < 5} == {0, 1, 2, 3} and {v for i, v in two if i > 4} == {0, 1}


def test_weights_are_shares_of_the_visits(made):
    """Rates 3/5, 1/3 and 1/2 a pair: `more` is the slowest, 1.8 visits of `mine` to one of it."""
    data = [{k: v for k, v in one.items() if k != "repeats"} for one in made["data"]]
    for one, weight in zip(data, (3, 1, 1), strict=True):
        one["weight"] = weight
    config = parse_config(made | {"data": data})
    assert visits_per_epoch(config.data.sources, [5, 3, 2]) == pytest.approx([1.8, 1.0, 1.5])
    sampler = make_sampler(PairCache.open(config), config)
    counts = np.bincount([i for i, _ in draws(sampler, 1)], minlength=10)
    assert [counts[:5].sum(), counts[5:8].sum(), counts[8:].sum()] == [9, 3, 3]
    assert counts[:5].min() == 1 and counts[:5].max() == 2
    five = np.bincount([i for i, _ in draws(sampler, 5)], minlength=10)
    assert five.tolist() == [9] * 5 + [5] * 3 + [7, 8] or five.tolist() == [9] * 5 + [5] * 3 + [
        8,
        7,
    ]


@pytest.mark.parametrize("visits", [[1.0, 3.0], [1.75, 1.0]])
def test_the_stream_is_the_same_however_it_is_reached_and_shared(visits):
    bucket, source = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0]), torch.tensor([0] * 5 + [1] * 4)

    def sampler():
        return MixedSampler(bucket, 2, 5, source=source, visits=visits)

    whole = [sampler().draw(n) for n in range(24)]
    walked = sampler()
    assert [walked.draw(n) for n in range(24)] == whole
    assert all(len(set(bucket[pairs].tolist())) == 1 for _, pairs in whole)
    needed = walked.needed(24)
    drawn = {(i, v) for batch, pairs in whole for i, v in zip(pairs, batch, strict=True)}
    assert {(int(i), v) for v, pairs in enumerate(needed) for i in pairs} == drawn
    assert len(drawn) == sum(len(pairs) for _, pairs in whole), "no pair twice with one noise"


def test_ranks_and_a_later_start_read_the_same_batches(made):
    config = parse_config(made)
    cache = PairCache.open(config)
    sampler = make_sampler(cache, config)

    def read(**options):
        found = make_loader(cache, sampler, total_steps=6, **options)
        return [(batch.index.tolist(), batch.visit.tolist()) for batch in found]

    whole = read(accumulation_steps=2)
    shares = [read(rank=rank, world_size=2) for rank in (0, 1)]
    assert [batch for step in zip(*shares, strict=True) for batch in step] == whole
    assert read(accumulation_steps=2, start_step=4) == whole[8:]


def test_without_repeats_the_order_is_that_of_one_data_set(made):
    data = [one | {"repeats": 1} for one in made["data"]]
    config = parse_config(made | {"data": data})
    cache = PairCache.open(config)
    assert type(make_sampler(cache, config)) is PairSampler
    assert [int(n) for n in visits_per_epoch(config.data.sources, [1, 1, 1])] == [1, 1, 1]


class Seen(Observer):
    def __init__(self, last=None):
        self.rows, self.last = [], last

    def on_start(self, trainer, start):
        self.trainer = trainer

    def on_step(self, step, table, metrics):
        self.rows += table.index.tolist()
        if step == self.last:
            raise KeyboardInterrupt


def test_a_run_counts_every_visit_and_goes_on_with_its_order(made, tmp_path, read_metrics):
    """A whole epoch of 15 visits in eight steps, with the errors of a prepared reference."""
    raw = with_keys(made, {"train.max_steps": None, "train.epochs": 1, "train.reference": "cached"})
    config = changed(raw, train__output_dir=tmp_path / "whole")
    errors = prepare_reference(config, progress=False)
    assert errors.visits == 2 and not len(errors.missing(1, np.arange(5)))
    assert len(errors.missing(1, np.arange(5, 10))) == 5
    seen = Seen()
    train(config, progress=False, observers=[seen])
    assert np.bincount(seen.rows).tolist() == [2] * 5 + [1] * 5
    votes = seen.trainer.state.ledger.visits.numpy()  # those of the first step have no margin
    assert (votes <= [2] * 5 + [1] * 5).all() and votes[:5].max() == 2
    part = changed(raw, train__output_dir=tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        train(part, progress=False, observers=[Seen(last=3)])
    train(part, resume=True, progress=False)
    assert read_metrics(tmp_path / "part") == read_metrics(tmp_path / "whole")
    minority = (tmp_path / "whole" / "minority.csv").read_text()
    assert "\nmore/p1," in minority


def test_plan_counts_each_kind_and_the_repeats(made, tmp_path):
    config = changed(made | {"train": made["train"] | {"max_steps": None, "epochs": 3}})
    unprepared = changed(config.model_dump(mode="json"), prepare__cache_dir=tmp_path)
    size = find_size(unprepared, None)
    assert (size.pairs, size.prompts) == (11, 8) and size.repeats == pytest.approx(16 / 11)
    assert count_visits(unprepared, size, 1) == 48
    prepared = find_size(config, None)
    assert prepared.pairs == 10 and count_visits(config, prepared, 1) == 45


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"source": "folder"}, r"missing key data\.path"),
        ({"sources": []}, r"missing key data\.source; missing key data\.path"),
        ([{"source": "folder"}], r"missing key data\.sources\.0\.path"),
        (
            [{"source": "folder", "path": "a", "pth": 1}],
            r"data\.sources\.0\.pth; did you mean .*path",
        ),
        ({"path": "x", "sources": [{"source": "folder", "path": "a"}]}, r"data\.sources\.0\.path"),
        (
            [{"source": "folder", "path": "a", "weight": 1}, {"source": "folder", "path": "b"}],
            r"b has no weight",
        ),
        ([{"source": "folder", "path": "a", "weight": 1, "repeats": 2}], r"repeats and a weight"),
        ([{"source": "folder", "path": "a", "name": "a/b"}], r"data\.sources\.0\.name: .*pattern"),
        ([{"source": "folder", "path": p, "name": "n"} for p in "ab"], "two are named n"),
    ],
)
def test_what_does_not_go_together_is_refused_by_key(made, data, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_config(made | {"data": data})
    assert "\n" not in str(caught.value)


def test_the_resolved_configuration_is_read_back_and_changed_by_number(made):
    raw = made | {"data": [{"source": "folder", "path": f"{p}/my data"} for p in "ab"]}
    config = parse_config(raw)
    assert [one.name for one in config.data.sources] == ["my-data", "my-data-2"]
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert [str(path) for path in input_paths(config)][1:3] == ["a/my data", "b/my data"]
    limited = parse_config(with_keys(config.model_dump(mode="json"), {"data.sources.1.limit": 4}))
    assert [one.limit for one in limited.data.sources] == [None, 4]
    keys = decided_values(limited, "cache", named=())
    assert keys["data.sources.1.limit"] == 4 and "data.sources.1.repeats" not in keys
    assert with_keys({"data": {}}, {"seed": 3}) == {"data": {}, "seed": 3}
    with pytest.raises(ConfigError, match=r"data\.sources\.2\.limit: the list has 2"):
        with_keys(config.model_dump(mode="json"), {"data.sources.2.limit": 4})


def test_a_single_data_set_is_written_as_before(made):
    raw = made | {"data": {"source": "folder", "path": "x"}}
    config = parse_config(raw)
    assert [*config.model_dump()["data"], "sources"] == [*type(config.data).model_fields]
    assert "sources" not in json.loads(load_manifest_text(made, config))


def load_manifest_text(made, config):
    manifest = load_manifest(parse_config(made).prepare.cache_dir)
    manifest.sources = []
    return manifest.model_dump_json()
