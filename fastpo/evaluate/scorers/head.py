"""Heads of linear layers without activations, as LAION's predictor and ImageReward have them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]


def linear_layers(state: Mapping[str, Tensor], width: int) -> Layers:
    """Returns weight and bias of each `layers.<i>`, in order.

    Args:
        state: The head's tensors.
        width: Features that the first layer must take.

    Raises:
        ValueError: The layers do not lead from `width` features to one number.
    """
    found = [re.fullmatch(r"layers\.(\d+)\.weight", name) for name in state]
    order = sorted(int(match[1]) for match in found if match)
    try:
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in order]
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    shapes = [tuple(weight.shape) for weight, _ in layers]
    takes = [width, *(len(weight) for weight, _ in layers)]
    fits = all(
        len(shape) == 2 and shape[1] == before for shape, before in zip(shapes, takes, strict=False)
    )
    if not layers or takes[-1] != 1 or not fits:
        raise ValueError(
            f"it must lead from {width} features to one number, its layers are {shapes}"
        )
    return layers


def apply_layers(layers: Layers, features: Tensor) -> Tensor:
    """Returns `(N,)` float64 of `(N, D)`; dropout between the layers is off, as when released."""
    x = features.double()
    for weight, bias in layers:
        x = torch.nn.functional.linear(x, weight.to(x), bias.to(x))
    return x[:, 0]
