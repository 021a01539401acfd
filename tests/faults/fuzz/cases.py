"""One fuzz case of each kind of input: valid small files, one of them changed, then read.

`case(kind, seed)` gives "ok" or "refused"; any exception but FastPO's own passes through. The same
kind and seed always make the same case.
"""

import contextlib
import functools
import io
import json
import random
import shutil
import tempfile
import warnings
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml

from fastpo.config import DataConfig, load_config, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.cache.parts import parts_of
from fastpo.data.images import UnusableImageError, decode
from fastpo.data.prepare import prepare
from fastpo.data.prepare.verify_source import read_image
from fastpo.data.sources import open_source, source_digest, source_stamp
from fastpo.errors import FastPOError
from fastpo.models.folder import ModelFolder
from fastpo.reference_cache.store import (
    load_reference_manifest,
    merge_parts,
    open_reference_errors,
    reference_folder,
    write_part,
)
from fastpo.report.page import config_differences, headline, minority_words, write_report
from fastpo.report.page import warnings as falls
from fastpo.report.runs import load_run
from fastpo.testing import (
    image_bytes,
    pickapic_row,
    tiny_sd15_folder,
    write_folder,
    write_pickapic,
)
from tests.faults.fuzz.mutate import mutated, strange, wrong_bytes


def case(kind: str, seed: int) -> str:
    """Runs one case; returns "ok" or "refused"."""
    return drawn_case(kind, random.Random(f"{kind} {seed}"))


def drawn_case(kind: str, rng: random.Random) -> str:
    """Runs the case whose changes `rng` draws; returns "ok" or "refused"."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            KINDS[kind](rng)
    except (FastPOError, UnusableImageError) as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        return "refused"
    return "ok"


@functools.cache
def root() -> Path:
    """A folder of this process, where valid input is made once; gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fastpo-fuzz-"))
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    Finalize(None, remove, exitpriority=0)  # unlike `atexit`, at the end of a worker's process too
    torch.set_num_threads(1)
    return folder


@contextlib.contextmanager
def changed(path: Path, content: bytes | str):
    """Another content in a file's place, until the block ends."""
    before = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        yield
    finally:
        path.write_bytes(before)


def changed_json(path: Path, rng: random.Random) -> bytes:
    """A JSON file's content with values or bytes changed; half of the sealed ones as of before."""
    content = path.read_bytes()
    if rng.random() < 0.3:
        return wrong_bytes(content, rng)
    value = json.loads(content)
    if isinstance(value, dict) and rng.random() < 0.8:
        value.pop("checksum", None)
    return json.dumps(mutated(value, rng)).encode()


# Configuration


def _raw_config() -> dict:
    return {
        "seed": 7,
        "model": {"path": "m", "variant": "fp16"},
        "data": {"source": "folder", "path": "d", "flip_rate": 0.1, "limit": 9},
        "prepare": {"cache_dir": "c", "resolution": 32, "buckets": True},
        "train": {
            "output_dir": "o",
            "method": "lora",
            "objective": {"name": "adaptive_dpo", "beta": 500.0},
            "annotators": {"kind": "ema", "decays": [0.9, 0.5], "batched": "auto"},
            "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99]},
            "timesteps": {"kind": "bins", "weights": [1, 2]},
            "lora": {"rank": 4, "target_modules": ["to_k"]},
            "epochs": 1.5,
            "trackers": [],
        },
        "evaluate": {"prompts": ["a", "b"], "scorers": []},
    }


def _config_values(rng):
    path = root() / "values.yaml"
    path.write_text(json.dumps(mutated(_raw_config(), rng)))  # JSON is YAML
    load_config(path)


def _config_text(rng):
    path = root() / "text.yaml"
    text = yaml.safe_dump(_raw_config()).replace("model:", "model: &m", 1)
    path.write_bytes(wrong_bytes(text.encode(), rng))
    load_config(path)


def _override(rng):
    path = root() / "plain.yaml"
    path.write_text(json.dumps(_raw_config()))
    key = rng.choice(("train.optim.lr", "data", "evaluate.prompts", "train.objective.beta", "seed"))
    value = json.dumps(strange(rng.choice((1, 0.5, "a", [1])), rng))
    load_config(path, [wrong_bytes(f"{key}={value}".encode(), rng).decode("utf-8", "replace")])


# Data sets


def _read_source(**options):
    config = DataConfig(**options)
    source_digest(config)
    source_stamp(config)
    source = open_source(config)
    source.prompt_table()
    for pair in source:
        read_image(pair.winner)
        read_image(pair.loser)


@functools.cache
def data_folder() -> Path:
    return write_folder(root() / "data", 6, sizes=[(48, 48), (80, 48)])


def _pairs_jsonl(rng):
    listing = data_folder() / "pairs.jsonl"
    lines = listing.read_bytes().splitlines(keepends=True)
    place = rng.randrange(len(lines))
    entry = json.dumps(mutated(json.loads(lines[place]), rng)).encode() + b"\n"
    lines[place] = entry if rng.random() < 0.7 else wrong_bytes(lines[place], rng)
    with changed(listing, b"".join(lines)):
        _read_source(source="folder", path=str(data_folder()))


@functools.cache
def hpdv2_folder() -> Path:
    folder = write_folder(root() / "hpdv2", 4)
    names = [f"winner{i}.png" for i in range(4)]
    train = [
        {"prompt": f"p{i}", "file_path": [f"winner{i}.png", f"loser{i}.png"], "human_preference": h}
        for i, h in enumerate(([1, 0], [0, 1], [1, 0], [0, 0]))
    ]
    (folder / "train.json").write_text(json.dumps(train))
    test = [{"prompt": "p", "image_path": names, "rank": [2, 1, 3, 3]}]
    (folder / "test.json").write_text(json.dumps(test))
    return folder


def _hpdv2(rng):
    split = rng.choice(("train", "test"))
    listing = hpdv2_folder() / f"{split}.json"
    with changed(listing, changed_json(listing, rng)):
        _read_source(source="hpdv2", path=str(hpdv2_folder()), split=split)


def _parquet(rng):
    """Values and columns of other types, and files cut off; no wrong bytes inside of a file."""
    path = root() / "parquet" / "train-0.parquet"
    rows = [pickapic_row(i) for i in range(5)]
    rows[3] |= {"has_label": False, "label_0": None, "label_1": None}
    column = rng.choice(list(rows[0]))
    value = strange(rows[0][column] if column not in ("jpg_0", "jpg_1") else "text", rng)
    for row in rows if rng.random() < 0.6 else rows[:1]:
        row[column] = value
        if rng.random() < 0.15:
            del row[column]
    try:
        write_pickapic(path, rows)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError, KeyError):
        return  # a table of such rows cannot be written
    if rng.random() < 0.15:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    _read_source(source="pickapic", path=str(path.parent))


def _image(rng):
    encoding = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    decode(wrong_bytes(image_bytes(rng.randrange(9), encoding=encoding), rng))


# Caches


@functools.cache
def prepared():
    """Configuration and model of a prepared cache, with reference errors made up."""
    pipeline = tiny_sd15_folder(root() / "pipeline")
    data = write_folder(root() / "prepared", 5, sizes=[(48, 48), (80, 48)])
    (data / "loser4.png").write_bytes(b"no image")
    raw = {
        "model": {"path": str(pipeline)},
        "data": {"source": "folder", "path": str(data), "flip_rate": 0.5},
        "prepare": {"cache_dir": str(root() / "cache"), "resolution": 32, "shard_size": 3},
        "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
    }
    config = parse_config(raw)
    model = ModelFolder.resolve(config.model)
    prepare(config, progress=False, model=model)
    identity = {"seed": "0"}
    folder = reference_folder(config.prepare.cache_dir, identity)
    folder.mkdir(parents=True)
    for visit in (0, 1):
        write_part(folder, visit, 0, np.arange(4), np.ones((4, 2), np.float32))
    merge_parts(folder, identity, 4)
    return config, model, identity, folder


def _read_cache(rng):
    config, model, _, _ = prepared()
    verify = rng.choice(("first", "first", "always", "never"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"verify": verify})})
    cache = PairCache.open(config, model=model)
    for i in range(len(cache)):
        cache.read([i], 0)
    cache.empty_prompt()
    cache.left_out()


def _manifest(rng):
    path = prepared()[0].prepare.cache_dir / "manifest.json"
    with changed(path, changed_json(path, rng)):
        _read_cache(rng)


def _part(rng):
    folder = prepared()[0].prepare.cache_dir
    path = rng.choice(sorted(folder.glob("*-0*/*.json")))
    with changed(path, changed_json(path, rng)):
        _read_cache(rng)
        for part in parts_of(load_manifest(folder)):
            part.record(folder)


def _cache_bytes(rng):
    folder = prepared()[0].prepare.cache_dir
    kinds = ("*.arrow", "*.jsonl", "*/*.safetensors")
    path = rng.choice(sorted(p for kind in kinds for p in folder.glob(kind)))
    before = path.read_bytes()
    wrong = wrong_bytes(before, rng)
    config, model, _, _ = prepared()
    with changed(path, wrong):
        cache = PairCache.open(config, model=model)
        for i in range(len(cache)):
            cache.read([i], 0)
        cache.empty_prompt()
        assert wrong == before or _is_unread(path, cache), f"{path}: wrong bytes were read"


def _is_unread(path, cache):
    """The rows of prompts that no pair in the cache has are read by nobody."""
    return path.name == "text.safetensors" and len(set(cache.prompt_index.tolist())) < 3


def _reference(rng):
    config, _, identity, folder = prepared()
    path = folder / "reference.json"
    with changed(path, changed_json(path, rng)):
        load_reference_manifest(folder)
        content = rng.random() < 0.8
        errors = open_reference_errors(
            config.prepare.cache_dir, identity, command="fastpo prepare", content=content
        )
        errors.complete_visits(4)


# Models


@functools.cache
def model_folder() -> Path:
    return tiny_sd15_folder(root() / "model")


def _model_json(rng):
    folder = model_folder()
    names = ("model_index.json", "unet/config.json", "vae/config.json")
    path = folder / rng.choice((*names, "scheduler/scheduler_config.json"))
    with changed(path, changed_json(path, rng)):
        config = parse_config(_raw_config() | {"model": {"path": str(folder)}})
        model = ModelFolder.resolve(config.model)
        family = model.family
        family.geometry(model, 32, buckets=True)
        family.schedule(model, 32)
        model.digest("unet"), model.digest("vae")
        if rng.random() < 0.3:
            family.load_denoiser(model, weights=False)


# Runs and the report


@functools.cache
def run_folder() -> Path:
    folder = root() / "run"
    samples = folder / "evaluation"
    for model in ("base", "aligned"):
        (samples / model).mkdir(parents=True)
        for k in range(2):
            (samples / model / f"0000{k}-{k}.png").write_bytes(image_bytes(k))
    (folder / "config.yaml").write_text(yaml.safe_dump(_raw_config()))
    rows = [{"step": s, "loss": 1 / s, "grad_norm": 0.5, "lr": 1e-5} for s in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "pair_id,flipped,visits,ledger_minority,metric_minority\n"
    table = "".join(f"p{i},{i % 2},{i},0.{i},0.5\n" for i in range(1, 7))
    (folder / "minority.csv").write_text(head + table)
    metric = {
        "base_mean": 0.1,
        "aligned_mean": 0.2,
        "gain": 0.1,
        "gain_interval": [-0.1, 0.3],
        "win_rate": 0.75,
        "win_interval": [0.3, 0.9],
        "wins": 1,
        "ties": 1,
        "losses": 0,
    }
    summary = {
        "primary": "score",
        "prompts": 2,
        "comparisons": 2,
        "confidence": 0.95,
        "metrics": {"score": metric},
        "notes": {"a": "b"},
    }
    (samples / "summary.json").write_text(json.dumps(summary))
    listed = [
        {
            "prompt_index": k,
            "prompt": f"prompt {k}",
            "seed": k,
            "base": f"base/0000{k}-{k}.png",
            "aligned": f"aligned/0000{k}-{k}.png",
        }
        for k in range(2)
    ]
    about = {"fingerprints": {"base": "b", "aligned": "a"}, "samples": listed}
    (samples / "samples.json").write_text(json.dumps(about))
    scores = "".join(f"{m},{k},{k},p,0.{k}\n" for m in ("base", "aligned") for k in range(2))
    (samples / "scores.csv").write_text("model,prompt_index,seed,prompt,score\n" + scores)
    return folder


@contextlib.contextmanager
def _changed_run(rng):
    folder = run_folder()
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    if path.suffix == ".json":
        content = changed_json(path, rng)
    elif path.suffix == ".jsonl" and rng.random() < 0.6:
        lines = path.read_text().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(mutated(json.loads(lines[place]), rng))
        content = ("\n".join(lines) + "\n").encode()
    elif path.suffix == ".yaml" and rng.random() < 0.6:
        content = json.dumps(mutated(_raw_config(), rng)).encode()
    else:
        content = wrong_bytes(path.read_bytes(), rng)
    with changed(path, content):
        yield folder


def _run_folder(rng):
    with _changed_run(rng) as folder:
        run = load_run(folder)
        for words in (headline, falls, minority_words, config_differences):
            words([run])


def _report(rng):
    with _changed_run(rng) as folder:
        out = root() / "page"
        shutil.rmtree(out, ignore_errors=True)
        write_report([folder], out, title="fuzz")


KINDS = {
    "config values": _config_values,
    "config text": _config_text,
    "override": _override,
    "pairs.jsonl": _pairs_jsonl,
    "hpdv2": _hpdv2,
    "parquet": _parquet,
    "image": _image,
    "manifest": _manifest,
    "part": _part,
    "cache bytes": _cache_bytes,
    "reference": _reference,
    "model json": _model_json,
    "run folder": _run_folder,
    "report": _report,
}
