"""A run goes on with what was asked to change, which is noted and kept, and with nothing else."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastpo.config import load_config, parse_config
from fastpo.errors import CheckpointError, ConfigError, NonFiniteWeightsError
from fastpo.train import Observer, train
from fastpo.train.changes import Change, differing_keys, resumed_config
from fastpo.train.checkpoint import _load_schedule
from fastpo.train.optimizer import setup_schedule
from tests.conftest import raw_config, read_metrics


class StopAfter(Observer):
    def __init__(self, step):
        self.last = step

    def on_step(self, step, table, metrics):
        if step == self.last:
            raise KeyboardInterrupt


class SetRate(Observer):
    """Another rate from a step on, set in the schedule by hand."""

    def __init__(self, step, rate):
        self.step, self.rate = step, rate

    def on_start(self, trainer, start):
        self.schedule = trainer.state.schedule

    def on_step(self, step, table, metrics):
        if step == self.step:
            self.schedule.base_lrs = [self.rate]
            self.schedule._last_lr = [self.rate]
            self.schedule.optimizer.param_groups[0]["lr"] = self.rate


@pytest.fixture(scope="module")
def half(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """`half(folder, *overrides)`: the configuration of a copy of a run that was ended at step 2."""
    base = tmp_path_factory.mktemp("half")
    raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches, base / "run")
    path = base / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(KeyboardInterrupt):
        train(load_config(path), progress=False, observers=[StopAfter(2)])

    def copy(folder, *overrides):
        if not folder.exists():
            shutil.copytree(base / "run", folder)
        return load_config(path, [f"train.output_dir={folder}", *overrides])

    return copy


def rates(folder):
    return [line["lr"] for line in read_metrics(folder)]


def test_a_changed_rate_holds_from_the_checkpoint_on_and_after_later_resumes(
    half, tmp_path, capsys
):
    """The run is ended between the change and a checkpoint, where `run.json` alone has it."""
    whole = half(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    train(whole, progress=False, observers=[SetRate(2, 2e-3)])
    config, folder = half(tmp_path / "run"), tmp_path / "run"
    change = ["train.optim.lr=2e-3"]
    with pytest.raises(KeyboardInterrupt):
        train(config, resume=True, changes=change, progress=False, observers=[StopAfter(3)])
    assert "train.optim.lr: 0.001 up to step 2, 0.002 from there on" in capsys.readouterr().out
    train(config, resume=True, progress=False)
    told = capsys.readouterr().out
    assert "train.optim.lr is 0.002, as --change has set it at step 2" in told
    assert rates(folder) == [1e-3, 1e-3, 2e-3, 2e-3]
    assert read_metrics(folder) == read_metrics(tmp_path / "whole")
    file = "checkpoints/step-00000004/trainable.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("run", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    record = json.loads((folder / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 2, 2]
    [noted] = record["changes"]
    assert {k: noted[k] for k in ("key", "before", "after", "step")} == {
        "key": "train.optim.lr",
        "before": 1e-3,
        "after": 2e-3,
        "step": 2,
    }
    saved = json.loads((folder / "checkpoints/step-00000004/state.json").read_text())
    assert saved["changes"] == [noted]
    (folder / "run.json").unlink()  # the checkpoint has it too
    train(half(folder, "train.max_steps=5"), resume=True, progress=False)
    assert rates(folder)[4] == 2e-3
    other = half(folder, "train.max_steps=6", "train.optim.lr=7e-3")
    with pytest.raises(CheckpointError, match=r"lr: 0\.002 there, 0\.007 here; .*--change"):
        train(other, resume=True, progress=False)


def test_a_run_short_of_memory_goes_on_with_checkpointing_to_the_same_result(half, tmp_path):
    other = "train.gradient_checkpointing=offload"
    for folder, overrides in (("whole", ()), ("less", (other,))):
        train(half(tmp_path / folder, *overrides), resume=True, progress=False)
    file = "checkpoints/step-00000004/trainable.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("whole", "less"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert read_metrics(tmp_path / "less") == read_metrics(tmp_path / "whole")


def test_checkpointing_may_be_changed_where_sums_then_round_otherwise():
    config = configuration(max_steps=2, backward="sampled")
    saved, key = config.model_dump(mode="json"), "train.gradient_checkpointing"
    new, made = resumed_config(
        config, saved, (), [f"{key}=offload"], step=1, tell=lambda line: None
    )
    assert new.train.gradient_checkpointing == "offload"
    assert [change.key for change in made] == [key]
    assert differing_keys(saved, new, same=[key]) == []


@pytest.mark.parametrize("option", [{"backward": "alive"}, {"backward": "sampled"}, {"compile": 1}])
def test_checkpointing_stays_where_it_would_change_how_sums_round(option):
    config = configuration(max_steps=2, gradient_checkpointing=True, **option)
    saved = config.model_dump(mode="json")
    saved["train"]["gradient_checkpointing"] = False
    told = ["train.gradient_checkpointing: False there, True here"]
    assert differing_keys(saved, config) == told


def test_what_may_not_be_changed_is_refused_by_name(half, tmp_path):
    config = half(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.objective\.beta cannot be changed within a run"):
        train(config, resume=True, changes=["train.objective.beta=9"], progress=False)
    with pytest.raises(ConfigError, match=r"lr=1 is for --resume"):
        train(config, changes=["train.optim.lr=1"], progress=False)
    with pytest.raises(ConfigError, match=r"--change .*lr=-1: train\.optim\.lr"):
        train(config, resume=True, changes=["train.optim.lr=-1"], progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from with --change"):
        train(config, resume=True, changes=["train.optim.lr=1"], progress=False)


def test_models_and_data_are_known_by_their_content(half, tiny_data, light_pipelines, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(light_pipelines["sd15"], tmp_path / "model")
    moved = [f"data.path={tmp_path / 'data'}", f"model.path={tmp_path / 'model'}"]
    config = half(tmp_path / "run", *moved)
    train(config, resume=True, progress=False)
    assert len(rates(tmp_path / "run")) == 4
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    longer = half(tmp_path / "run", *moved, "train.max_steps=5")
    with pytest.raises(CheckpointError, match=r"trained from other weights than .*model holds now"):
        train(longer, resume=True, progress=False)


def test_a_run_says_what_it_was_made_with(half, tmp_path):
    half(tmp_path / "run")
    [start] = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__
    assert start["processes"] == 1 and start["step"] == 0
    for key in ("command", "folder", "host", "device", "cache", "model", "when"):
        assert start[key], key


class Ruin(Observer):
    """Makes a weight, or its average, infinite in the update of a step (from 1)."""

    def __init__(self, step, *, average):
        self.step, self.average, self.done = step, average, 0

    def on_start(self, trainer, start):
        self.state = trainer.state
        self.state.schedule.optimizer.register_step_post_hook(self.ruin)

    def ruin(self, *_):
        self.done += 1
        if self.done == self.step:
            averages = self.state.averages["export"].shadows[0] if self.average else None
            tensor = averages[0] if averages else next(iter(self.state.trainable.values()))
            tensor.data.view(-1)[-1] = torch.inf


@pytest.mark.parametrize("average", [False, True], ids=["weight", "average"])
def test_weights_that_are_not_finite_are_not_saved(half, tmp_path, average):
    """In the last update, after which no loss is computed."""
    config = half(tmp_path / "run", "train.ema_decay=0.5")
    shutil.rmtree(tmp_path / "run")
    named = r"the average \(export\) 0\.\S*lora" if average else r"the weight \S*lora"
    with pytest.raises(NonFiniteWeightsError, match=named) as error:
        train(config, progress=False, observers=[Ruin(4, average=average)])
    assert "step-00000002" in str(error.value)
    assert "--resume --change train.optim.lr=0.0005" in str(error.value)
    assert not (tmp_path / "run" / "final").exists()
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


def configuration(**train):
    return parse_config(
        {
            "model": {"path": "model"},
            "data": {"source": "folder", "path": "data"},
            "prepare": {"cache_dir": "cache"},
            "train": {"output_dir": "run", "objective": {"name": "sft"}, **train},
        }
    )


def test_epochs_may_be_changed_to_steps_and_the_old_configuration_keeps_it():
    config = configuration(epochs=2, optim={"schedule": "cosine"})
    saved = config.model_dump(mode="json")
    told = []
    new, made = resumed_config(config, saved, (), ["train.max_steps=9"], step=4, tell=told.append)
    assert (new.train.epochs, new.train.max_steps) == (None, 9)
    assert {change.key for change in made} == {"train.epochs", "train.max_steps"}
    assert told == []
    again, kept = resumed_config(config, saved, made, (), step=4, tell=told.append)
    assert again == new and kept == made
    assert len(told) == 2
    assert resumed_config(new, saved, made, (), step=4, tell=told.append) == (new, made)


def test_a_key_changed_twice_is_kept_for_either_older_configuration():
    changes = [
        Change(key="train.optim.lr", before=a, after=b, step=s, when="now", version="1")
        for s, a, b in ((1, 1e-5, 1e-6), (2, 1e-6, 1e-7))
    ]
    for rate in (1e-5, 1e-6, 1e-7):
        config = configuration(epochs=2, optim={"lr": rate})
        saved = config.model_dump(mode="json")
        new, _ = resumed_config(config, saved, changes, (), step=3, tell=lambda line: None)
        assert new.train.optim.lr == 1e-7


@pytest.mark.parametrize("before", ["constant", "linear"])
def test_rate_and_curve_are_those_of_the_configuration(before):
    def make(name, rate, steps):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        optim = configuration(epochs=1, optim={"schedule": name, "lr": rate}).train.optim
        return setup_schedule(optimizer, optim, steps)

    old = make(before, 1.0, 10)
    for _ in range(3):
        old.optimizer.step()
        old.step()
    same = make(before, 1.0, 10)
    _load_schedule(same, old.state_dict())
    assert same.state_dict() == old.state_dict()
    assert same.optimizer.param_groups == old.optimizer.param_groups
    new = make("linear", 0.5, 6)
    _load_schedule(new, old.state_dict())
    assert new.get_last_lr() == [0.25] and new.optimizer.param_groups[0]["lr"] == 0.25
    new.optimizer.step()
    new.step()
    assert new.get_last_lr()[0] == pytest.approx(0.5 * 2 / 6)
