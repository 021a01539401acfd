"""Training: `train(config)`, or `python -m fastpo.train CONFIG` under any launcher."""

from typing import TYPE_CHECKING

from fastpo.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastpo.train.loop import train as train

__all__ = [
    "train",
]

__getattr__ = lazy_names(
    __name__,
    {
        "train": "fastpo.train.loop",
    },
)
