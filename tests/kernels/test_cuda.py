"""What only a GPU can show: graphs, streams, large offsets, the default choice."""

from dataclasses import replace

import pytest
import torch

from fastpo import loss as fl
from fastpo_kernels.pair_noise import noised_pair
from fastpo_kernels.testing import pair_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SDXL = (4, 128, 128)


def step(x, impl="triton"):
    out = fl.sdpo(x.policy, x.reference, x.target, beta=20.0, mu=0.9, impl=impl)
    (grad,) = torch.autograd.grad(out.loss, x.policy)
    return out.loss.detach(), grad


def captured(step):
    """A CUDA graph of one step, and its outputs.

    A failed capture is ended, and its error raised: the streams of later tests stay usable.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = step()
    except RuntimeError:
        torch.cuda.synchronize()
        raise
    return graph, outputs


def fresh(x):
    """The same batch, its policy a leaf that no graph of another stream has seen.

    A leaf's node of the backward pass belongs to the stream that made it, and lives as long as any
    of its losses; a capture may not wait for that stream.
    """
    return replace(x, policy=x.policy.detach().requires_grad_())


def test_graph_replays_follow_their_inputs():
    x = pair_inputs(4, SDXL, torch.bfloat16, "cuda")
    x.policy.requires_grad_()
    graph, (loss, grad) = captured(lambda: step(fresh(x)))
    for seed in (1, 2):
        y = pair_inputs(4, SDXL, torch.bfloat16, "cuda", seed=seed)
        with torch.no_grad():
            for mine, other in zip(x.tensors(), y.tensors(), strict=True):
                mine.copy_(other)
        graph.replay()
        expected_loss, expected_grad = step(x)
        assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


def test_a_step_is_captured_while_an_earlier_loss_lives():
    x = pair_inputs(4, SDXL, torch.bfloat16, "cuda")
    x.policy.requires_grad_()
    kept = fl.dpo(x.policy, x.reference, x.target, beta=20.0, impl="triton").loss
    graph, (loss, _) = captured(lambda: step(fresh(x)))
    graph.replay()
    assert torch.equal(loss, step(x)[0]) and kept.requires_grad


def test_graphs_and_streams_do_not_share_a_ticket():
    inputs = [pair_inputs(8, SDXL, torch.bfloat16, "cuda", seed=k) for k in range(4)]
    for x in inputs:
        x.policy.requires_grad_()
    expected = [step(x) for x in inputs]
    graphs = [captured(lambda x=x: step(fresh(x))) for x in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for k, (x, stream) in enumerate(zip(inputs, streams, strict=True)):
            with torch.cuda.stream(stream):
                if k < 2:
                    graphs[k][0].replay()
                    found.append(graphs[k][1])
                else:
                    found.append(step(x))
        torch.cuda.synchronize()
        for (loss, grad), (expected_loss, expected_grad) in zip(found, expected, strict=True):
            assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


def test_many_launches_agree_bitwise():
    x = pair_inputs(16, SDXL, torch.bfloat16, "cuda", n_annotators=2)
    x.policy.requires_grad_()
    first, first_grad = step(x)
    for _ in range(500):
        loss, grad = step(x)
        assert torch.equal(loss, first) and torch.equal(grad, first_grad)


def test_none_chooses_triton():
    x = pair_inputs(2, (4, 64, 64), torch.bfloat16, "cuda")
    x.policy.requires_grad_()
    default, triton = step(x, None), step(x, "triton")
    assert torch.equal(default[0], triton[0]) and torch.equal(default[1], triton[1])
    double = fl.sft(x.policy.double(), x.target.double())
    assert double.loss.dtype == torch.float64


def test_nothing_is_read_back_to_the_host():
    x = pair_inputs(2, (4, 64, 64), torch.bfloat16, "cuda", n_annotators=1)
    x.policy.requires_grad_()
    keys = torch.arange(2, device="cuda")
    table = torch.ones(10, device="cuda")
    latents = torch.randn(4, 4, 64, 64, device="cuda")

    def everything():
        step(x)
        fl.adaptive_dpo(x.policy, x.reference, x.target, beta=20.0, annotators=x.annotators)
        fl.kto(x.policy, x.reference, x.target, beta=20.0).loss.backward()
        noised_pair(latents, keys, keys, table, table, seed=0, low=0, high=10)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_gradient_scaler():
    x = pair_inputs(2, (4, 64, 64), torch.float16, "cuda")
    x.policy.requires_grad_()
    grads = []
    for impl in ("triton", "reference"):
        loss = fl.dpo(x.policy, x.reference, x.target, beta=2500.0, impl=impl).loss
        grads.append(torch.autograd.grad(1024 * loss, x.policy)[0])
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-3)


def test_noise_and_loss_in_a_graph_without_synchronization():
    latents = torch.randn(8, *SDXL, device="cuda", dtype=torch.bfloat16)
    keys = torch.arange(4, device="cuda")
    power = torch.linspace(0.99, 0.01, 1000, device="cuda")
    tables = power.sqrt(), (1 - power).sqrt()
    x = pair_inputs(4, SDXL, torch.bfloat16, "cuda")

    def noised_step():
        target = noised_pair(
            latents, keys, keys, *tables, seed=1, low=0, high=1000, prediction="v_prediction"
        ).target
        return step(fresh(replace(x, target=target)))

    expected = noised_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        noised_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, found = captured(noised_step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_statistics_by_reduce_equal_the_batchs_own():
    x = pair_inputs(16, SDXL, torch.bfloat16, "cuda", n_annotators=2)
    x.policy.requires_grad_()
    grads = []
    for options in ({}, {"reduce": lambda sums: 3 * sums}):
        out = fl.adaptive_dpo(x.policy, x.reference, x.target, beta=20.0, annotators=x.annotators,
                              impl="triton", **options)  # fmt: skip
        grads.append(torch.autograd.grad(out.loss, x.policy)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    n_pairs, dims = 520, (4, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    target = torch.zeros(1, *dims, device="cuda", dtype=torch.bfloat16).expand(n_pairs, *dims)
    policy = torch.zeros(2 * n_pairs, *dims, device="cuda", dtype=torch.bfloat16)
    policy[-1] = 1.0
    errors = fl.pair_errors(policy.requires_grad_(), target)
    assert errors[-1] == 1.0 and errors[:-1].max() == 0.0
    errors.sum().backward()
    assert policy.grad[-1].amin() > 0 and policy.grad[:-1].abs().amax() == 0
