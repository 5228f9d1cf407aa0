"""The project's version, and by which version a run was written: config.yaml says so in its first line."""

import re
from pathlib import Path

VERSION = "0.6.5"  # pyproject.toml reads it here; CHANGELOG.md says what each brought
HEADING = f"# ddpo-ray {VERSION}\n"


def written_by(config_file: Path) -> str:
    """Such as "version 0.6.0", by a run's config.yaml; "a version before 0.5" where it does not say."""
    with config_file.open(encoding="utf-8", errors="replace") as file:
        found = re.match(r"# ddpo-ray ([\w.+-]+)$", file.readline(100))
    return f"version {found[1]}" if found else "a version before 0.5"


def goes_on(written: str) -> bool:
    """Whether this version goes on with a run of that one: only the last of the three numbers may be another."""
    return written.rpartition(".")[0] == f"version {VERSION}".rpartition(".")[0]
