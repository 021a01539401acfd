"""Samples of the base and of the aligned model, scored side by side."""

from typing import TYPE_CHECKING

from fastpo.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastpo.evaluate.compare import Evaluation as Evaluation
    from fastpo.evaluate.compare import evaluate as evaluate
    from fastpo.evaluate.compare import score_folder as score_folder
    from fastpo.evaluate.compare import score_images as score_images
    from fastpo.evaluate.scorers import Scorer as Scorer

__all__ = [
    "Evaluation",
    "Scorer",
    "evaluate",
    "score_folder",
    "score_images",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Evaluation": "fastpo.evaluate.compare",
        "Scorer": "fastpo.evaluate.scorers",
        "evaluate": "fastpo.evaluate.compare",
        "score_folder": "fastpo.evaluate.compare",
        "score_images": "fastpo.evaluate.compare",
    },
)
