"""The cache on disk: its format, and reading it."""

from fastpo.data.cache.pairs import PairCache

__all__ = [
    "PairCache",
]
