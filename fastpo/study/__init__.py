"""Studies: which labels are wrong, and does handling them help; run from a checkout."""

from pathlib import Path

STUDIES = Path(__file__).parent / "configs"
"""The studies that are shipped, `NAME.yaml` each."""


def shipped() -> list[str]:
    """Returns the names of the studies that are shipped."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))
