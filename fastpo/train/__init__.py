"""Training: `train(config)`, or `python -m fastpo.train CONFIG` under any launcher."""

from typing import TYPE_CHECKING

from fastpo.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastpo.train.loop import train as train
    from fastpo.train.observers import Observer as Observer

__all__ = [
    "Observer",
    "train",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Observer": "fastpo.train.observers",
        "train": "fastpo.train.loop",
    },
)
