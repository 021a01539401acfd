"""A cleaned copy of the data: what changed is listed, the images are the same bytes."""

import json
import shutil

import numpy as np
import pytest

from fastpo.cli import main
from fastpo.config import dump_config, load_config, parse_config
from fastpo.data.cache.flips import is_flipped
from fastpo.data.sources import open_source
from fastpo.errors import ConfigError, DataError, ForeignPathError
from fastpo.review import relabel as module
from fastpo.review.decide import Decision, Jury, gap_weights, read_marks
from fastpo.review.evidence import load_evidence
from fastpo.review.relabel import Rules, relabel
from fastpo.types import PreferencePair
from tests.review.world import make_data, make_run

PAIRS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relabel")
    return make_run(folder / "run", make_data(folder / "data", PAIRS), PAIRS, epochs=6)


def opened(out):
    """The pairs of the copy."""
    config = parse_config(
        {
            "model": {"path": "base"},
            "data": {"source": "folder", "path": str(out)},
            "prepare": {"cache_dir": "cache"},
            "train": {"output_dir": "run", "objective": {"name": "dpo"}, "epochs": 1},
        }
    )
    return open_source(config.data)


def read(out):
    """Pairs of the copy by name: prompt, winner, loser."""
    return {p.pair_id: (p.prompt, p.winner(), p.loser()) for p in opened(out)}


def changes(out):
    rows = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    return {row["pair_id"]: (row["change"], row["why"]) for row in rows}


def given(run):
    """The labels as the run was given them."""
    data = load_config(run / "config.yaml").data
    pairs = {p.pair_id: (p.prompt, p.winner(), p.loser()) for p in open_source(data)}
    turned = {name for name in pairs if is_flipped(name, rate=data.flip_rate, seed=0)}
    return {n: (p, b, a) if n in turned else (p, a, b) for n, (p, a, b) in pairs.items()}


@pytest.mark.parametrize("action", ["drop", "tie", "turn"])
def test_a_threshold_changes_what_looks_wrong(run, tmp_path, action):
    evidence, before = load_evidence(run), given(run)
    out = tmp_path / "out"
    summary = relabel(run, out, Rules(threshold=0.8, action=action), progress=False)
    doubted = {n for n, p in zip(evidence.pair_ids, evidence.probability, strict=True) if p >= 0.8}
    assert len(doubted) > 5 and set(changes(out)) == doubted
    after = read(out)
    for name, (prompt, winner, loser) in before.items():
        if name not in doubted:
            assert after[name] == (prompt, winner, loser)
        elif action == "turn":
            assert after[name] == (prompt, loser, winner)
        else:
            assert name not in after
    assert summary["kept"] == PAIRS - len(doubted)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert all(
        "probability 0.8" in w or "probability 0.9" in w or "1.0" in w
        for _, w in changes(out).values()
    )


def test_a_persons_verdicts_go_before_the_threshold(run, tmp_path):
    evidence = load_evidence(run)
    order = np.argsort(-evidence.probability)
    worst, second, best, other = (evidence.pair_ids[k] for k in (*order[:2], order[-1], order[-2]))
    said = {worst: "right", second: "tie", best: "wrong"}
    marks = tmp_path / "marks.jsonl"
    lines = [{"pair_id": worst, "verdict": "wrong"}]  # taken back below
    lines += [{"pair_id": name, "verdict": verdict} for name, verdict in said.items()]
    marks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    relabel(run, out, Rules(threshold=0.9, marks=marks), progress=False)
    before, after, listed = given(run), read(out), changes(out)
    assert after[worst] == before[worst] and listed[worst] == ("kept", "reviewer: right")
    assert second not in after and listed[second] == ("tied", "reviewer: tie")
    assert after[best] == (before[best][0], *before[best][:0:-1])
    assert listed[best] == ("turned", "reviewer: wrong") and after[other] == before[other]


class Light:
    """Prefers the lighter image; of the run's pairs the data's winner."""

    def __init__(self, name, sign=1.0):
        self.name, self.sign = name, sign

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        return {self.name: np.array([self.sign * np.asarray(i).mean() for i in images])}


def stub_scorers(monkeypatch, scorers):
    """Puts scorers in the place of those that are named; returns the options of each call."""
    asked = []

    def build(names, *, batch_size, precision):
        asked.append({"batch_size": batch_size, "precision": precision})
        return scorers[: len(names)]

    monkeypatch.setattr(module, "build_scorers", build)
    return asked


def test_scorers_decide_by_majority_and_their_agreement_is_told(run, tmp_path, monkeypatch):
    jury = [Light("one"), Light("two"), Light("dark", -1.0)]
    asked = stub_scorers(monkeypatch, jury)
    config = run / "config.yaml"
    out = tmp_path / "out"
    summary = relabel(config, out, Rules(by=["one", "two", "dark"]), progress=False)
    before, after = given(run), read(out)
    light = {name for name, (_, winner, loser) in before.items() if after[name] != before[name]}
    flipped = {n for n in before if is_flipped(n, rate=0.2, seed=0)}
    assert light == flipped == set(changes(out)) and summary["turned"] == len(flipped)
    share = 1 - len(flipped) / PAIRS
    agreement = summary["agreement"]
    assert agreement["label"]["one"] == pytest.approx(share)
    assert agreement["one"]["two"] == 1.0 and agreement["dark"]["one"] == 0.0
    assert asked == [{"batch_size": 16, "precision": "fp32"}]


def test_scorers_run_as_the_configuration_or_the_call_says(run, tmp_path, monkeypatch):
    asked = stub_scorers(monkeypatch, [Light("one")])
    raw = load_config(run / "config.yaml").model_dump(mode="json")
    raw["evaluate"] |= {"score_batch_size": 3, "score_precision": "bf16"}
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "config.yaml").write_text(dump_config(parse_config(raw)))
    for source in (tmp_path / "finished", tmp_path / "finished" / "config.yaml"):
        relabel(source, tmp_path / "out", Rules(by=["one"]), progress=False)
        assert asked.pop() == {"batch_size": 3, "precision": "bf16"}
    options = ["--by", "one", "--batch-size", "5", "--precision", "fp16"]
    with pytest.raises(SystemExit) as ended:
        main(["relabel", str(tmp_path / "finished"), str(tmp_path / "other"), *options])
    assert ended.value.code == 0 and asked == [{"batch_size": 5, "precision": "fp16"}]
    with pytest.raises(ConfigError, match="--batch-size and --precision are the scorers'"):
        Rules(threshold=0.5, precision="bf16").check()


class Known:
    """Rates the images in turn: the winners of the pairs, then their losers."""

    def __init__(self, name, winners, losers):
        self.name, self.left = name, [winners, losers]

    def score(self, images, prompts):
        return {self.name: np.array(self.left.pop(0)[: len(images)], dtype=float)}


def test_weights_come_from_the_gaps_of_the_scores(run, tmp_path, monkeypatch):
    """Worked by hand: two scorers, whose gaps have rms 2 and 10, on four pairs.

    g = (gap_1 / 2 + gap_2 / 10) / 2: 1, -1 (turned round: 1), 0.5 - 0.5 = 0 (a tie), and 1.
    """
    one = Known("one", [2, 0, 2, 2], [0, 2, 0, 0])
    two = Known("two", [10, 10, 0, 30], [0, 20, 10, 20])
    data = open_source(load_config(run / "config.yaml").data)
    jury = Jury([one, two], "turn")
    decided = jury.weighed(jury.decide(list(data)[:4]))
    assert [d.change for d in decided] == ["kept", "turned", "tied", "kept"]
    assert [d.weight for d in decided] == pytest.approx([1.0, 1.0, None, 1.0])
    weak = gap_weights(np.array([[1.0], [7.0]]), [0, 1], np.ones(2))  # rms 5
    a, b = np.tanh(0.1), np.tanh(0.7)
    assert weak == pytest.approx([2 * a / (a + b), 2 * b / (a + b)])
    assert gap_weights(np.array([[3.0], [-3.0]]), [0, 1], np.ones(2)) == pytest.approx([2.0, 0.0])
    with pytest.raises(DataError, match="--weigh: the scorers rate both images"):
        gap_weights(np.zeros((2, 1)), [0, 1], np.ones(2))


def test_a_copy_holds_the_weights_of_gaps_or_those_of_the_data(run, tmp_path, monkeypatch):
    stub_scorers(monkeypatch, [Light("one")])
    config, out, again = run / "config.yaml", tmp_path / "out", tmp_path / "again"
    summary = relabel(config, out, Rules(by=["one"], weigh=True), progress=False)
    assert summary["weigh"] and summary["turned"] > 0
    found = {p.pair_id: p.weight for p in opened(out)}
    assert len(found) == PAIRS and np.mean(list(found.values())) == pytest.approx(1.0)
    raw = load_config(config).model_dump(mode="json")
    raw["data"] |= {"path": str(out), "flip_rate": 0.0}
    other = tmp_path / "other.yaml"
    other.write_text(dump_config(parse_config(raw)))
    relabel(other, again, Rules(by=["one"]), progress=False)
    assert {p.pair_id: p.weight for p in opened(again)} == found


def test_weights_need_scorers():
    with pytest.raises(ConfigError, match="--weigh takes weights from scorers"):
        Rules(threshold=0.9, weigh=True).check()


def test_equal_votes_are_a_tie_and_unreadable_images_are_dropped(run):
    pairs = list(open_source(load_config(run / "config.yaml").data))[:2]
    jury = Jury([Light("one"), Light("dark", -1.0)], "turn")

    def gone():
        raise FileNotFoundError("gone.png")

    broken = PreferencePair("broken", "p", gone, pairs[0].loser)
    found = jury.decide([pairs[0], broken, pairs[1]])
    assert [one.change for one in found] == ["tied", "dropped", "tied"]
    assert found[1] == Decision("dropped", "unreadable: gone.png")
    assert jury.agreement()["label"]["one"] == 1.0 and len(jury.votes) == 2


def test_nothing_is_written_in_place_or_over_a_stranger(run, tmp_path):
    data = load_config(run / "config.yaml").data.path
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    for out in (tmp_path / "mine", run, tmp_path / "mine" / "notes"):
        with pytest.raises(ForeignPathError):
            relabel(run, out, Rules(threshold=0.9), progress=False)
    with pytest.raises(ForeignPathError):
        from pathlib import Path

        relabel(run, Path(data), Rules(threshold=0.9), progress=False)
    assert (tmp_path / "mine" / "notes").read_text() == "kept"


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (Rules(), ConfigError, "nothing says which labels to change"),
        (Rules(threshold=0.5, by=["clip"]), ConfigError, "--by decides alone"),
        (Rules(threshold=0.0), DataError, "no labeled pair would be left"),
        (Rules(by=["clipp"]), ConfigError, "unknown scorer 'clipp'"),
    ],
)
def test_what_cannot_be_done_leaves_nothing_behind(run, tmp_path, rules, error, message):
    with pytest.raises(error, match=message):
        relabel(run, tmp_path / "out", rules, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pair_id": "p1"}\n', "line 1: expected"),
        ('\n{"pair_id": "p1", "verdict": "maybe"}\n', "line 2: expected"),
        ("[1]\n", "line 1: expected"),
        ('{"pair_id": "nobody", "verdict": "wrong"}\n', "1 of its pairs are not the run's"),
    ],
)
def test_a_file_that_is_no_reviewers_is_refused(run, tmp_path, text, message):
    marks = tmp_path / "marks.jsonl"
    marks.write_text(text)
    with pytest.raises(DataError, match=message) as told:
        relabel(run, tmp_path / "out", Rules(marks=marks), progress=False)
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()


def test_large_sets_are_cut_into_shards(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 1000)
    relabel(run, tmp_path / "out", Rules(threshold=1.0), progress=False)
    assert len(list((tmp_path / "out").glob("train-*.tar"))) > 5
    assert read(tmp_path / "out") == given(run)


def test_the_last_verdict_of_a_pair_counts(tmp_path):
    path = tmp_path / "marks.jsonl"
    rows = [{"pair_id": "a", "verdict": v, "extra": 1} for v in ("right", "wrong")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_marks(path) == {"a": "wrong"}


def test_a_threshold_needs_a_probability(run, tmp_path):
    """Of a run with too few judged pairs, or whose votes tell nothing, there is none."""
    rows = (run / "minority.csv").read_text().splitlines()
    weak = tmp_path / "weak"
    shutil.copytree(run, weak)
    (weak / "minority.csv").write_text("\n".join(rows[:16]) + "\n")
    (weak / "votes.csv").unlink()
    with pytest.raises(DataError, match=r"--threshold cuts at the probability .* Give --marks"):
        relabel(weak, tmp_path / "out", Rules(threshold=0.9), progress=False)
    assert not (tmp_path / "out").exists()
    marks = tmp_path / "marks.jsonl"
    name = rows[1].split(",")[0]
    marks.write_text(json.dumps({"pair_id": name, "verdict": "wrong"}) + "\n")
    assert relabel(weak, tmp_path / "out", Rules(marks=marks), progress=False)["turned"] == 1
