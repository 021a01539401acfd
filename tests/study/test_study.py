"""`fastpo study`: what is run, that nothing is run twice, and the page that comes from the CSV."""

import csv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastpo.cli import main
from fastpo.config import load_config, parse_config, with_keys
from fastpo.errors import CheckpointError, ConfigError, DataError, ForeignPathError
from fastpo.study import STUDIES, run, shipped
from fastpo.study.command import check_choice, study_command
from fastpo.study.config import StudyConfig, load_study
from fastpo.study.figures import calibration_figure
from fastpo.study.measure import calibration_row
from fastpo.study.methods import METHODS, train_once
from fastpo.study.page import write_page
from fastpo.study.rows import Table, read_rows, row_path
from fastpo.study.run import Options, run_study
from fastpo.study.summary import kept, mean_of, reliability_bins
from fastpo.study.tables import calibration_table, part_table
from fastpo.study.trials import Choice, plan
from fastpo.study.world import Places
from fastpo.system.library_log import kept_apart
from fastpo.system.pool import told, workers
from tests.study import light_jobs

PAPERS = {
    *("sft", "dpo", "conservative", "robust", "ipo", "mapo", "poly_dpo"),
    *("adaptive_dpo_ema", "adaptive_dpo_ledger", "adaptive_dpo_none", "adaptive_ipo"),
    *("weights_only", "margin_only", "drop_and_restart", "rounds"),
}
QUICK = {
    "world": {"name": "digits", "rows": 40},
    "seeds": [0],
    "set": {"evaluate.num_inference_steps": 1},
    "parts": [{"name": "flips", "flips": [0.0, 0.25], "methods": ["dpo", "conservative"]}],
}


def study(**changes):
    return StudyConfig.model_validate({**QUICK, **changes})


def written(tmp_path, raw):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The quick study as it is shipped, made once: its study, folder and rows."""
    work = tmp_path_factory.mktemp("study") / "work"
    quick = load_study(Path("quick"))
    rows = run_study(quick, Options(work, short=True, processes=1))
    return quick, work, rows


@pytest.fixture
def no_runs(monkeypatch):
    """A list of the runs that a study would make; none is made."""
    asked = []

    def refuse(trial, work):
        asked.append(str(trial))
        return f"{trial} was not to be made"

    monkeypatch.setattr(run, "make_run", refuse)
    monkeypatch.setattr(run, "make_data", lambda trials, work: None)
    monkeypatch.setattr(run, "build_bases", lambda trials, work: None)
    return asked


@pytest.mark.parametrize("name", shipped())
def test_every_run_of_a_shipped_study_has_a_configuration_of_its_own(name):
    trials = plan(load_study(Path(name)), short=False)
    assert len({tuple(t.labels.values()) for t in trials}) == len(trials)
    assert [t.seed for t in trials] == sorted(t.seed for t in trials)
    if name == "digits":
        shared = [t for t in trials if t.method_name == "conservative" and t.flip_rate == 0.0]
        as_released = [t for t in trials if t.case == "as released"]
        later = [t for t in trials if t.part.name in ("rivals", "co_teaching")]
        above = [t for t in later if t.method_name in PAPERS]
        runs = {t.digest for t in trials}
        assert len(runs) == len(trials) - len(shared) - len(as_released) - len(above)


def test_the_help_names_every_study_that_is_shipped(capsys):
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    names = sorted(path.stem for path in STUDIES.iterdir() if path.suffix == ".yaml")
    assert {"digits", "emoji", "quick", "rounds"} <= set(names)
    assert f"or one of {', '.join(names)}." in told


def test_the_full_study_has_what_papers_compare():
    full = load_study(Path("digits"))
    first = full.parts[0]
    assert set(first.flips) == {0.0, 0.1, 0.2, 0.3, 0.4} and PAPERS <= set(first.methods)
    assert first.seeds is None and full.seeds == (0, 1, 2)


def test_rounds_are_tried_in_short_too():
    trials = plan(load_study(Path("rounds")), short=True)
    config = next(t for t in trials if t.method_name == "rounds").config(Places(*map(Path, "abcd")))
    train = config.train
    assert (train.rounds, train.round_epochs, train.max_steps) == (3, None, 4)


def test_a_method_gets_the_true_share_and_keeps_the_slope():
    robust, plain = METHODS["robust"], {"train": {"objective": {"name": "dpo", "beta": 7.0}}}
    changed = robust.apply(plain, 0.3)
    assert changed["train"]["objective"] == {
        "name": "robust_dpo",
        "beta": 7.0,
        "label_smoothing": 0.3,
    }
    assert changed["data"]["flip_rate"] == 0.3
    assert METHODS["sft"].apply(plain, 0.0)["train"]["objective"] == {"name": "sft"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"world": "moon"}, "world: expected one of digits"),
        ({"worlds": "digits"}, "unknown key worlds"),
        ({"seeds": [1, 1]}, "once, got"),
        ({"parts": [{"name": "a", "methods": ["ppo"]}]}, "methods: expected names of dpo"),
        ({"parts": [{"name": "a", "methods": ["dpo"]}] * 2}, "a name of its own"),
        ({"parts": [{"name": "calibration", "methods": ["dpo"]}]}, "a section of every page"),
        ({"parts": [{"name": "a", "methods": ["dpo"], "flips": [1.0]}]}, "less than 1"),
    ],
)
def test_a_wrong_study_is_refused_in_a_line(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text) as error:
        load_study(written(tmp_path, {**QUICK, **changes}))
    assert "\n" not in str(error.value)


def test_keys_that_the_trainer_does_not_know_are_refused_before_any_run(tmp_path, no_runs):
    with pytest.raises(ConfigError, match=r"flips: dpo, 0% flipped, seed 0: unknown key train\.x"):
        run_study(study(set={"train.x": 1}), Options(tmp_path / "work", processes=1))
    assert not no_runs and not (tmp_path / "work").exists()


def test_what_decides_nothing_leaves_a_run_the_same_and_all_else_makes_another(tmp_path):
    def digest(**changes):
        return plan(study(**changes), short=False)[0].digest

    same = digest()
    assert digest(set={**QUICK["set"], "train.checkpoint_every": 7}) == same
    assert digest(parts=[{**QUICK["parts"][0], "name": "other", "title": "Other"}]) == same
    for other in (
        {"set": {**QUICK["set"], "train.optim.lr": 1e-3}},
        {"set": {"evaluate.num_inference_steps": 2}},
        {"world": {"name": "digits", "rows": 41}},
        {"world": {"name": "digits", "rows": 40, "labels": "subtle"}},
        {"seeds": [1]},
    ):
        assert digest(**other) != same, other


def test_each_run_has_a_row_with_its_numbers(made):
    quick, work, rows = made
    with (work / "study.csv").open() as file:
        assert list(csv.DictReader(file)) == rows
    assert [r["flip_rate"] for r in rows[:2]] == ["0.0", "0.25"]
    assert len(rows) == 6 == len(plan(quick, short=True))
    by_method = {(r["method"], r["flip_rate"]): r for r in rows}
    plain, dropped = by_method["dpo", "0.25"], by_method["drop_and_restart", "0.25"]
    assert float(plain["wrong"]) == pytest.approx(0.25, abs=0.15) and plain["win_dpo"] == ""
    assert sum(map(int, plain["bin_pairs"].split())) == int(plain["pairs"])
    wrong = float(plain["wrong"]) * int(plain["pairs"])
    assert sum(map(int, plain["bin_wrong"].split())) == pytest.approx(wrong, abs=0.01)
    assert float(dropped["win_dpo"]) == 0.5, "nothing legible: every comparison is a tie"
    assert 1.0 < float(dropped["passes"]) / float(plain["passes"]) <= 2.0
    assert by_method["conservative", "0.0"]["settings"] == by_method["dpo", "0.0"]["settings"]
    assert plain["base_minority_reward"] != ""


def test_a_run_that_is_there_is_not_made_again(made, no_runs, tmp_path):
    quick, work, rows = made
    again = run_study(quick, Options(work, short=True, processes=1, csv=tmp_path / "a.csv"))
    assert again == rows and not no_runs
    elsewhere = Options(tmp_path / "work", short=True, processes=1, csv=tmp_path / "a.csv")
    assert run_study(quick, elsewhere) == rows and not no_runs, "the table's rows count too"


def test_runs_of_other_settings_and_damaged_rows_do_not_count(made, no_runs, tmp_path):
    quick, work, rows = made
    other = quick.model_copy(update={"set": {**quick.set, "evaluate.guidance_scale": 3.0}})
    trials = plan(other, short=True)
    assert not any(Table(trials, work, rows).holds(trial) for trial in trials)
    trial = plan(quick, short=True)[0]
    path = row_path(tmp_path, trial)
    path.parent.mkdir()
    path.write_bytes(row_path(work, trial).read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{path} is no row of a study; remove it"):
        Table([trial], tmp_path, [])


def test_a_run_that_fails_is_named_and_the_others_are_made(made, no_runs, monkeypatch, tmp_path):
    quick, _, _ = made
    wanted = Choice(parts=("flips",), flips=(0.25,))
    options = Options(tmp_path / "work", short=True, processes=1, choice=wanted)
    with pytest.raises(run.StudyError, match=r"flips: dpo, 25%.*; 1 more run failed; the same"):
        run_study(quick, options)
    assert no_runs == [f"flips: {m}, 25% flipped, seed 0" for m in ("dpo", "conservative")]
    no_runs.clear()
    assert run_study(quick, replace(options, make=False)) == [] and not no_runs


def test_a_run_that_another_version_began_is_told_with_the_way_out(experiment):
    """Its configuration differs by a default, which the run's digest does not hold."""
    config = load_config(experiment(max_steps=2, checkpoint_every=1))
    train_once(config)
    changes = {"train.max_steps": 4, "train.objective.beta": 7.0}
    changed = with_keys(config.model_dump(mode="json"), changes)
    folder = config.train.output_dir
    with pytest.raises(CheckpointError, match=rf"objective.beta: .*; remove {folder}, and"):
        train_once(parse_config(changed))


def test_a_user_error_in_a_process_comes_back_as_its_text():
    def job(path):
        raise DataError(f"{path} is damaged")

    assert told(job)("x.parquet") == "x.parquet is damaged" and told(print)("") is None


def test_a_folder_is_the_same_however_its_path_is_written(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(run, "build_bases", lambda trials, work: folders.append(work) or "stop")
    monkeypatch.chdir(tmp_path)
    for path in (Path("work"), tmp_path / "work"):
        with pytest.raises(run.StudyError, match="stop; the same command tries again"):
            run_study(study(), Options(path, short=True, processes=1))
    assert folders == [tmp_path / "work"] * 2


def test_the_command_tells_a_wrong_choice_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["study", "digits", "--work", str(tmp_path / "work"), "--method", "ppo"])
    assert ended.value.code == 2 and not (tmp_path / "work").exists()
    assert "--method: the study has dpo, robust" in capsys.readouterr().err


def test_what_the_study_lacks_cannot_be_chosen():
    check_choice(study(), Choice(("flips",), ("dpo",), (0,), (0.25,)))
    with pytest.raises(ConfigError, match=r"--flips: the study has 0\.0, 0\.25, got 0\.2"):
        check_choice(study(), Choice(flips=(0.2,)))


def test_other_files_are_not_written_over(tmp_path, no_runs):
    table, page = tmp_path / "table.csv", tmp_path / "page.md"
    table.write_text("a,b\n1,2\n")
    page.write_text("# Mine\n")
    with pytest.raises(ForeignPathError, match=r"table\.csv is there and is no table of"):
        study_command(written(tmp_path, QUICK), Options(tmp_path / "work", csv=table), None)
    with pytest.raises(ForeignPathError, match=r"page\.md is there and has no section"):
        study_command(written(tmp_path, QUICK), Options(tmp_path / "work"), page)
    assert not no_runs and table.read_text() == "a,b\n1,2\n" and page.read_text() == "# Mine\n"


def test_the_page_is_made_from_the_table_alone(made, tmp_path):
    quick, work, rows = made
    page = tmp_path / "study.md"
    write_page(page, quick, work / "study.csv", short=True)
    text = page.read_text()
    plain = next(r for r in rows if r["method"] == "dpo" and r["flip_rate"] == "0.25")
    assert f"| {float(plain['wrong']):.0%} |" in text and "6 of" not in text
    assert "All 6 runs; one seed, so no intervals" in text
    assert "![Gain over the share of flipped labels](study-flips-gain.png)" in text
    for kind in ("gain", "bins"):
        assert (tmp_path / f"study-flips-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert "No run whose probabilities are checked is made yet." in text, "so few have no votes"
    page.write_text(text.replace("# A study", "# Mine\n\nWhat I think of it."))
    few = tmp_path / "few.csv"
    few.write_text("".join((work / "study.csv").read_text().splitlines(keepends=True)[:2]))
    write_page(page, quick, few, short=True)
    assert "What I think of it." in page.read_text() and "1 of 6 runs" in page.read_text()
    assert "No run of this part is made yet." in page.read_text()


def test_means_have_the_interval_of_student():
    assert mean_of([]) is None and mean_of([2.0]).text(".1f") == "2.0"
    both = mean_of([1.0, 2.0, 3.0])
    assert both.value == 2.0 and both.half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert both.text(".1f") == "2.0 ± 2.5"
    two = mean_of([1.0, 4.0])
    assert two.half_width is None and two.text(".1f") == "2.5 (1.0 to 4.0)"


def row(method, flip_rate, seed, gain):
    columns = dict.fromkeys(("part", "case", "wrong", "reward", "win_base", "win_dpo"), "")
    columns |= dict.fromkeys(("legible", "auroc", "passes", "base_reward", "base_legible"), "")
    own = {"method": method, "flip_rate": flip_rate, "seed": seed, "gain": str(gain)}
    return {**columns, "part": "flips", "wrong": flip_rate, **own}


def test_the_share_of_the_gain_that_is_kept_is_taken_seed_by_seed():
    clean = [row("dpo", "0.0", "0", 0.1), row("dpo", "0.0", "1", 0.2)]
    found = [row("robust", "0.25", "0", 0.05), row("robust", "0.25", "1", 0.15)]
    assert kept(found, [*clean, *found]).value == pytest.approx((0.5 + 0.75) / 2)
    assert kept(found, found) is None
    tastes = [{**r, "wrong": "0.3"} for r in clean]
    assert kept(found, [*tastes, *found]) is None, "a minority's labels are not clean"
    part = study().parts[0]
    text = part_table(part, [row("dpo", "0.0", "0", 0.1) | {"reward": "0.3"}])
    assert "0.3000" in text and "AUROC" not in text, "columns without a number are left out"


def test_rows_are_read_as_they_were_written(made, tmp_path):
    _, work, rows = made
    assert read_rows(work / "study.csv") == rows and read_rows(tmp_path / "none.csv") == []


def test_probabilities_are_held_against_the_labels_that_are_wrong(tmp_path):
    """Of 2,000 pairs a fifth are wrong: the share is learned, u errs, the probability does not."""
    rng = np.random.default_rng(0)
    wrong = rng.random(2000) < 0.2
    total = np.where(wrong, -1.25, 1.25) + rng.normal(0.0, 1.0, 2000)
    lines = ["pair_id,flipped,visits,ledger_mean,ledger_minority,metric_minority"]
    for k, (flip, votes) in enumerate(zip(wrong, total, strict=True)):
        u = 1.0 / (1.0 + np.exp(2.0 * votes))
        lines.append(f"p{k},{int(flip and k % 2)},4,{votes / 4},{u},")
    (tmp_path / "minority.csv").write_text("\n".join(lines) + "\n")
    others = frozenset(f"p{k}" for k in range(0, 2000, 2) if wrong[k])  # wrong before any flip
    found = calibration_row(tmp_path, others)
    assert found["learned_wrong"] == pytest.approx(0.2, abs=0.04)
    rows = [row("dpo", "0.2", str(seed), 0.1) | {k: str(v) for k, v in found.items()}
            for seed in (0, 1)]  # fmt: skip
    bins = reliability_bins(rows, "reliability")
    assert sum(b.pairs for b in bins) == 4000
    assert sum(b.found * b.pairs for b in bins) == pytest.approx(2 * wrong.sum())
    assert all(b.interval[0] <= b.found <= b.interval[1] for b in bins)
    assert sum(b.expected * b.pairs for b in bins) == pytest.approx(2 * wrong.sum(), rel=0.1)
    checked = study(calibration=["dpo"], parts=[{**QUICK["parts"][0], "flips": [0.2]}])
    cells = calibration_table(checked, rows).splitlines()[-1].split("|")
    share, of_u, of_p = (float(cell.split()[0].rstrip("%")) for cell in cells[4:7])
    assert abs(share - 20.0) < 4.0 and of_p < 0.03 < of_u
    assert calibration_figure(checked, rows).startswith(b"\x89PNG")
    none = study(calibration=["sft"])
    assert "is made yet" in calibration_table(none, rows) and not calibration_figure(none, rows)


def test_too_few_votes_have_no_calibration_and_old_tables_no_column(made, tmp_path):
    head = "pair_id,flipped,visits,ledger_mean,ledger_minority,metric_minority"
    (tmp_path / "minority.csv").write_text(f"{head}\np0,0,1,0.1,0.4,\n")
    assert calibration_row(tmp_path, frozenset()) == {}
    rows = made[2]
    new = ("learned_wrong", "reliability", "reliability_u")
    old = [{k: v for k, v in line.items() if k not in new} for line in rows]
    with (tmp_path / "old.csv").open("w") as file:
        writer = csv.DictWriter(file, old[0])
        writer.writeheader()
        writer.writerows(old)
    assert read_rows(tmp_path / "old.csv") == old


def test_processes_have_one_thread_each_and_tell_what_failed():
    with workers(2) as work:
        failures = dict(work(light_jobs.refuse, [("one",), ("two",)]))
        threads = dict(work(light_jobs.threads_of_a_process, [()] * 2))
    assert failures == {0: "one: refused", 1: "two: refused"}
    assert set(threads.values()) == {"1"}


@pytest.mark.parametrize("shown", [None, False, True])
def test_processes_show_other_libraries_messages_as_the_command_does(capfd, shown):
    """A logger that the job makes; without a command a program of one's own decides."""
    command = nullcontext() if shown is None else kept_apart(shown=shown)
    with command as log, workers(2) as work:
        assert dict(work(light_jobs.warn, [("bits",), ("fastpo.bits",)])) == {0: None, 1: None}
    told_ = capfd.readouterr().err
    assert ("warning of bits" in told_) == (shown is not False)
    assert "warning of fastpo.bits" in told_
    assert log is None or log.waiting == 1, "the other one's is ours"
