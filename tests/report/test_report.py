"""The page over fabricated run folders."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastpo.config import dump_config, parse_config
from fastpo.errors import DataError
from fastpo.evaluate.win_rate import NOTES, compare_scores
from fastpo.models.export import export_fingerprint
from fastpo.report import load_metrics, minority_auroc, write_report
from fastpo.report.figures import PANELS, _draw_minority, curve_panels, smooth, to_png
from fastpo.report.grids import choose_samples
from fastpo.report.page import config_differences, format_number, format_signed, headline
from fastpo.report.runs import load_run, load_runs

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def make_run(path: Path, *, steps: int = 60, **objective: float | str) -> Path:
    """Writes what training leaves: configuration and metrics."""
    path.mkdir(parents=True)
    config = parse_config(
        {
            "model": {"path": "base"},
            "data": {"source": "folder", "path": "<pairs>"},
            "prepare": {"cache_dir": "cache"},
            "train": {
                "output_dir": str(path),
                "objective": {"name": "dpo", **objective},
                "max_steps": steps,
            },
        }
    )
    (path / "config.yaml").write_text(dump_config(config))
    lines = [
        {
            "step": s,
            "loss": 0.7 - s / 1000,
            "rewards/margins": s / 1e4,
            "lr": 1e-5,
            "grad_norm": 1.0,
        }
        | ({"weight/mean": 0.5} if s > 2 else {})
        for s in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def add_minority(run: Path, rows: list[tuple[int, int, float, float | str]]) -> None:
    """Writes (flipped, visits, ledger's metric, annotators' metric) rows."""
    with (run / "minority.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["flipped", "visits", "ledger_mean", "ledger_minority", "metric_minority"]
        writer.writerow(["pair_id", *names])
        writer.writerows([f"p{i}", f, v, 0.0, u, m] for i, (f, v, u, m) in enumerate(rows))


def add_evaluation(run: Path, gain: float, *, side: int = 8, legible: float = 0.0) -> None:
    """Writes an evaluation of three prompts with two seeds each."""
    folder = run / "evaluation"
    rng = np.random.default_rng(0)
    samples, rows = [], []
    for i in range(6):
        sample = {"prompt_index": i // 2, "prompt": f"prompt <{i // 2}>", "seed": i}
        for model in ("base", "aligned"):
            (folder / model).mkdir(parents=True, exist_ok=True)
            sample[model] = f"{model}/{i}.png"
            pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / sample[model])
            lift = model == "aligned"
            score = [20.5 + i / 10 + gain * lift, 1.0 + legible * lift * (1 + i // 2)]
            rows.append([model, sample["prompt_index"], i, sample["prompt"], *score])
        samples.append(sample)
    names = ["pickscore", "legible"]
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "prompt_index", "seed", "prompt", *names])
        writer.writerows(rows)
    groups = [s["prompt_index"] for s in samples]
    metrics = {
        name: asdict(compare_scores([r[k] for r in rows[::2]], [r[k] for r in rows[1::2]], groups))
        for k, name in enumerate(names, 4)
    }
    about = {"settings": {}, "fingerprints": {"base": "b", "aligned": "a"}, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(about))
    summary = {"primary": "pickscore", "prompts": 3, "comparisons": 6, "confidence": 0.95}
    (folder / "summary.json").write_text(
        json.dumps({**summary, "metrics": metrics, "notes": NOTES})
    )


def embedded(page: Path) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, evaluated and with flipped labels, on one page."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = make_run(folder / "plain"), make_run(folder / "adaptive", beta=1000.0)
    rows = [(1, 3, 0.9, 0.8), (1, 3, 0.4, 0.2), (0, 3, 0.5, 0.4), (0, 3, 0.1, 0.1)]
    add_minority(first, [(*row[:3], "") for row in rows])
    add_minority(second, rows)
    add_evaluation(first, 0.25)
    add_evaluation(second, 1.5, legible=-0.1)
    extra = {"Method": "One.\n\n<b>Two</b>.", "Seeds": [{"run": "x", "gain": 0.123456}]}
    return write_report([first, second], folder / "out", title="Pages & runs", extra=extra)


def test_page_shows_the_numbers(page: Path) -> None:
    text = page.read_text()
    for expected in (
        "Pages &amp; runs",
        "Best of 2: adaptive. pickscore goes from 20.75 to 22.25 (+1.5) and wins 100% of 6",
        "20.75 → <strong>21</strong>",
        "+0.25",
        f"61{DASH}100 %",
        f"legible falls from 1 to 0.8 (interval of the change {MINUS}0.3 to {MINUS}0.1)",
        "2 of 4 labels flipped. ledger: AUROC 0.750; moving averages: AUROC 0.750.",
        "<td>train.objective.beta</td><td>2500</td><td>1000</td>",
        "<p>&lt;b&gt;Two&lt;/b&gt;.</p>",
        "<td>0.1235</td>",
        "resamples of whole prompts",
        "path: &lt;pairs&gt;",
        "prompt &lt;2&gt;",
    ):
        assert expected in text


def test_page_is_complete_in_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text
    assert "<script" not in text and "@import" not in text
    images = embedded(page)
    small = [image for image in images if image.size == (8, 8)]
    assert len(small) == 18  # six samples of base, plain and adaptive
    original = page.parents[1] / "plain" / "evaluation" / "aligned" / "0.png"
    assert any((np.asarray(i) == np.asarray(Image.open(original))).all() for i in small)
    assert "images pixel" in text


def test_figures_lie_beside_the_page(page: Path) -> None:
    names = {path.name for path in page.parent.iterdir()} - {".fastpo"}
    per_run = {
        f"{kind}-{run}.png" for kind in ("grid", "minority") for run in ("plain", "adaptive")
    }
    assert names == {"report.html", "curves.png", "roc.png"} | per_run


def test_training_only_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n')
    page = write_report([run], tmp_path / "out", title="T")
    again = page.read_bytes()
    text = page.read_text()
    assert "Not evaluated yet" in text and "No images yet" in text
    assert "not evaluated yet" not in text  # no column to say it in
    assert "no minority.csv" in text
    add_minority(run, [(0, 2, 0.1, ""), (0, 0, 0.0, "")])
    text = write_report([run], tmp_path / "out", title="T").read_text()
    assert "no label was flipped on purpose" in text
    assert not (tmp_path / "out" / "roc.png").exists()
    (run / "minority.csv").unlink()
    assert write_report([run], tmp_path / "out", title="T").read_bytes() == again


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "No training metrics" in write_report([run], tmp_path / "out", title="T").read_text()


def test_large_images_are_reduced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    add_evaluation(run, 0.0, side=300)
    page = write_report([run], tmp_path / "out", title="T")
    assert {i.size for i in embedded(page) if i.size[0] == i.size[1]} == {(288, 288)}
    assert "no clear difference from the base" in page.read_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no run of FastPO: there is no such folder"):
        write_report([tmp_path / "none"], tmp_path / "out", title="T")
    with pytest.raises(DataError, match=r"it is without config\.yaml and metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "out", title="T")
    with pytest.raises(DataError, match="at least one run"):
        write_report([], tmp_path / "out", title="T")
    run = make_run(tmp_path / "run")
    add_evaluation(run, 1.0)
    (run / "evaluation" / "aligned" / "0.png").unlink()
    with pytest.raises(DataError, match="evaluate again"):
        write_report([run], tmp_path / "out", title="T")
    (run / "evaluation" / "samples.json").write_text("{}")
    with pytest.raises(DataError, match="evaluate again"):
        load_run(run)
    assert not (tmp_path / "out").exists()


def test_metrics_fill_gaps_and_forgive_a_cut_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    metrics = load_metrics(run)
    assert metrics["step"].tolist() == [1, 2, 3]
    assert np.isnan(metrics["weight/mean"]).tolist() == [True, True, False]
    (run / "metrics.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        load_metrics(run)


def test_auroc_leaves_out_what_was_not_judged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"minority\.csv does not exist"):
        minority_auroc(run)
    add_minority(run, [(1, 2, 0.9, ""), (0, 2, 0.2, ""), (1, 0, 0.0, ""), (0, 2, 0.9, "")])
    assert minority_auroc(run) == {"ledger": 0.75}
    add_minority(run, [(1, 2, 0.9, 0.1), (0, 2, 0.2, 0.3)])
    assert minority_auroc(run) == {"ledger": 1.0, "ema": 0.0}
    add_minority(run, [(0, 2, 0.2, 0.3)])
    assert minority_auroc(run) == {}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / a / b) for a, b in (("x", "dpo"), ("y", "dpo"), ("y", "sft"))]
    runs = load_runs(paths)
    assert [run.name for run in runs] == ["x/dpo", "y/dpo", "sft"]
    assert config_differences(runs) == []


def test_headline_admits_a_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_evaluation(run, -1.0)
    assert f"({MINUS}1) and wins only 0% of 6" in headline([load_run(run)])


def describe_weights(run: Path, step: int, *, base: str = "b") -> None:
    """Notes in an evaluation which weights it is about, as `fastpo evaluate` does."""
    file = run / "evaluation" / "samples.json"
    about = json.loads(file.read_text())
    about["fingerprints"]["base"] = base
    weights = export_fingerprint(run / "final")
    about["aligned"] = {"folder": "final", "weights": weights, "step": step}
    file.write_text(json.dumps(about))


def test_scores_of_earlier_weights_say_of_which_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=8)
    (run / "final").mkdir()
    (run / "final" / "lora.safetensors").write_bytes(b"8")
    add_evaluation(run, 1.0)
    describe_weights(run, 8)
    assert load_run(run).stale is None
    assert "Evaluate again" not in write_report([run], tmp_path / "a", title="T").read_text()
    (run / "final" / "lora.safetensors").write_bytes(b"other")
    assert load_run(run).stale == "earlier weights"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "loss": 0.5}\n')
    text = write_report([run], tmp_path / "b", title="T").read_text()
    assert "(+1) (of step 8) and wins 100%" in text
    assert "scores and images are of step 8, its weights and curves of step 16." in text
    assert "scores of step 8" in text


def test_images_without_scores_are_not_called_not_evaluated(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_evaluation(run, 1.0)
    file = run / "evaluation" / "summary.json"
    summary = json.loads(file.read_text()) | {"primary": None, "metrics": {}}
    file.write_text(json.dumps(summary))
    text = write_report([run], tmp_path / "out", title="T").read_text()
    assert "Sampled, not scored" in text and "evaluate.scorers" in text
    assert "Not evaluated yet" not in text


def test_the_best_is_chosen_among_runs_that_were_evaluated_alike(tmp_path: Path) -> None:
    """Another guidance scale, or other prompts, give base images of another fingerprint."""
    runs = [make_run(tmp_path / name) for name in ("a", "b", "c")]
    for run, gain, base in zip(runs, (0.5, 0.25, 9.0), ("b", "b", "other"), strict=True):
        add_evaluation(run, gain)
        describe_weights(run, 60, base=base)
    said = headline(load_runs(runs))
    assert said.startswith("Best of 2: a. ")
    assert said.endswith("1 other run had another first scorer, other prompts or settings: not "
        "compared with it.")  # fmt: skip
    assert headline(load_runs(runs[1:])).startswith("b: pickscore goes")


def test_margins_without_a_reference_are_on_an_axis_of_their_own(tmp_path: Path) -> None:
    dpo = load_run(make_run(tmp_path / "dpo"))
    (tmp_path / "mapo").mkdir()
    text = (tmp_path / "dpo" / "config.yaml").read_text().replace("name: dpo", "name: mapo")
    (tmp_path / "mapo" / "config.yaml").write_text(text)
    (tmp_path / "mapo" / "metrics.jsonl").write_text('{"step": 1, "rewards/margins": 40.0}\n')
    mapo = load_run(tmp_path / "mapo")
    panels = [p for p in curve_panels([dpo, mapo]) if p.series == ("rewards/margins",)]
    drawn = [
        [run.name for run in (dpo, mapo) if p.column(run, p.series[0]) is not None] for p in panels
    ]
    assert drawn == [["dpo"], ["mapo"]]


def test_counts_are_plain_numbers_and_a_long_name_stays_in_its_diagram(tmp_path: Path) -> None:
    """The logarithmic axis had formulas for ticks, which were printed as they are written."""
    run = make_run(tmp_path / ("a-run-with-" + "a-long-name-" * 6 + "end"))
    add_minority(run, [(0, 3, 0.02 * (i // 9), "") for i in range(40)])
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    _draw_minority(axes, load_run(run), "ledger")
    to_png(figure)
    shown = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert "1" in shown and not any("$" in text for text in shown)
    title = axes.get_title(loc="left")
    assert title.endswith("end: ledger") and max(map(len, title.split("\n"))) <= 50


def test_samples_are_spread_over_prompts() -> None:
    def samples(prompts: int, seeds: int) -> list[dict]:
        return [{"prompt_index": p, "seed": k} for p in range(prompts) for k in range(seeds)]

    many = choose_samples(samples(50, 4))
    assert [s["prompt_index"] for s in many] == [0, 7, 14, 21, 28, 35, 42, 49]
    few = choose_samples(samples(3, 4))
    assert len(few) == 8 and [s["prompt_index"] for s in few].count(2) == 2
    assert len(choose_samples(samples(1, 2))) == 2


def test_errors_without_a_reference_get_their_own_panel(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / name, name=name)) for name in ("mapo", "ipo")]
    for run in runs:
        run.metrics["error/winner"] = np.ones(60)
    absolute, relative = (
        next(p for p in PANELS if p.reference is reference and p.series[0] == "error/winner")
        for reference in (False, True)
    )
    assert [absolute.column(run, "error/winner") is not None for run in runs] == [True, False]
    assert [relative.column(run, "error/winner") is not None for run in runs] == [False, True]
    assert {absolute, relative} <= set(curve_panels(runs))
    assert absolute not in curve_panels(runs[1:])


def test_shares_of_pairs_and_a_slope_that_moves_get_their_panels(tmp_path: Path) -> None:
    fixed, moving = (load_run(make_run(tmp_path / name)) for name in ("fixed", "moving"))
    series = ("rewards/saturated", "slope", "backward/share", "backward/effective")
    titles = [next(p.title for p in PANELS if p.series == (key,)) for key in series]
    bare = {panel.title for panel in curve_panels([fixed, moving])}
    assert not bare & set(titles)
    for key in series:
        fixed.metrics[key] = np.full(60, 0.25)
        moving.metrics[key] = np.linspace(1000.0, 500.0, 60)
    added = [panel for panel in curve_panels([fixed, moving]) if panel.title not in bare]
    assert [panel.title for panel in added] == titles
    drawn = [[panel.column(run, panel.series[0]) is not None for panel in added]
        for run in (fixed, moving)]  # fmt: skip
    assert drawn == [[True, False, True, True], [True, True, True, True]]
    moving.metrics["slope"][1:] = np.nan  # a single value has not moved
    assert titles[1] not in {panel.title for panel in curve_panels([fixed, moving])}


def test_smoothing_keeps_a_line_and_skips_gaps() -> None:
    values = np.full(200, 2.0)
    values[50] = np.nan
    np.testing.assert_allclose(smooth(values), 2.0)
    assert smooth(np.arange(10.0)) is not None and smooth(np.arange(10.0))[3] == 3.0


def test_number_formats() -> None:
    assert [format_number(x) for x in (0.123456, 22.25, 12345.6)] == ["0.1235", "22.25", "12,346"]
    assert [format_signed(x) for x in (0.5, -0.0123)] == ["+0.5", f"{MINUS}0.0123"]
