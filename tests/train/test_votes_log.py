"""`votes.csv`: what the ledger counted, line by line, also after a kill."""

import csv

import pytest
import torch

from fastpo.config import load_config
from fastpo.errors import ForeignPathError
from fastpo.ledger import BINS, PairLedger
from fastpo.train import train
from fastpo.train.votes_log import HEAD, kept_votes


def read(folder):
    with (folder / "votes.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(experiment):
    return load_config(experiment(max_steps=6, checkpoint_every=2, micro_batch_size=2))


def test_the_ledger_follows_from_the_file_to_the_bit(run):
    folder = train(run, progress=False)
    rows = read(folder)
    assert {int(row["step"]) for row in rows} == set(range(1, 7))
    with (folder / "minority.csv").open() as file:
        pairs = list(csv.DictReader(file))
    ledger = PairLedger(len(pairs), num_timesteps=BINS)
    for step in range(1, 7):
        of_step = [row for row in rows if int(row["step"]) == step]
        columns = [torch.tensor([float(r[k]) for r in of_step]) for k in ("pair", "margin", "bin")]
        ledger.update(columns[0].long(), columns[1].float(), columns[2].long())
    assert [float(p["ledger_mean"]) for p in pairs] == ledger.mean().tolist()
    assert [int(p["visits"]) for p in pairs] == ledger.visits.tolist()


def test_a_resumed_run_has_the_lines_of_one_that_went_through(run):
    folder = train(run, progress=False)
    whole = (folder / "votes.csv").read_bytes()
    for name in ("step-00000006", "step-00000005"):  # as if it had been killed after step 5
        part = folder / "checkpoints" / name
        if part.exists():
            for file in sorted(part.iterdir()):
                file.unlink()
            part.rmdir()
    (folder / "votes.csv").write_bytes(whole[:-7])
    train(run, resume=True, progress=False)
    assert (folder / "votes.csv").read_bytes() == whole


def test_lines_of_later_steps_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "votes.csv"
    lines = [f"{step},1,{pair},500,5,0,0.25\n" for step in range(1, 40) for pair in range(step % 4)]
    path.write_text(HEAD + "".join(lines) + "40,1,")
    for start in (0, 1, 7, 8, 39, 100):
        kept = [line for line in lines if int(line.split(",")[0]) <= start]
        assert kept_votes(path, start).decode() == HEAD + "".join(kept)
    assert kept_votes(tmp_path / "missing.csv", 3).decode() == HEAD


def test_a_users_file_of_that_name_is_no_votes(run):
    folder = train(run, progress=False)
    (folder / "votes.csv").write_text("ballots of last week\n")
    with pytest.raises(ForeignPathError, match=r"votes\.csv is no run's"):
        train(run, resume=True, progress=False)
    assert (folder / "votes.csv").read_text() == "ballots of last week\n"
