"""Keeps other libraries' progress bars off the console; what they warn of is still told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bars() -> Iterator[None]:
    """Hides diffusers' and transformers' bars over the weights they read from the disk.

    A download's bar stays unless it begins inside of the block: transformers hides the hub's too.
    """
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    hidden_by_user = are_progress_bars_disabled()
    libraries = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            if library is diffusers_logging or not hidden_by_user:
                library.enable_progress_bar()
