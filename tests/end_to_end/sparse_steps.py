"""Gradients of single steps on two processes, for `test_sparse_ranks.py`.

A job is `{"config", "set", "kinds", "out"}`: one setup, and one step of each kind from the same
weights, verdicts and pairs. A kind is `[name, keys to set, running share]`. The main process writes
by name what the optimizer was given, the step's table, what it cost, and every process's passes.
"""

import faulthandler
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from fastpo.config import load_config
from fastpo.models.denoisers import Denoisers
from fastpo.train.batch_statistics import make_statistics
from fastpo.train.distributed import joined
from fastpo.train.live_share import LiveShare
from fastpo.train.loop import setup
from fastpo.train.objective import build_loss
from fastpo.train.run_folder import RunFolder

PATIENCE = 600  # seconds
VERDICTS = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0])


def run_all(jobs):
    """Makes the steps of a file's jobs, in each process of the group."""
    torch.distributed.init_process_group("gloo")
    for job in json.loads(jobs.read_text()):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        config = load_config(Path(job["config"]), job["set"])
        with joined(config.train) as processes:
            made = setup(config, processes, RunFolder(config.train.output_dir, main=processes.main))
            _move(made.trainer.state, processes)
            batches = list(made.data.loader(processes, 0, workers=0))
            steps = {}
            for name, keys, share in job["kinds"]:
                train = load_config(Path(job["config"]), [*job["set"], *keys]).train
                steps[name] = _step(made.trainer, train, share, batches)
            if processes.main:
                torch.save(steps, job["out"])
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


def _move(state, processes):
    """Weights away from the reference's, and verdicts on every pair."""
    whole = processes.gather_objects(state.weights.gather(state.weights.local))[0]
    generator = torch.Generator().manual_seed(0)
    for name in sorted(whole):
        whole[name] = whole[name] + 0.05 * torch.randn(whole[name].shape, generator=generator)
    state.weights.load(whole)
    state.ledger.total[:] = VERDICTS
    state.ledger.visits[:] = 3


def _step(trainer, train, share, batches):
    processes = trainer.processes
    live = None if train.backward == "all" else LiveShare(train)
    if live is not None:
        live.value = share
    reduce = make_statistics(train, processes.sum)
    state = replace(trainer.state, live_share=live)
    trainer = replace(trainer, config=train, state=state, loss=build_loss(train, reduce))
    with _gradients(trainer) as gradients, _passes() as passes:
        table = trainer.optimizer_step(iter(batches), 0).read()
    return {
        "gradients": gradients,
        "table": {name: table[name] for name in ("index", "scale", "closed", "kept", "margin")},
        "cost": None if table.cost is None else tuple(table.cost),
        "passes": processes.gather_objects(passes),
    }


@contextmanager
def _gradients(trainer):
    """What the optimizer steps on, by name; clipping is out of reach."""
    found = {}
    if hasattr(trainer.policy, "zero_optimization_stage"):
        engine, step = trainer.policy, trainer.policy.step

        def watched(*args, **kwargs):
            for name, parameter in trainer.state.trainable.items():
                found[name] = safe_get_full_grad(parameter).detach().clone()
            return step(*args, **kwargs)

        engine.step = watched
        try:
            yield found
        finally:
            del engine.step
        return

    def keep(*_):
        found.update({name: p.grad.clone() for name, p in trainer.state.trainable.items()})

    hook = trainer.state.optimizer.optimizer.register_step_pre_hook(keep)
    yield found
    hook.remove()


@contextmanager
def _passes():
    """Passes through a policy that is not its own reference: pairs, and whether with gradients."""
    seen, predict = [], Denoisers.predict

    def watched(self, model, noised, conditions):
        if model is not self.frozen:
            seen.append((len(noised.index), torch.is_grad_enabled()))
        return predict(self, model, noised, conditions)

    Denoisers.predict = watched
    try:
        yield seen
    finally:
        Denoisers.predict = predict
