"""What a run says of its labels: calibrated probabilities, the table of all pairs, intervals."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fastpo.errors import DataError, ForeignPathError
from fastpo.ledger import BINS
from fastpo.review.calibration import calibrate, calibration_error, reliability
from fastpo.review.evidence import Evidence, load_evidence
from fastpo.review.gallery import choose, summarize, words, write_gallery
from fastpo.review.known import at_thresholds, curves
from tests.review.world import make_data, make_run

PAIRS = 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("review")
    return make_run(folder / "run", make_data(folder / "data", PAIRS), PAIRS)


def sums(share, pairs, *, right=0.8, wrong=0.6, visits=6, seed=0):
    rng = np.random.default_rng(seed)
    bad = rng.random(pairs) < share
    n = np.full(pairs, float(visits))
    return rng.normal(np.where(bad, -wrong, right) * n, 1.5 * np.sqrt(n)), n, bad


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_the_share_of_wrong_labels_is_learned_and_probabilities_are_kept(share):
    total, visits, bad = sums(share, 20_000)
    found = calibrate(total, visits)
    assert found.share == pytest.approx(bad.mean(), abs=0.012)
    assert (found.right, found.wrong) == pytest.approx((0.8, 0.6), abs=0.03)
    probability = found.probability(total, visits)
    near = (probability > 0.85) & (probability < 0.95)
    assert bad[near].mean() == pytest.approx(0.9, abs=0.04)
    assert calibration_error(reliability(probability, bad)) < 0.01


def test_clean_labels_are_not_cut_in_two():
    """Where votes are strong enough for wrong ones to stand apart; else nothing is learned."""
    for seed in range(5):
        total, visits, _ = sums(0.0, 2_000, right=0.9, seed=seed)
        found = calibrate(total, visits)
        assert found.share < 0.02 and found.probability(total, visits).mean() < 0.02
        assert calibrate(*sums(0.0, 2_000, right=0.6, seed=seed)[:2]) is None


def test_pairs_seen_more_often_are_surer():
    found = calibrate(*sums(0.3, 5_000)[:2])
    once, often = found.probability(np.array([-0.6, -6.0]), np.array([1.0, 10.0]))
    assert 0.3 < once < often and found.probability(np.zeros(1), np.zeros(1)) == found.share


def test_too_few_pairs_or_no_votes_teach_nothing():
    assert calibrate(*sums(0.2, 19)[:2]) is None
    assert calibrate(np.zeros(100), np.zeros(100)) is None
    assert calibrate(np.ones(100), np.ones(100)) is None
    often = np.arange(1.0, 101.0)
    assert calibrate(0.1 * often, often) is None, "one mean vote, but for its rounding"


@pytest.mark.parametrize("pairs", [200, 750, 2_000])
def test_where_right_and_wrong_run_into_each_other_no_share_is_made_up(pairs):
    """Wrong labels learned by heart have votes near zero: any share would fit.

    Of few pairs one sample in ten may look like two heaps by chance.
    """
    learned = 0
    for seed in range(25):
        learned += calibrate(*sums(0.4, pairs, right=0.35, wrong=0.0, seed=seed)[:2]) is not None
        learned += calibrate(*sums(0.2, pairs, right=0.5, wrong=0.3, seed=seed)[:2]) is not None
        apart, visits, bad = sums(0.4, pairs, right=1.1, wrong=0.9, seed=seed)
        assert calibrate(apart, visits).share == pytest.approx(bad.mean(), abs=0.08)
    assert learned <= (5 if pairs < 500 else 1)


def test_a_few_outliers_are_no_heap_of_wrong_labels():
    """Weak votes of which two in five are wrong, and two far away."""
    total, visits, _ = sums(0.4, 750, right=0.35, wrong=0.0)
    total[:2] = -13.0  # more than three spreads; a vote is bounded
    assert calibrate(total, visits) is None


def test_pairs_without_a_vote_are_not_counted_as_suspicious():
    total, visits, bad = sums(0.4, 400, right=0.35, wrong=0.0)
    visits[100:] = 0.0
    u = np.where(visits > 0, 1.0 / (1.0 + np.exp(-total.clip(-9, 9))), 0.0)
    evidence = Evidence(
        pair_ids=[f"p{k}" for k in range(400)],
        flipped=bad,
        visits=visits,
        mean_vote=np.zeros(400),
        minority=u,
        moving=np.full(400, np.nan),
        probability=np.where(visits > 0, u, 0.5),
        calibration=None,
        run=Path("run"),
        config=None,
        votes=None,
    )
    seen = evidence.judged
    summary = summarize(evidence, curves(evidence.probability[seen], bad[seen]))
    assert summary["judged"] == 100 and summary["above_half"] == (u[seen] >= 0.5).sum()
    assert sum(one["pairs"] for one in summary["known"]["reliability"]) == 100
    assert summary["known"]["thresholds"][0]["pairs"] == summary["above_half"]


def test_the_page_says_why_no_share_is_told():
    summary = {"judged": 2_000, "pairs": 2_000, "wrong_share": None, "above_half": 10}
    assert "too weak" in words(summary)
    assert "too few" in words({**summary, "judged": 19})
    known = {"flipped_share": 0.4, "auroc": (0.7, (0.6, 0.8))}
    known |= {"calibration_error": 0.04, "calibration_error_of_u": 0.04}
    assert "AUROC 0.7000" in words({**summary, "known": known})


def test_the_table_holds_each_pair_with_its_history(run, tmp_path):
    evidence = load_evidence(run)
    write_gallery(run, tmp_path / "out", pairs=3)
    rows = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [row["pair_id"] for row in rows] == [f"p{i}" for i in range(PAIRS)]
    for k in (0, 7, 399):
        row, mine = rows[k], evidence.votes.pair == k
        assert row["visits"] == 4 and len(row["history"]) == 4
        assert row["history"][-1] == pytest.approx(row["ledger_minority"], abs=1e-6)
        assert sum(row[f"visits_bin_{b}"] for b in range(BINS)) == 4
        b = int(evidence.votes.bin[mine][0])
        of_bin = evidence.votes.margin[mine & (evidence.votes.bin == b)]
        assert row[f"margin_bin_{b}"] == pytest.approx(of_bin.mean())
        slope = np.polyfit(np.arange(4), evidence.votes.vote[mine], 1)[0]
        assert row["trend"] == pytest.approx(slope, abs=1e-9)
        assert row["metric_minority"] is None


def test_known_flips_are_found_with_intervals(run):
    evidence = load_evidence(run)
    known = summarize(evidence, curves(evidence.probability, evidence.flipped))["known"]
    area, (low, high) = known["auroc"]
    assert low < area < high and area > 0.95
    assert known["calibration_error"] < 0.05
    assert evidence.calibration.share == pytest.approx(known["flipped_share"], abs=0.04)
    assert [kind for _, kind in choose(evidence, 2)] == ["suspicious"] * 2 + ["certain"] * 2
    chosen = [k for k, _ in choose(evidence, PAIRS)]
    assert sorted(chosen) == list(range(PAIRS))


def test_precision_and_recall_by_hand():
    probability, wrong = np.array([0.95, 0.9, 0.6, 0.2]), np.array([True, False, True, True])
    half, _, nine, most = at_thresholds(probability, wrong)
    assert half.pairs == 3 and half.precision[0] == pytest.approx(2 / 3)
    assert half.recall[0] == pytest.approx(2 / 3) and half.recall[1][0] < 2 / 3 < half.recall[1][1]
    assert nine.precision[0] == 0.5 and most.precision is None and most.recall[0] == 0.0
    found = curves(probability, wrong)
    assert found.hits[0] == pytest.approx(1 / 3)  # one of three before the first right label
    assert found.precision[0] == 1.0 and found.precision[-1] == 0.75
    rng = np.random.default_rng(0)
    metric, wrong = rng.integers(0, 9, 200) / 9.0, rng.random(200) < 0.3
    found = curves(metric, wrong)
    assert found.auroc[0] == pytest.approx(roc_auc_score(wrong, metric))
    assert found.average_precision[0] == pytest.approx(average_precision_score(wrong, metric))


def test_a_run_of_an_earlier_version_has_no_histories(tmp_path):
    run = make_run(tmp_path / "run", make_data(tmp_path / "data", 30), 30, votes=False)
    write_gallery(run, tmp_path / "out")
    row = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()[0]
    assert row["history"] == [] and row["trend"] is None and row["margin_bin_0"] is None


def test_without_its_data_the_page_says_so(tmp_path):
    run = make_run(tmp_path / "run", tmp_path / "gone", 30)
    page = write_gallery(run, tmp_path / "out").read_text()
    assert "No images: the run" in page
    assert "not in the data set" in page


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "votes.csv",
            "step,round,pair,timestep,bin,turned,margin\n1,1,x,5,0,0,1e-3\n",
            "votes.csv is dam",
        ),
        (
            "votes.csv",
            "step,round,pair,timestep,bin,turned,margin\n1,1,99,5,0,0,1e-3\n",
            r"a pair lies outside of \[0, 30\)",
        ),
        ("minority.csv", "pair_id,flipped\na,0\n", "minority.csv is damaged"),
        ("minority.csv", None, "train first, to the end"),
        ("config.yaml", None, "has no config.yaml"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, file, text, message):
    run = make_run(tmp_path / "run", tmp_path / "gone", 30)
    if text is None:
        (run / file).unlink()
    else:
        (run / file).write_text(text)
    with pytest.raises(DataError, match=message) as told:
        write_gallery(run, tmp_path / "out")
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    with pytest.raises(ForeignPathError, match="not a gallery"):
        write_gallery(run, tmp_path / "mine", pairs=1)
    assert (tmp_path / "mine" / "notes").read_text() == "kept"
