"""The command line as a user meets it: each mistake gets one clear line and exit code 2."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from fastpo.cli import main
from fastpo.config import load_config
from fastpo.errors import ConfigError
from fastpo.report.runs import load_run
from fastpo.system.trackers import check_trackers
from fastpo.train import train


def call(capsys, *arguments):
    """Runs the command in this process; returns its exit code and what it wrote."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return stopped.value.code, out.out + out.err


def complaint(capsys, *arguments):
    code, text = call(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in text
    assert text.count("error:") == 1
    return " ".join(text.split())


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate"])
def test_a_mistyped_key_is_named_with_the_nearest_valid_one(capsys, experiment, command):
    path = experiment()
    text = complaint(capsys, command, path, "--set", "train.objective.betta=3")
    assert "unknown key train.objective.betta; did you mean train.objective.beta?" in text


def test_a_missing_configuration_is_named(capsys, tmp_path):
    assert "config file not found" in complaint(capsys, "train", tmp_path / "none.yaml")


def test_training_before_preparing_says_what_to_do(capsys, experiment, tmp_path):
    text = complaint(capsys, "train", experiment(), "--set", f"prepare.cache_dir={tmp_path / 'x'}")
    assert "fastpo prepare" in text
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_resolution_is_refused_by_name(capsys, experiment):
    text = complaint(capsys, "train", experiment(), "--set", "prepare.resolution=48")
    assert "resolution" in text


@pytest.mark.parametrize("path", ["no/such/folder", "/nowhere", "~nobody-of-that-name/x"])
@pytest.mark.parametrize("key", ["model.path", "data.path"])
def test_a_missing_model_or_data_set_is_named(capsys, experiment, key, path):
    assert path in complaint(capsys, "prepare", experiment(), "--set", f"{key}={path}")


def data_folder(tmp_path, text):
    folder = tmp_path / "bad-data"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "a", "winner": "w.png"}\n', "loser"),
        ("not json\n", "pairs.jsonl"),
        ("", "holds no labeled pair"),
    ],
)
def test_bad_data_is_named_and_leaves_no_cache(capsys, experiment, tmp_path, text, expected):
    folder = data_folder(tmp_path, text)
    cache = tmp_path / "cache"
    said = complaint(
        capsys,
        "prepare",
        experiment(),
        *("--set", f"data.path={folder}", "--set", f"prepare.cache_dir={cache}"),
    )
    assert expected in said
    assert not (cache.exists() and list(cache.rglob("*.safetensors")))


def test_evaluating_before_training_says_what_to_do(capsys, experiment):
    assert "train" in complaint(
        capsys, "evaluate", experiment(), "--set", "evaluate.scorers=[clip:/nowhere]"
    )


def test_reporting_on_a_folder_that_is_no_run(capsys, tmp_path):
    text = complaint(capsys, "report", tmp_path, "--out", tmp_path / "out")
    assert str(tmp_path) in text
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_run_in_the_folder_is_not_overwritten_unasked(capsys, experiment, read_metrics):
    path = experiment()
    train(load_config(path), progress=False)
    before = read_metrics(path.parent / "run")
    assert "--resume" in complaint(capsys, "train", path)
    assert read_metrics(path.parent / "run") == before


def test_debug_shows_where_an_error_came_from(fastpo, tmp_path):
    done = fastpo("train", tmp_path / "none.yaml", "--debug", check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_is_an_option_of_every_command(tmp_path, place):
    arguments = ["train", str(tmp_path / "none.yaml")]
    with pytest.raises(ConfigError, match="config file not found"):
        main([*arguments[:place], "--debug", *arguments[place:]])


@pytest.mark.parametrize("given", [["--utilisation", "0.5"], ["--utilisation=0.5"]])
def test_the_old_spelling_of_an_option_is_accepted_with_a_warning(
    capsys, experiment, monkeypatch, given
):
    """Until the planner is asked: it gets the value under the new name."""
    import fastpo.plan

    asked = {}
    monkeypatch.setattr(fastpo.plan, "make_plan", lambda config, **options: asked.update(options))
    monkeypatch.setattr(fastpo.plan, "print_plan", lambda *_: None)
    main_exit, text = call(capsys, "plan", experiment(), *given)
    assert main_exit == 0
    assert asked["utilization"] == 0.5
    assert "warning: --utilisation is now --utilization" in text


def test_the_banner_states_what_is_about_to_run(capsys, experiment, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, told = call(capsys, "train", experiment())
    assert code == 0
    for text in (
        "dpo",
        "slope",
        "--beta_dpo 1000",
        "0.6931",
        "11",
        "2 pairs",
        "fp32",
        "cpu",
        "KiB",
    ):
        assert text in told, text


@pytest.mark.parametrize("asked", [True, False])
def test_a_launcher_that_starts_one_process_of_several_is_warned_of(
    capsys, experiment, monkeypatch, asked
):
    """`accelerate launch --cpu --num_processes 2` sets these, and starts one."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    if asked:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29500")
    code, told = call(capsys, "train", experiment(max_steps=1))
    assert code == 0
    assert ("asked for several processes and started one; use torchrun" in told) == asked


LAUNCHERS = {
    "fastpo": ("-m", "fastpo", "train"),
    "python -m": ("-m", "fastpo.train"),
    "accelerate": (
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "fastpo.train"),
    ),
}


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(words, id=name, marks=[] if name == "python -m" else [pytest.mark.long])
        for name, words in LAUNCHERS.items()
    ],
)
def test_every_launcher_trains_and_saves_the_resolved_configuration(experiment, fastpo, launcher):
    path = experiment()
    fastpo(path, "--set", "train.optim.lr=2e-4", launcher=launcher)
    saved = yaml.safe_load((path.parent / "run" / "config.yaml").read_text())
    assert saved["train"]["optim"]["lr"] == 2e-4
    state = path.parent / "run" / "checkpoints" / "step-00000004" / "state.json"
    assert json.loads(state.read_text())["config"] == saved


def test_tensorboard_gets_the_metrics(experiment):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = experiment()
    train(load_config(path, ["train.trackers=[tensorboard]"]), progress=False)
    events = list((path.parent / "run").rglob("events.out.tfevents.*"))
    read = EventAccumulator(str(events[0].parent))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4]


def test_a_tracker_that_is_not_installed_is_named(capsys, experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    text = complaint(capsys, "train", experiment(), "--set", "train.trackers=[wandb]")
    assert "pip install wandb" in text


class Wandb(ModuleType):
    """wandb as it is without a key: only its own `init` would ask for one."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.api = SimpleNamespace(api_key=None)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wandb_without_a_key_is_named_before_a_run_is_replaced_or_pairs_are_encoded(
    capsys, experiment, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    path = experiment(max_steps=1)
    folder = train(load_config(path), progress=False)
    before = files_of(folder)
    tracked = ("--set", "train.trackers=wandb")
    assert "wandb login" in complaint(capsys, "train", path, "--overwrite", *tracked)
    assert files_of(folder) == before
    cache = ("--set", f"prepare.cache_dir={tmp_path / 'new'}")
    assert "WANDB_MODE=offline" in complaint(capsys, "prepare", path, *tracked, *cache)
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_a_tracker_that_does_not_start_is_named_and_the_earlier_run_is_kept(
    capsys, experiment, monkeypatch
):
    from accelerate.tracking import TensorBoardTracker

    def start(self):
        raise RuntimeError("no\nconnection")

    path = experiment(max_steps=1)
    folder = train(load_config(path), progress=False)
    before = files_of(folder)
    monkeypatch.setattr(TensorBoardTracker, "start", start)
    text = complaint(capsys, "train", path, "--overwrite", "--set", "train.trackers=tensorboard")
    assert "train.trackers: not all of tensorboard could be started (no connection)" in text
    assert files_of(folder) == before


def test_fp16_without_a_gpu_is_refused_with_a_way_out(capsys, experiment):
    import torch

    if torch.cuda.is_available():
        pytest.skip("fp16 trains on this machine")
    text = complaint(capsys, "train", experiment(), "--set", "train.precision=fp16")
    assert "bf16 or fp32" in text


def test_version(fastpo):
    from fastpo import __version__

    assert fastpo("--version").stdout.strip() == __version__


def test_resuming_without_a_checkpoint_says_that_the_run_begins(capsys, experiment):
    code, text = call(capsys, "train", experiment(max_steps=1), "--resume")
    assert code == 0
    assert "run has no checkpoint, the run begins at step 1" in " ".join(text.split())
    assert "begins" not in call(capsys, "train", experiment(max_steps=1), "--resume")[1]


def test_loading_shows_no_bars_of_other_libraries(capsys, experiment, monkeypatch):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        monkeypatch.setattr(library, "_tqdm_active", True)
    prompts = ("--set", "evaluate.prompts=a cat", "--set", "evaluate.seeds_per_prompt=1")
    train(load_config(experiment(max_steps=1)), progress=False)
    code, text = call(capsys, "evaluate", experiment(max_steps=1), *prompts)
    assert code == 0
    assert "sample aligned" in text
    assert "Loading" not in text
    assert transformers_logging.is_progress_bar_enabled()


def test_a_checkpoint_an_average_and_an_unfinished_run_are_evaluated(capsys, experiment):
    """By their own weights: the newest checkpoint's are those that the run exports."""
    path = experiment(ema_decay=0.5)
    folder = train(load_config(path), progress=False)
    few = ("prompts=a cat", "seeds_per_prompt=1", "num_inference_steps=1")
    options = [part for key in few for part in ("--set", f"evaluate.{key}")]

    def evaluated(*arguments):
        assert call(capsys, "evaluate", path, *options, *arguments)[0] == 0
        about = json.loads((folder / "evaluation" / "samples.json").read_text())
        return about["fingerprints"]["aligned"], about["aligned"]["step"]

    first = folder / "checkpoints" / "step-00000002"
    final, average = evaluated(), evaluated("--average")
    assert final[1] == average[1] == 4
    assert evaluated("--weights", folder / "ema") == average
    middle = evaluated("--weights", first)
    assert middle[1] == 2
    assert evaluated("--weights", first, "--average")[1] == 2
    assert load_run(folder).stale == "step 2"
    (folder / "final").rename(folder.parent / "away")  # as if the run had not come to its end
    assert evaluated("--weights", folder) == final
    assert len({final[0], average[0], middle[0]}) == 3
    assert "by --weights" in complaint(capsys, "evaluate", path, *options)
    text = complaint(capsys, "evaluate", path, *options, "--average", "--weights", folder / "ema")
    assert "--average is for a run or a checkpoint" in text
