"""How processes of a run compare what they were started with."""

import shutil

import pytest

from fastpo.config import load_config
from fastpo.models.folder import ModelFolder
from fastpo.train.agreement import differences, model_sample, named_ranks


def test_what_differs_is_named_with_all_values():
    values = [{"seed": "7", "lr": "1e-05"}] * 2 + [{"seed": "8", "lr": "1e-05"}] * 2
    assert differences(values) == ["seed is 7 on ranks 0-1, 8 on ranks 2-3"]
    assert differences(values[:2]) == []
    values = [{"seed": "7"}, {"seed": "7", "new": "1"}]
    assert differences(values) == ["new is not set on rank 0, 1 on rank 1"]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2, 4], "ranks 0, 2, 4")],
)
def test_ranks_are_named_in_short(ranks, text):
    assert named_ranks(ranks) == text


def test_a_copy_of_a_model_is_the_same_and_a_changed_weight_is_not(experiment, tmp_path):
    model = ModelFolder.resolve(load_config(experiment()).model)
    copied = ModelFolder(shutil.copytree(model.path, tmp_path / "copy"))
    assert model_sample(copied) == model_sample(model)
    (weights,) = copied.component(copied.family.denoiser).glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert model_sample(copied) != model_sample(model)
