"""Texts in the cache at their true length: what is read is what was encoded, padding included."""

import json

import pytest
import torch

from fastpo.config import parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.checks import ROWS
from fastpo.data.cache.parts import rows_writer, tensor_writer
from fastpo.data.cache.tensors import TensorFiles, header_of
from fastpo.data.cache.texts import TextRows, true_lengths, without_padding
from fastpo.data.prepare import prepare
from fastpo.errors import CacheError
from fastpo.models.encoders import Encoders
from fastpo.testing import write_folder
from fastpo.testing.flow import tiny_sana_folder

FILE = "text-00000/text.safetensors"


def write(folder, conditions):
    part = folder / "text-00000"
    part.mkdir(parents=True)
    tensors = without_padding(conditions)
    tensor_writer(tensors)(folder / FILE)
    rows_writer("text.safetensors", tensors)(part / ROWS)
    return tensors


def texts(lengths, length=16, width=3):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(len(lengths), length, width, generator=g)
    for row, own in enumerate(lengths):
        states[row, own:] = 0.0
    return states


def test_padding_of_zeros_is_left_out_and_made_again(tmp_path):
    states, pooled = texts([2, 5, 16, 1]), torch.randn(4, 7)
    tensors = write(tmp_path, {"states": states, "pooled": pooled})
    assert sum(t.numel() for t in tensors.values()) == 3 * (2 + 5 + 16 + 1) + 4 * 7
    rows = TextRows(TensorFiles(tmp_path))
    for slots in ([0], [3, 1], [2, 0, 1, 3]):
        found = rows.read([(FILE, slot) for slot in slots])
        assert found.keys() == {"states", "pooled"}
        assert torch.equal(found["states"], states[slots])
        assert torch.equal(found["pooled"], pooled[slots])


def test_what_is_hardly_shortened_stays_one_tensor(tmp_path):
    states = texts([15, 16, 14])
    assert write(tmp_path, {"states": states}).keys() == {"states"}


def test_prompts_of_parts_that_are_stored_otherwise_share_a_batch(tmp_path):
    short, long = texts([2, 3]), texts([16, 15])
    write(tmp_path / "a", {"states": short})
    write(tmp_path / "b", {"states": long})
    places = [(f"b/{FILE}", 0), (f"a/{FILE}", 1), (f"b/{FILE}", 1)]
    found = TextRows(TensorFiles(tmp_path)).read(places)["states"]
    assert torch.equal(found, torch.stack([long[0], short[1], long[1]]))


def test_a_header_with_an_entry_for_each_of_many_prompts_is_read(tmp_path):
    name, count = "states_" * 30, 4_000
    states = texts([1] * count, length=2, width=1)
    write(tmp_path, {name: states})
    assert len(header_of(tmp_path / FILE)) > 1 << 20
    found = TextRows(TensorFiles(tmp_path)).read([(FILE, count - 1), (FILE, 0)])
    assert torch.equal(found[name], states[[count - 1, 0]])


def test_zeros_between_tokens_are_tokens():
    states = texts([4, 4])
    states[0, 1] = 0.0
    states[1] = 0.0  # a text of nothing keeps a token, so that there is something to read
    assert true_lengths(states).tolist() == [4, 1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("sana")
    write_folder(root / "data", 3, sizes=((32, 32),))
    raw = {
        "model": {"path": str(tiny_sana_folder(root / "model"))},
        "data": {"source": "folder", "path": str(root / "data")},
        "prepare": {"cache_dir": str(root / "cache"), "resolution": 32, "store_precision": "fp32"},
        "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
    }
    config = parse_config(raw)
    prepare(config, progress=False)
    return config


def test_a_cache_gives_what_the_encoders_give(config):
    cache = PairCache.open(config, verify=True)
    batch = cache.read([0, 1, 2], 0)
    prompts = [cache.prompts[number] for number in cache.prompt_index.tolist()]
    for name, expected in Encoders.load(config, device="cpu").encode_prompts(prompts).items():
        torch.testing.assert_close(batch.conditions[name], expected)
    stored = (config.prepare.cache_dir / FILE).stat().st_size
    padded = sum(t.numel() * t.element_size() for t in cache.empty_prompt().values())
    assert stored < 0.5 * padded * len(cache.prompts)


def test_text_encoders_leave_the_device_while_images_are_encoded(config, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(Encoders, "place_texts", lambda self, device: moved.append(str(device)))
    kept = config.prepare.model_copy(update={"cache_dir": tmp_path, "shard_size": 2})
    monkeypatch.setattr("fastpo.system.process.Rank.device", lambda self: torch.device("cpu", 0))
    prepare(config.model_copy(update={"prepare": kept}), progress=False)
    assert moved == ["cpu:0", "cpu:0", "cpu", "cpu"], "two parts of prompts, then two of pairs"


def test_a_wrong_byte_of_a_short_text_is_found(config):
    path = config.prepare.cache_dir / FILE
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    try:
        with pytest.raises(CacheError, match="is damaged"):
            PairCache.open(config).read([0, 1, 2], 0)
    finally:
        raw[-9] ^= 1
        path.write_bytes(raw)
    assert json.loads(path.with_name(ROWS).read_text())
