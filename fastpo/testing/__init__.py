"""Tiny pipelines and data sets in the formats of the real ones, for tests and demonstrations."""

from fastpo.testing.datasets import (
    image_bytes,
    pickapic_row,
    write_folder,
    write_index,
    write_pickapic,
    write_pickapic_columns,
)
from fastpo.testing.pipelines import PROMPT_LENGTH, tiny_sd15_folder, tiny_sdxl_folder
from fastpo.testing.scorers import tiny_clip_folder
from fastpo.testing.single_files import write_single_file

__all__ = [
    "PROMPT_LENGTH",
    "image_bytes",
    "pickapic_row",
    "tiny_clip_folder",
    "tiny_sd15_folder",
    "tiny_sdxl_folder",
    "write_folder",
    "write_index",
    "write_pickapic",
    "write_pickapic_columns",
    "write_single_file",
]
