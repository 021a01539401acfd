"""A folder's manifest: size and checksum of each of its files, in a file beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo.system.checksums import Checksum, first_difference, forget

MANIFEST = "manifest.json"


class FolderManifest(BaseModel):
    """What a manifest holds.

    Attributes:
        format: Version of its layout.
        files: The checksums by path in the folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    files: dict[str, Checksum]


def write_manifest(folder: Path, files: Mapping[str, Checksum], name: str = MANIFEST) -> None:
    """Writes a manifest into a folder that is being made, and is flushed as a whole when it is."""
    (folder / name).write_text(FolderManifest(files=dict(files)).model_dump_json(indent=1) + "\n")


def find_damage(folder: Path, name: str = MANIFEST, *, from_disk: bool = False) -> str | None:
    """Compares a folder's files with its manifest: all sizes first, then each checksum.

    Args:
        folder: The folder.
        name: The manifest's file in it.
        from_disk: Drops the system's copies of the (flushed) files first, so that the disk answers.

    Returns:
        Which file is wrong and why; None if every recorded file is as it was written.
    """
    path = folder / name
    try:
        manifest = FolderManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except ValidationError as error:
        return f"{path} is damaged ({first_mistake(error)})"
    if from_disk:
        for file in manifest.files:
            forget(folder / file)
    return first_difference(folder, manifest.files)


def first_mistake(error: ValidationError) -> str:
    """Says where a record first differs from what it should hold, and how: `files.a.bytes: ...`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
