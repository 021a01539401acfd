"""Whether weights are finite: asked before they are saved, with one read of the device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastpo.train.distributed import Processes
from fastpo.train.state import TrainingState


def non_finite_weights(state: TrainingState, processes: Processes) -> list[str]:
    """Names the weights and averages that hold NaN or infinity on any process (collective).

    Where processes share weights each looks at its own parts.
    """
    groups = {"the weight": state.weights.local}
    groups |= {f"the average ({role})": a.state_dict() for role, a in state.averages.items()}
    names = [f"{kind} {name}" for kind, tensors in groups.items() for name in tensors]
    bad = torch.cat([_not_finite(tensors, processes.device) for tensors in groups.values()])
    counts = processes.sum(bad).tolist()
    return [name for name, count in zip(names, counts, strict=True) if count]


@torch.no_grad()
def _not_finite(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """1 for each tensor with NaN or infinity, `(n,)` int64, by one fused reduction."""
    parts = [tensor.detach() for tensor in tensors.values()]
    filled = [part.numel() > 0 for part in parts]
    # The largest absolute value is infinite or NaN exactly where an element is.
    norms = torch._foreach_norm([p for p in parts if p.numel()], math.inf)
    result = torch.zeros(len(parts), dtype=torch.int64, device=device)
    if norms:
        largest = torch.stack([norm.float() for norm in norms]).to(device)
        result[torch.tensor(filled, device=device)] = (~torch.isfinite(largest)).long()
    return result
