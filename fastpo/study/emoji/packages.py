"""The two npm packages that hold the pictures: found in a folder, or fetched by npm.

`emoji-datasource-google` holds Noto Emoji (Apache License 2.0), `emoji-datasource-twitter` Twemoji
(CC BY 4.0); the packages' own files are under the MIT license. The pictures stay in the folder of
the study, and are nowhere in this project.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastpo.errors import DataError
from fastpo.study.emoji.pictures import STYLES

VERSION = "16.0.0"
PACKAGES = {style: f"emoji-datasource-{style}" for style in STYLES}
MOST_BYTES = 1 << 26  # of one file that is unpacked
FETCH_SECONDS = 900


def packages_in(folder: Path) -> dict[str, Path]:
    """Returns each style's package in a folder that holds both, such as `node_modules`.

    Raises:
        DataError: One of them is not there.
    """
    found = {style: folder / name for style, name in PACKAGES.items()}
    for path in found.values():
        if not path.is_dir():
            raise DataError(
                f"{path}: no such folder; expected the unpacked npm package {path.name} {VERSION}"
            )
    return found


def fetch_packages(folder: Path) -> dict[str, Path]:
    """Downloads both packages with `npm pack` and unpacks what is needed of them.

    Args:
        folder: An empty folder, which gets a folder for each package, and both archives.

    Returns:
        Each style's package.

    Raises:
        DataError: npm is not installed, or could not download them.
    """
    npm = shutil.which("npm")
    wanted = [f"{name}@{VERSION}" for name in PACKAGES.values()]
    if npm is None:
        raise DataError(
            f"the pictures are in the npm packages {' and '.join(wanted)}, and npm is not "
            "installed: unpack both into one folder and name it by the world's key packages"
        )
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), *wanted]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout).split())[-300:]
        raise DataError(f"npm pack {' '.join(wanted)} failed: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"npm pack {' '.join(wanted)} took over {FETCH_SECONDS} s and was ended"
        ) from error
    for style, name in PACKAGES.items():
        unpack(folder / f"{name}-{VERSION}.tgz", folder / name, style)
    return packages_in(folder)


def unpack(archive: Path, folder: Path, style: str) -> None:
    """Unpacks a package's list of emoji and its pictures of 64 pixels.

    Raises:
        DataError: It is no such archive.
    """
    prefix = f"package/img/{style}/64/"
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                wanted = member.name == "package/emoji.json" or member.name.startswith(prefix)
                if not (wanted and member.isfile() and member.size <= MOST_BYTES):
                    continue
                member.name = member.name.removeprefix("package/")
                tar.extract(member, folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{archive} is no npm package that can be unpacked: {error}") from error


@contextmanager
def fetched() -> Iterator[dict[str, Path]]:
    """Gives both packages in a temporary folder; errors as in `fetch_packages`."""
    with tempfile.TemporaryDirectory(prefix="emoji-packages-") as folder:
        yield fetch_packages(Path(folder))
