"""Statistics over micro-batches, processes and steps: what is summed, and what must not matter."""

import pytest
import torch

from fastpo.config import parse_config
from fastpo.errors import ConfigError
from fastpo.loss import adaptive_dpo, kto
from fastpo.train.batch_statistics import FADING, RunningStatistics, make_statistics
from fastpo.train.distributed import joined
from fastpo.train.objective import build_loss
from fastpo.types import PairPredictions
from tests.faults.two_ranks import two_ranks

OBJECTIVES = {
    "kto": {"name": "kto", "beta": 50.0},
    "adaptive_dpo": {"name": "adaptive_dpo", "beta": 50.0, "margin_scale": 50.0},
    "adaptive_ipo": {"name": "adaptive_ipo", "tau": 10.0, "beta": 50.0},
    "sdpo": {"name": "sdpo", "beta": 50.0, "mu": 0.9},
}


def train_config(objective, **options):
    raw = {
        "model": {"path": "m"},
        "data": {"source": "folder", "path": "d"},
        "prepare": {"cache_dir": "c"},
        "train": {"output_dir": "o", "objective": objective, "max_steps": 1, **options},
    }
    return parse_config(raw).train


def predictions(pairs, *, annotators=2, seed=0):
    """Winners first; `rows` picks pairs with both their sides."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(2 * pairs, 3, 4, generator=generator) for _ in range(3 + annotators)]
    near = [draw[0] + 0.1 * other for other in draw[1:]]
    return draw[0], near[0], tuple(near[2:]), draw[0] + 0.3 * near[1] + 0.2


def rows(tensor, which, pairs):
    return torch.cat([tensor[which], tensor[[pairs + i for i in which]]])


def part(loss, all_of, which, pairs):
    """The loss of some of the pairs, and its gradient by the policy."""
    policy, reference, annotators, target = (
        tuple(rows(a, which, pairs) for a in x) if isinstance(x, tuple) else rows(x, which, pairs)
        for x in all_of
    )
    policy = policy.clone().requires_grad_()
    out = loss(PairPredictions(policy, reference, annotators), target, None, None)
    out.loss.backward()
    return out, policy.grad


def test_running_sums_worked_by_hand():
    running = RunningStatistics()
    neutral = running(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert neutral[0] == 0 and neutral[-1] == 1 and neutral[1:-1].min() > 1e20
    running(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    running.finish_step(lambda sums: 2 * sums)  # another process with the same
    first = torch.tensor([4.0, 6.0, 8.0, 10.0])
    assert torch.equal(running(torch.tensor([5.0, 5.0, 5.0, 5.0])), first)
    assert torch.equal(running(torch.tensor([5.0, 5.0, 5.0, 5.0])), first)  # until the step ends
    running.finish_step(lambda sums: sums)
    torch.testing.assert_close(running(torch.zeros(4)), FADING * first + 10)


def test_overflown_sums_do_not_ruin_the_estimate():
    running = RunningStatistics()
    for value in (1.0, float("inf"), 1.0):
        running(torch.tensor([value, 1.0]))
        running.finish_step(lambda sums: sums)
    assert running(torch.zeros(2)).tolist() == pytest.approx([1.9, 1.9])


def test_state_goes_round():
    running, other = RunningStatistics(), RunningStatistics()
    for sums in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])):
        running(sums)
    running.finish_step(lambda sums: sums)
    other.load_state_dict({**running.state_dict(), "visits": torch.zeros(1)})
    for sums in (torch.zeros(2), torch.zeros(3)):
        assert torch.equal(other(sums), running(sums))


@pytest.mark.parametrize("name", ["kto", "adaptive_dpo", "adaptive_ipo"])
def test_running_does_not_depend_on_how_a_step_was_cut(name):
    """Steps of four pairs: at once, and one by one, give the same losses and gradients."""
    configs = [train_config(OBJECTIVES[name], statistics="running") for _ in range(2)]
    states = [make_statistics(c, None) for c in configs]
    whole, cut = (build_loss(c, s) for c, s in zip(configs, states, strict=True))
    for step in range(3):
        data = predictions(4, seed=step)
        out, gradient = part(whole, data, [0, 1, 2, 3], 4)
        pieces = [part(cut, data, [i], 4) for i in range(4)]
        torch.testing.assert_close(out.loss, torch.stack([p.loss for p, _ in pieces]).mean())
        both = torch.cat([torch.cat([g[side, None] for _, g in pieces]) for side in (0, 1)])
        torch.testing.assert_close(gradient, both / 4)
        if out.minority is not None:
            torch.testing.assert_close(out.minority, torch.cat([p.minority for p, _ in pieces]))
            if step == 0:
                assert out.minority.max() < 1e-6  # nobody is judged before anything is known
        for state in states:
            state.finish_step(lambda sums: sums)
    assert name == "kto" or out.minority.max() > 0.01


def test_running_approaches_the_batchs_own_statistics():
    """Where every step holds the same pairs, the estimate is their own mean."""
    policy, reference, _, target = predictions(6)
    running = RunningStatistics()
    for _ in range(3):
        kto(policy, reference, target, beta=50.0, reduce=running)
        running.finish_step(lambda sums: sums)
    one = kto(policy, reference, target, beta=50.0, reduce=running).loss
    torch.testing.assert_close(one, kto(policy, reference, target, beta=50.0).loss)


def compute_own_pair(words):
    """One of two processes: its loss, metric and gradient by objective, in a file."""
    results = {}
    with joined(train_config({"name": "kto"})) as processes:
        for name, objective in OBJECTIVES.items():
            config = train_config(objective)
            reduce = make_statistics(config, processes.sum)
            annotators = 2 if name.startswith("adaptive") else 0
            data = predictions(2, annotators=annotators)
            out, gradient = part(build_loss(config, reduce), data, [processes.rank], 2)
            results[name] = (out.loss.detach(), out.minority, gradient)
        torch.save(results, f"{words[0]}/{processes.rank}.pt")
        processes.wait()


def test_two_processes_of_one_pair_equal_one_of_two(tmp_path):
    """Loss, metric and gradient to rounding, for every objective with batch statistics."""
    env = {"ACCELERATE_USE_CPU": "true"}
    with two_ranks(tmp_path, lambda _: [tmp_path], act=compute_own_pair, env=env) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.text(0) + ranks.text(1)
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [torch.load(f) for f in files]
    for name, objective in OBJECTIVES.items():
        config = train_config(objective)
        annotators = 2 if name.startswith("adaptive") else 0
        data = predictions(2, annotators=annotators)
        out, gradient = part(build_loss(config, make_statistics(config, None)), data, [0, 1], 2)
        losses, minorities, gradients = zip(*(r[name] for r in ranks), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), out.loss.detach())
        if out.minority is not None:
            torch.testing.assert_close(torch.cat(minorities), out.minority)
        both = torch.cat([torch.cat([g[side, None] for g in gradients]) for side in (0, 1)])
        torch.testing.assert_close(both / 2, gradient)
        _, apart = part(build_loss(config), data, [0], 2)
        assert not torch.allclose(apart, gradients[0])  # one pair's own statistics are others


def test_scopes_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="sdpo's safeguard"):
        train_config(OBJECTIVES["sdpo"], statistics="running")
    with pytest.raises(ConfigError, match="normalize: rms"):
        train_config({"name": "adaptive_dpo", "normalize": "l2"}, statistics="running")
    assert make_statistics(train_config({"name": "dpo"}), lambda sums: sums) is None
    assert make_statistics(train_config(OBJECTIVES["kto"]), None) is None


def test_the_ledgers_metric_takes_a_running_mean_margin_too():
    """With `minority=` the sums are two and the count; only the mean margin plays a part."""
    policy, reference, _, target = predictions(4)
    running = RunningStatistics()
    options = {"beta": 50.0, "margin_scale": 50.0, "minority": torch.full((4,), 0.3)}
    first = adaptive_dpo(policy, reference, target, **options, reduce=running)
    running.finish_step(lambda sums: sums)
    second = adaptive_dpo(policy, reference, target, **options, reduce=running)
    torch.testing.assert_close(second.loss, adaptive_dpo(policy, reference, target, **options).loss)
    assert not torch.allclose(first.loss, second.loss)
