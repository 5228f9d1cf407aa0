"""A user's text file of prompts, one a line; other kinds of file are told apart by their names and their lines.

A JSONL file read as text would be trained on, brackets and all, and nobody would hear of it.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, shown

OTHER_KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON Lines",
    ".jsonlines": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".xml": "XML",
    ".html": "HTML",
    ".htm": "HTML",
    ".toml": "TOML",
    ".py": "Python",
}
HEADINGS = {"prompt", "prompts", "caption", "captions", "text"}  # of a table's column of prompts


def lines_of(name: str, key: str = "prompts") -> list[str]:
    """The lines of the file that the group of settings `key` names, blank ones too. Raises UserError for what is no
    text file of prompts."""
    path = Path(name)
    what = f"{key}.file={shown(name)}"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{what} is no plain file, and it is read more than once: write the prompts into one")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not a text file in UTF-8: give one prompt a line") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    # Not splitlines, which would also break a line at signs that are refused where they stand.
    lines = text.split("\n")
    if not any(line.strip() for line in lines):
        raise UserError(f"{what} holds no prompt: write one a line")
    kind = OTHER_KINDS.get(path.suffix.lower()) or _kind_by_its_lines(text, [line for line in lines if line.strip()])
    if kind is not None:
        raise UserError(
            f"{what} is {kind}, whose lines are no prompts as they stand: write a text of one prompt a line"
        )
    return lines


def _kind_by_its_lines(text: str, lines: Sequence[str]) -> str | None:
    """What kind of file these lines, none of them blank, are like; None for plain text."""
    if text.lstrip()[0] in "[{" and _is_json(text):
        return "JSON"
    if lines[0].strip() in ("[", "{", "[{"):
        return "like JSON"
    if re.match(r"\s*<(!doctype|\?xml|html)", text, re.IGNORECASE):
        return "like HTML or XML"
    if all(re.match(r"\s*(prompts?|captions?|list|text):\s", line) for line in lines):
        return "like YAML"
    lines = [line for line in lines if not line.startswith("#")] or lines
    if all(re.fullmatch(r"\s*{.*}\s*", line) for line in lines):
        return "like JSON, in each line"
    if all(line.strip()[0] in '{["' and _is_json(line.rstrip().rstrip(",")) for line in lines):
        return "like JSON, in each line"
    below = lines[1:] if re.fullmatch(r"[\w-]+:\s*", lines[0]) else lines
    if below and all(re.match(r"\s*- ", line) for line in below):
        return "like a list in YAML"
    return _kind_of_table(lines)


def _kind_of_table(lines: Sequence[str]) -> str | None:
    """Whether these are rows: of columns that the first line names, or of numbers beside prompts."""
    if lines[0].strip().lower() in ("prompt", "prompts"):
        return "a table of one column, by its first line"
    if len(lines) == 1:
        return None
    for separator in ",;|\t":
        heads = [head.strip().lower() for head in lines[0].split(separator)]
        if len(heads) > 1 and HEADINGS & {*heads} and all(re.fullmatch(r"[\w.-]+", head) for head in heads):
            return "a table, by its first line"
    for name, separator in (("TSV", "\t"), ("CSV", ","), ("CSV", ";")):
        try:
            rows = list(csv.reader(lines, delimiter=separator))
        except csv.Error:
            continue
        if len({len(row) for row in rows}) > 1 or len(rows[0]) == 1:
            continue  # prompts may hold commas, but hardly each as many
        headings = {heading.strip().lower() for heading in rows[0]}
        numbered = any(
            all(re.fullmatch(r"\s*[\d.]+\s*", cell) for cell in column) for column in zip(*rows, strict=True)
        )
        if separator == "\t" or headings & HEADINGS or numbered:
            return f"like {name}"
    return "like CSV, in quotes" if all(re.fullmatch(r'\s*".*"\s*', line) for line in lines) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
