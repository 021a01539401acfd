"""Small experiments that every test directory can build: images, pipelines, configurations."""

import os

# One thread a process: the tensors are tiny, and threads that wait for one another cost far more
# than they bring where several processes share the cores. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU kernels run in Triton's interpreter, unless something else was chosen (as by
# kernels/on_machine.py). Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.forked import FORK, print_to

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def extensions(tmp_path_factory):
    """DeepSpeed's operators are compiled for these tests alone, once for all of their processes.

    The user's folder may hold the lock of a build that was killed, for which every run would wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, whose folders lie together
        folder = folder.parent
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")


def pytest_collection_modifyitems(config, items):
    """Leaves long tests out unless `-m` names them, and puts files with slow tests first.

    So no process is left with a slow one when the others are done.
    """
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("long")]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish(session):
    """What the tests have imported is no garbage, and is not looked through again and again.

    Nor do forked processes, which would copy all of it for that.
    """
    gc.freeze()


def encoded_image(seed, size=(48, 48)):
    """A PNG of smooth random colors, so that every pair differs."""
    import numpy as np

    grid = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A plain folder of eleven pairs, two of them of another shape, with three prompts."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(11):
        size = (64, 32) if i in (3, 7) else (48, 48)
        names = f"w{i}.png", f"l{i}.png"
        for offset, name in enumerate(names):
            (folder / name).write_bytes(encoded_image(2 * i + offset, size))
        line = {"id": f"p{i}", "prompt": f"prompt {i % 3}", "winner": names[0], "loser": names[1]}
        lines.append(json.dumps(line))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory):
    """Random pipelines of both families: `{"sdxl": folder, "sd15": folder}`."""
    from fastpo.testing import tiny_sd15_folder, tiny_sdxl_folder

    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "sdxl": tiny_sdxl_folder(folder / "sdxl"),
        "sd15": tiny_sd15_folder(folder / "sd15"),
    }


@pytest.fixture(scope="session")
def light_pipelines(tiny_pipelines, tmp_path_factory):
    """The same around UNets of half the modules, which train in 40 % of the time; by family.

    Latents, text and prepared caches are those of `tiny_pipelines`.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("light")
    for family, pipeline in tiny_pipelines.items():
        shutil.copytree(pipeline, folder / family, ignore=shutil.ignore_patterns("unet"))
        config = UNet2DConditionModel.load_config(pipeline / "unet")
        less = {"mid_block_type": None, "up_block_types": ("UpBlock2D", "UpBlock2D")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config({**config, **less})
        unet.save_pretrained(folder / family / "unet")
    return {family: folder / family for family in tiny_pipelines}


@pytest.fixture(scope="session")
def tiny_caches(tiny_data, tiny_pipelines, tmp_path_factory):
    """Prepared caches of both families, made once."""
    from fastpo.config import parse_config
    from fastpo.data.prepare import prepare

    folder = tmp_path_factory.mktemp("caches")
    for family, pipeline in tiny_pipelines.items():
        prepare(parse_config(raw_config(family, pipeline, tiny_data, folder)), progress=False)
    return folder


def raw_config(family, pipeline, data, caches, output="unused"):
    """The configuration that all small experiments start from, as a mapping."""
    return {
        "seed": 7,
        "model": {"path": str(pipeline)},
        "data": {"source": "folder", "path": str(data)},
        "prepare": {
            "cache_dir": str(caches / family),
            "resolution": 32,
            "store_precision": "fp32",
        },
        "train": {
            "output_dir": str(output),
            "method": "lora",
            "objective": {"name": "dpo", "beta": 500.0},
            "optim": {"lr": 1e-3},
            "max_steps": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "checkpoint_every": 2,
            "trackers": [],
        },
        "evaluate": {"prompts": ["prompt 0", "prompt 9"], "num_inference_steps": 2},
    }


@pytest.fixture
def experiment(tiny_data, light_pipelines, tiny_caches, tmp_path):
    """Writes a YAML file for one small run: `experiment(family="sdxl", **train_options)`."""

    def write(family="sdxl", *, name="run", data=None, seed=7, **options):
        output = tmp_path / name
        raw = raw_config(family, light_pipelines[family], tiny_data, tiny_caches, output)
        raw["seed"] = seed
        raw["data"] |= data or {}
        raw["train"] |= options
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture
def fastpo():
    """Runs the command line in a process of its own, as a user does."""

    def run(*arguments, check=True, env=None, launcher=("-m", "fastpo")):
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def read_metrics(folder, *, timing=False):
    """The lines of `metrics.jsonl`; rates are left out unless asked for."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    hidden = () if timing else ("pairs_per_second", "data/wait")
    return [{k: v for k, v in line.items() if k not in hidden} for line in lines]


@pytest.fixture(name="read_metrics")
def _read_metrics():
    return read_metrics


@pytest.fixture
def one_thread():
    """Torch on one thread, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config_for(tiny_pipelines, tmp_path):
    """`config_for("sdxl", data={...}, prepare={...})`: shards of two pairs in `tmp_path`."""

    from fastpo.config import parse_config

    def config(family="sdxl", **sections):
        raw = {
            "model": {"path": str(tiny_pipelines[family])},
            "data": {"source": "folder", "path": str(tmp_path / "data")},
            "prepare": {
                "cache_dir": str(tmp_path / "cache"),
                "resolution": 32,
                "shard_size": 2,
                "batch_size": 2,
                "store_precision": "fp32",
            },
            "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
        }
        for name, changes in sections.items():
            raw.setdefault(name, {}).update(changes)
        return parse_config(raw)

    return config


@pytest.fixture
def script_calls(tmp_path):
    """Words of each Python call of a GPU's script: `script_calls("gpu.sh", *options)`."""
    stub, log = tmp_path / "python", tmp_path / "calls"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"if sys.argv[1] != '-c': print(json.dumps(sys.argv[1:]), file=open({str(log)!r}, 'a'))\n"
    )
    stub.chmod(0o755)

    def asked(script, *options):
        log.write_text("")
        env = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path), "COMMIT": "abc1234"}
        command = ["bash", ROOT / "benchmarks" / script, *options]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return asked


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """Runs a script or module of the checkout in a process of its own, and gives what it printed.

    The process is forked from the test's, so it need not import everything again.
    """

    def run(*words):
        output = tmp_path_factory.mktemp("script") / "output.txt"
        process = FORK.Process(target=_run_script, args=(list(map(str, words)), output))
        process.start()
        process.join(timeout=600)
        process.kill()
        assert process.exitcode == 0, output.read_text()
        return output.read_text()

    return run


def _run_script(words, output):
    print_to(output)
    os.chdir(ROOT)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str((ROOT / words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
