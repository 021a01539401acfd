"""What prompts give, at their true length: padding of zeros is left out and made again.

A text part's file holds a condition of N prompts as one tensor `(N, ...)`, or, where much of it is
zeros behind the prompts' own tokens, each prompt's tokens as a tensor of their own, `(1, L, D)`,
named `condition:length:slot`: `prompt_embeds:512:7` is the eighth prompt of the part, padded to 512
when it is read. A prompt is read by itself, whichever way. Parts may have texts of other lengths;
of those that are read together the longest counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastpo.data.cache.tensors import TensorFiles, bytes_of

_KEY = re.compile(r"(.+):(\d+):(\d+)")
WORTH = 0.75
"""Of the padded size; what is not shortened below it stays one tensor."""


def without_padding(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors to be written of a part's conditions, each `(N, ...)`."""
    found: dict[str, Tensor] = {}
    for name, values in conditions.items():
        lengths = true_lengths(values) if values.ndim == 3 and len(values) else None
        if lengths is None or int(lengths.sum()) > WORTH * len(values) * values.shape[1]:
            found[name] = values
            continue
        for slot, length in enumerate(lengths.tolist()):
            key = f"{name}:{values.shape[1]}:{slot}"
            found[key] = values[slot : slot + 1, :length].contiguous()
    return found


def true_lengths(values: Tensor) -> Tensor:
    """Returns how many tokens of each text `(N, L, D)` come before zeros alone, `(N,)`, from 1."""
    places = torch.arange(1, values.shape[1] + 1)
    return (places * (values != 0).any(dim=2)).amax(dim=1).clamp(min=1)


class TextRows:
    """Reads conditions of prompts by part and slot; any number of threads may read."""

    def __init__(self, files: TensorFiles) -> None:
        """Reads nothing yet.

        Args:
            files: The cache's files of tensors.
        """
        self._files = files
        self._lengths: dict[str, dict[str, int | None]] = {}

    def read(self, places: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        """Returns each condition of the prompts, `(B, ...)`.

        Args:
            places: B prompts: the part's file, and the prompt's slot in it.

        Raises:
            CacheError: A file is damaged.
        """
        return {name: self._condition(name, places) for name in self._conditions(places[0][0])}

    def _conditions(self, file: str) -> dict[str, int | None]:
        """The conditions in a file by name, with the padded length of those cut to their tokens."""
        if file not in self._lengths:
            found: dict[str, int | None] = {}
            for key in self._files.keys(file):
                match = _KEY.fullmatch(key)
                found[match[1] if match else key] = int(match[2]) if match else None
            self._lengths[file] = found
        return self._lengths[file]

    def _condition(self, name: str, places: Sequence[tuple[str, int]]) -> Tensor:
        stored, longest = [], 0
        for file, slot in places:
            length = self._conditions(file).get(name)
            key, slot = (name, slot) if length is None else (f"{name}:{length}:{slot}", 0)
            rows = self._files.rows(file, key)
            longest = max(longest, length or rows.shape[0])
            stored.append((file, key, slot, rows.shape[0]))
        found = torch.zeros((len(places), longest, *rows.shape[1:]), dtype=rows.dtype)
        for row, (file, key, slot, length) in enumerate(stored):
            self._files.read(file, key, slot, bytes_of(found[row : row + 1, :length]))
        return found
