"""What the README shows runs as it stands there, on tiny models: commands and snippets."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo.cli import main
from fastpo.testing import pickapic_row, tiny_clip_folder, write_pickapic

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.search(r"```\n(fastpo plan .*?)```", README, re.DOTALL)[1].splitlines()
CONFIG = re.search(r"The same file in short:\n\n```yaml\n(.*?)```", README, re.DOTALL)[1]
SHIPPED = "fastpo/configs/sdxl-lora-24gb.yaml"


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def small(light_pipelines, tmp_path_factory):
    """The overrides that put tiny models and eight pairs into the README's configuration."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [pickapic_row(number, label_0=float(number % 2)) for number in range(8)]
    write_pickapic(folder / "data" / "train-00000.parquet", rows)
    clip = tiny_clip_folder(folder / "clip")
    changes = {
        "model.path": light_pipelines["sdxl"],
        "model.variant": "null",
        "data.path": folder / "data",
        "prepare.resolution": 32,
        "train.epochs": "null",
        "train.max_steps": 2,
        "train.accumulation_steps": 2,
        "train.trackers": "[]",
        "evaluate.num_inference_steps": 2,
        "evaluate.seeds_per_prompt": 1,
        "evaluate.scorers": f"[pickscore:{clip}]",
    }
    if "vae:" in (ROOT / SHIPPED).read_text():
        changes["model.vae"] = "null"
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("config", ["shipped", "in short"])
def test_the_six_commands_run_in_their_order(small, config, tmp_path, monkeypatch, capsys):
    path = tmp_path / SHIPPED
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / SHIPPED).read_text() if config == "shipped" else CONFIG)
    (tmp_path / "prompts.txt").write_text("a castle in the fog\n")
    monkeypatch.chdir(tmp_path)
    assert [line.split()[1] for line in COMMANDS] == [
        *("plan", "prepare", "prepare", "train", "evaluate", "report")
    ]
    for line in COMMANDS:
        words = shlex.split(line, comments=True)[1:]
        call(*words, *(() if words[0] == "report" else small))
    told = capsys.readouterr().out
    assert "8 pairs in" in told
    page = (tmp_path / "report" / "report.html").read_text()
    assert "pickscore" in page
    assert list((tmp_path / "runs" / "sdxl-lora-24gb" / "final").glob("*.safetensors"))


class Operators(TorchDispatchMode):
    """Counts operators that compute something; views do not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "split" not in func.name()
        return func(*args, **(kwargs or {}))


def test_the_losses_before_and_after_are_equal():
    text = re.search(r"```python\n(# before.*?)```", README, re.DOTALL)[1]
    before, after = text.split("# after")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    pred, ref_pred = (
        (noise.repeat(2, 1, 1, 1) + s * torch.randn(8, 4, 8, 8, generator=generator)).bfloat16()
        for s in (0.1, 0.1)
    )
    noise = noise.bfloat16()
    names = {
        "F": F,
        "pred": pred.requires_grad_(),
        "ref_pred": ref_pred,
        "target": noise.repeat(2, 1, 1, 1),
        "noise": noise,
    }
    with torch.no_grad(), Operators() as counted:
        exec(before, dict(names))
    assert counted.count == 17 and "seventeen operators" in before
    exec(before, names)
    names["loss"].backward()
    theirs, gradient = names["loss"].detach(), pred.grad.clone()
    pred.grad = None
    exec("# after" + after, names)
    torch.testing.assert_close(names["out"].loss.detach(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pred.grad, gradient, rtol=2e-2, atol=1e-6)
