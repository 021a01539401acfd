"""Each block of docs/from-your-trainer.md gives the trainer's own number and gradient.

The trainers' formulas are written out here in float64, in the trainers' own terms (their betas,
their sums), and the page's calls are run on the same random tensors.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastpo.loss

PAGE = Path(__file__).parents[2] / "docs" / "from-your-trainer.md"
BLOCKS = [
    (section.partition("\n")[0].strip(), block)
    for section in PAGE.read_text().split("\n## ")[1:]
    for block in re.findall(r"```python\n(.*?)```", section, re.S)
]
NUMBERS = {
    "beta_dpo": 3.0,
    "beta": 3.0,
    "beta_ipo": 0.8,
    "beta_mapo": 0.1,
    "snr_value": 0.5,
    "mu": 0.6,
    "eta": 0.48,
}


def errors(prediction, target):
    return (prediction - target).square().mean(dim=(1, 2, 3)).chunk(2)


def margin(t):
    (e_w, e_l), (r_w, r_l) = (
        errors(t["model_pred"], t["target"]),
        errors(t["ref_pred"], t["target"]),
    )
    return (r_w - r_l) - (e_w - e_l)


def sigmoid_loss(t, slope):
    return -F.logsigmoid(slope * margin(t)).mean()


def mapo(t):
    def ratio(error):
        odds = torch.exp(-0.5 * error) / (1 - torch.exp(-0.5 * error))
        return odds * 0.5 * error

    winner, loser = errors(t["model_pred"], t["target"])
    return winner.mean() - (0.1 * F.logsigmoid(1000 * (ratio(winner) - ratio(loser)))).mean()


def minority(t):
    """The released metric: confidence times stability of three annotators' normalized logits."""
    judged = torch.stack(
        [margin(t | {"model_pred": p}) for p in (t["model_pred"], *t["ema_preds"])]
    )
    judged = 15.0 * judged / judged.norm(dim=1, keepdim=True)
    confidence = (judged.sigmoid().mean(0) - 1).abs()
    return (confidence * judged.std(0).clamp(max=1)).detach()


def adaptive_dpo(t):
    u, d = minority(t), margin(t)
    gamma = d.mean().detach() - u.square() / 3.0
    return (-F.logsigmoid(3.0 * d - gamma) / (1 + 10 * u)).mean()


def adaptive_ipo(t):
    u, d = minority(t), margin(t)
    gamma = d.mean().detach() / 3.0 - u.square() / 9.0
    return ((d + gamma - 1 / (2 * 0.8)).square() / (1 + 10 * u)).mean()


def sdpo(t):
    difference_w, difference_l = (t["model_pred"] - t["target"]).detach().chunk(2)
    product = (difference_w * difference_l).sum()
    scale = ((1 - 0.6) * difference_w.square().sum() / product).clamp(0, 1) if product > 0 else 1.0
    (e_w, e_l), (r_w, r_l) = (
        errors(t["model_pred"], t["target"]),
        errors(t["ref_pred"], t["target"]),
    )
    e_l = e_l.detach() + scale * (e_l - e_l.detach())
    return -F.logsigmoid(0.5 * 3.0 * ((r_w - r_l) - (e_w - e_l))).mean()


def kto(t):
    liked = torch.tensor([1.0, -1.0]).repeat_interleave(len(t["model_pred"]) // 2)
    gain = torch.cat(errors(t["ref_pred"], t["target"])) - torch.cat(
        errors(t["model_pred"], t["target"])
    )
    baseline = gain.mean().detach().clamp(min=0)
    return (1 - torch.sigmoid(3.0 * liked * (gain - baseline))).mean()


def linear_dpo(t):
    (e_w, e_l), (r_w, r_l) = (
        errors(t["model_pred"], t["target"]),
        errors(t["ref_pred"], t["target"]),
    )
    factor = (0.2 * 3.0 * ((e_w - e_l) - (r_w - r_l)) + 0.5).clamp(0.48, 0.52).detach()
    return (factor * (e_w - e_l)).mean()


def summed(t):
    policy, reference = (
        (t[name] - t["target"]).square().sum(dim=(1, 2, 3)).chunk(2)
        for name in ("model_pred", "ref_pred")
    )
    difference = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return -F.logsigmoid(-0.5 * 3.0 * difference).mean()


THEIRS = {
    "Salesforce DiffusionDPO": [lambda t: sigmoid_loss(t, 1.5)],
    "diffusers, SDXL": [lambda t: sigmoid_loss(t, 1.5)],
    "diffusers, SD1.5": [
        lambda t: sigmoid_loss(t, 3.0),
        lambda t: torch.relu(1 - 3.0 * margin(t)).mean(),
        lambda t: (margin(t) - 1 / (2 * 0.8)).square().mean(),
    ],
    "MaPO": [mapo],
    "Adaptive-DPO": [adaptive_dpo, adaptive_ipo],
    "Diffusion-SDPO": [sdpo],
    "Diffusion-KTO": [kto],
    "Linear-DPO": [linear_dpo],
    "flow_grpo": [lambda t: sigmoid_loss(t, 1.5)],
    "SimpleTuner": [summed, lambda t: sigmoid_loss(t, 1.5)],
    "Flow-Factory": [lambda t: sigmoid_loss(t, 1.5)],
}
FORMULAS = [formula for formulas in THEIRS.values() for formula in formulas]


def tensors():
    generator = torch.Generator().manual_seed(3)

    def draw(rows):
        return torch.randn(rows, 4, 6, 6, generator=generator)

    target = draw(8)
    reference = target + 0.7 * draw(8)
    policy = reference + 0.2 * draw(8)
    averages = [reference + 0.2 * draw(8) for _ in range(2)]
    return {"model_pred": policy, "ref_pred": reference, "target": target, "ema_preds": averages}


def doubled(values):
    return {
        k: [x.double() for x in v] if isinstance(v, list) else v.double() for k, v in values.items()
    }


def run(block):
    values = tensors()
    values["model_pred"].requires_grad_()
    names = {"fastpo": fastpo, "torch": torch, **NUMBERS, **values}
    exec(block, names)
    names["loss"].backward()
    return names


def test_every_section_has_its_formula():
    assert [title for title, _ in BLOCKS] == [t for t, formulas in THEIRS.items() for _ in formulas]


@pytest.mark.parametrize(
    ("block", "formula"),
    [(block, formula) for (_, block), formula in zip(BLOCKS, FORMULAS, strict=True)],
    ids=[f"{title} {number}" for number, (title, _) in enumerate(BLOCKS)],
)
def test_the_call_gives_the_trainers_loss_and_gradient(block, formula):
    names = run(block)
    values = doubled(tensors())
    values["model_pred"].requires_grad_()
    expected = formula(values)
    expected.backward()
    torch.testing.assert_close(names["loss"].double(), expected, rtol=2e-6, atol=1e-7)
    gradient = names["model_pred"].grad.double()
    exact = values["model_pred"].grad
    assert exact.abs().max() > 0
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_the_logged_numbers_are_the_trainers():
    values = doubled(tensors())
    (e_w, e_l), (r_w, r_l) = (
        errors(values[k], values["target"]) for k in ("model_pred", "ref_pred")
    )
    accuracy = (margin(values) > 0).double().mean()
    assert 0 < accuracy < 1
    blocks = dict(BLOCKS[:2])
    salesforce = run(blocks["Salesforce DiffusionDPO"])
    assert salesforce["raw_model_loss"].item() == pytest.approx((e_w + e_l).mean().item() / 2)
    assert salesforce["raw_ref_loss"].item() == pytest.approx((r_w + r_l).mean().item() / 2)
    assert salesforce["implicit_acc"] == run(blocks["diffusers, SDXL"])["implicit_acc"] == accuracy
    winner = run(dict(BLOCKS)["MaPO"])["winner_loss"].item()
    assert winner == pytest.approx(e_w.mean().item())
