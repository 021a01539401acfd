"""A finished run's folder of known labels, written without training anything."""

import csv
import io
import json

import numpy as np
from PIL import Image

from fastpo.config import dump_config, parse_config
from fastpo.data.cache.flips import is_flipped
from fastpo.ledger import BINS, PairLedger

NAMES = ("pair_id", "flipped", "visits", "ledger_mean", "ledger_minority", "metric_minority")


def make_data(folder, pairs, size=24):
    """Pairs of a light winner and a dark loser."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(pairs):
        for name, level in (("w", 200), ("l", 40)):
            buffer = io.BytesIO()
            Image.new("RGB", (size, size), (level, i % 256, level)).save(buffer, "PNG")
            (folder / f"{name}{i}.png").write_bytes(buffer.getvalue())
        prompt = f"<b>prompt</b> {i % 7}" if i else "a 'quoted' \"prompt\" & </script>"
        line = {"id": f"p{i}", "prompt": prompt, "winner": f"w{i}.png", "loser": f"l{i}.png"}
        lines.append(json.dumps(line))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_run(folder, data, pairs, *, rate=0.2, epochs=4, seed=0, votes=True):
    """A run whose margins follow the labels before flipping, at every timestep alike."""
    folder.mkdir(parents=True)
    config = parse_config(
        {
            "model": {"path": "base"},
            "data": {"source": "folder", "path": str(data), "flip_rate": rate},
            "prepare": {"cache_dir": "cache"},
            "train": {"output_dir": str(folder), "objective": {"name": "dpo"}, "epochs": epochs},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config))
    ids = [f"p{i}" for i in range(pairs)]
    flipped = np.array([is_flipped(name, rate=rate, seed=0) for name in ids])
    rng, ledger, lines, step = np.random.default_rng(seed), PairLedger(pairs), [], 0
    for _ in range(epochs):
        for part in np.array_split(rng.permutation(pairs), max(1, pairs // 8)):
            step += 1
            timestep = rng.integers(0, 1000, len(part))
            margin = rng.normal(np.where(flipped[part], -1.0, 1.0), 1.0) * 1e-3
            margin = margin.astype(np.float32)
            enter(ledger, part, margin, timestep)
            for i, t, m in zip(part, timestep, margin, strict=True):
                lines.append(f"{step},1,{i},{t},{t * BINS // 1000},0,{m:.9g}\n")
    if votes:
        (folder / "votes.csv").write_text(
            "step,round,pair,timestep,bin,turned,margin\n" + "".join(lines)
        )
    with (folder / "minority.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(NAMES)
        columns = (ledger.visits, ledger.mean(), ledger.minority())
        for name, turned, *values in zip(ids, flipped, *(c.tolist() for c in columns), strict=True):
            writer.writerow([name, int(turned), *values, ""])
    return folder


def enter(ledger, part, margin, timestep):
    import torch

    ledger.update(torch.tensor(part), torch.tensor(margin), torch.tensor(timestep))
