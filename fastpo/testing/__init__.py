"""Tiny pipelines and data sets in the formats of the real ones, for tests and demonstrations."""

from fastpo.testing.pipelines import (
    PROMPT_LENGTH,
    image_bytes,
    pickapic_row,
    tiny_sd15_folder,
    tiny_sdxl_folder,
    write_folder,
    write_index,
    write_pickapic,
    write_pickapic_columns,
)

__all__ = [
    "PROMPT_LENGTH",
    "image_bytes",
    "pickapic_row",
    "tiny_sd15_folder",
    "tiny_sdxl_folder",
    "write_folder",
    "write_index",
    "write_pickapic",
    "write_pickapic_columns",
]
