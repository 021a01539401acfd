"""What the samples are scored by: named scorers behind one protocol.

| name in `evaluate.scorers` | metrics                        | what it needs                      |
|----------------------------|--------------------------------|------------------------------------|
| `pickscore[:path]`         | `pickscore`                    | PickScore v1 (CLIP-H)              |
| `hpsv2[:path]`             | `hpsv2`, cosine x 100          | HPSv2.0's checkpoint (OpenCLIP)    |
| `hpsv2.1[:path]`           | `hpsv2.1`, cosine x 100        | HPSv2.1's checkpoint (OpenCLIP)    |
| `hpsv3[:path]`             | `hpsv3`                        | its checkpoint (Qwen2-VL, a head)  |
| `imagereward[:path]`       | `imagereward`                  | its checkpoint (BLIP and a head)   |
| `clip[:path]`              | `clip`, cosine x 100           | any CLIP model, default ViT-L/14   |
| `aesthetic:path`           | `aesthetic`, about 1 to 10     | LAION's head on CLIP ViT-L/14      |
| `clip_iqa[:path]`          | `clip_iqa`, 0 to 1             | any CLIP model; no prompt          |
| `diversity[:path]`         | `diversity`, 0 to 2            | any CLIP model; two images each    |
| `digits`                   | `ink_reward`, `ink`, `legible` | the demonstration's own scorer     |

A path is a folder, a file or a hub id. Any object with `name` and `score` serves as well:
`evaluate(config, scorers=[mine])`.
"""

from fastpo.evaluate.scorers.aesthetic import AestheticScorer
from fastpo.evaluate.scorers.base import (
    BATCH_SIZE,
    Scorer,
    Scores,
    WeightedScorer,
    needs_groups,
    reads_prompts,
)
from fastpo.evaluate.scorers.clip import (
    ClipScorer,
    DiversityScorer,
    PickScorer,
    QualityScorer,
)
from fastpo.evaluate.scorers.registry import SCORERS, ScorerEntry, build_scorer, build_scorers

__all__ = [
    "BATCH_SIZE",
    "SCORERS",
    "AestheticScorer",
    "ClipScorer",
    "DiversityScorer",
    "PickScorer",
    "QualityScorer",
    "Scorer",
    "ScorerEntry",
    "Scores",
    "WeightedScorer",
    "build_scorer",
    "build_scorers",
    "needs_groups",
    "reads_prompts",
]
