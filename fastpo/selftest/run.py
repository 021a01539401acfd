from __future__ import annotations
from pathlib import Path
import time, shutil
from fastpo.selftest.child import call, Tell
from fastpo.selftest.trials import Bench, act, LIMIT
from fastpo.selftest.results import results
from fastpo.selftest.world import World, STAGES, Stage, make_model_and_data
from fastpo.selftest.disk import count_steps

def _make(tell, folder):
    make_model_and_data(folder)

def make_bench(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    e = call(_make, folder)
    assert e.how=="returned", e
    world=World(folder)
    steps, seconds={}, {}
    world.whole.mkdir()
    for stage in STAGES:
        began=time.monotonic()
        e=call(act_counting, world, stage, world.whole)
        assert e.how=="returned", (e, e.output, e.text)
        steps[stage]=e.last("step",-1)+1
        seconds[stage]=time.monotonic()-began
    return Bench(world, {s: results(s, world.whole) for s in STAGES}, steps, seconds)

def act_counting(tell, world, stage, place):
    act(tell, world, stage, place, count_steps, tell)
