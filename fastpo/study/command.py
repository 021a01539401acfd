"""The command `fastpo study`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastpo.errors import ConfigError
from fastpo.study.config import StudyConfig, load_study
from fastpo.study.page import check_page, write_page
from fastpo.study.run import Options, StudyError, run_study
from fastpo.study.trials import Choice
from fastpo.system.ownership import protecting
from fastpo.system.signals import catch_signals


def study_command(path: Path, options: Options, page: Path | None) -> None:
    """Makes the runs that a study lacks, then its table and page.

    Args:
        path: The study's YAML file, or the name of one that is shipped.
        options: How it is made.
        page: A Markdown file that gets tables and figures; see `fastpo.study.page`.

    Raises:
        ConfigError: The YAML, or what is chosen of it, is wrong.
        ForeignPathError: A file or folder to be written is something else.
        StudyError: Some runs failed; table and page are written with the others.
    """
    study = load_study(path)
    check_choice(study, options.choice)
    if page is not None:
        check_page(page)
    with catch_signals(), protecting([path] if path.exists() else []):
        try:
            rows = run_study(study, options)
        except StudyError:
            _write(page, study, options)
            raise
        _write(page, study, options)
    Console(stderr=True).print(f"{len(rows)} runs: {options.table}", highlight=False)


def _write(page: Path | None, study: StudyConfig, options: Options) -> None:
    if page is not None:
        write_page(page, study, options.table, short=options.short)


def check_choice(study: StudyConfig, choice: Choice) -> None:
    """Refuses a choice of what the study does not have.

    Raises:
        ConfigError: The text names what it has.
    """
    known = {
        "--part": (choice.parts, [part.name for part in study.parts]),
        "--method": (choice.methods, [name for part in study.parts for name in part.methods]),
        "--seed": (choice.seeds, [s for part in study.parts for s in part.seeds or study.seeds]),
        "--flips": (choice.flips, [share for part in study.parts for share in part.flips]),
    }
    for option, (asked, there) in known.items():
        for value in asked:
            if value not in there:
                listed = ", ".join(map(str, dict.fromkeys(there)))
                raise ConfigError(f"{option}: the study has {listed}, got {value}")
