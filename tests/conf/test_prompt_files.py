"""A prompt file is a text of one prompt a line; what is another kind of file is refused, and what looks odd is not."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from conf.prompts import resolve_prompts
from conf.schema import PromptsConfig

PROMPTS = ["a cat, sleeping", "two dogs", "a horse on the beach"]
OTHERS = {
    "jsonl": "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS),
    "ndjson with blanks": "\n\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS),
    "jsonl of texts": "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS),
    "jsonl of lists": "".join(json.dumps([prompt]) + "\n" for prompt in PROMPTS),
    "json": json.dumps(PROMPTS),
    "json indented": json.dumps(PROMPTS, indent=2),
    "json object": json.dumps({"prompts": PROMPTS}, indent=2),
    "json cut off": json.dumps(PROMPTS, indent=2)[:-10],
    "csv": "id,prompt\n" + "".join(f'{i},"{prompt}"\n' for i, prompt in enumerate(PROMPTS)),
    "csv of one column": "prompt\n" + "\n".join(PROMPTS),
    "csv without headings": "".join(f'{i},"{prompt}"\n' for i, prompt in enumerate(PROMPTS)),
    "csv with semicolons": "prompt;score\n" + "".join(f"{prompt};0.5\n" for prompt in PROMPTS),
    "csv in quotes": "".join(f'"{prompt}"\n' for prompt in PROMPTS),
    "tsv": "".join(f"{i}\t{prompt}\n" for i, prompt in enumerate(PROMPTS)),
    "csv of uneven rows": "id,prompt\n" + "".join(f"{i},{prompt}\n" for i, prompt in enumerate(PROMPTS)),
    "table with bars": "id|prompt\n" + "".join(f"{i}|{prompt}\n" for i, prompt in enumerate(PROMPTS)),
    "jsonl below a comment": "# mine\n" + "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS),
    "Python's dicts": "".join(f"{{'prompt': '{prompt}'}}\n" for prompt in PROMPTS),
    "html": "<!DOCTYPE html>\n<html>\n" + "\n".join(PROMPTS),
    "xml": '<?xml version="1.0"?>\n' + "\n".join(PROMPTS),
    "yaml keys": "".join(f"prompt: {prompt}\n" for prompt in PROMPTS),
    "yaml flow list": f"list: [{', '.join(PROMPTS)}]\n",
    "yaml list": "".join(f"- {prompt}\n" for prompt in PROMPTS),
    "yaml list with a key": "prompts:\n" + "".join(f"  - {prompt}\n" for prompt in PROMPTS),
}


def resolve(path: Path) -> list[str]:
    return resolve_prompts(PromptsConfig(file=str(path)))


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_another_kind_of_file_is_known_by_its_lines(content: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"prompts\.file=.*one prompt a line") as caught:
        resolve(path)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize(
    "ending", ["json", "jsonl", "NDJSON", "csv", "tsv", "yaml", "yml", "parquet", "jsonlines", "htm", "py"]
)
def test_another_kind_of_file_is_known_by_its_name(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{ending}"
    path.write_text("\n".join(PROMPTS))
    with pytest.raises(UserError, match="one prompt a line"):
        resolve(path)


def test_a_binary_table_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    pq.write_table(pa.table({"prompt": PROMPTS}), path)
    with pytest.raises(UserError, match=r"prompts\.file="):
        resolve(path)


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS,
        ["a cat, a dog", "a horse, a bee"],
        ["a cat: big", "- a dog", "# a heading"],
        ["{a cat}", "[a dog]", '"a horse" in quotes'],
        ["two dogs, 2", "a cat"],
        ["prompt engineering", "a cat"],
        ["text, in capitals", "a cat"],
        ["# a cat", "# a dog"],
        ["👨‍👩‍👧 on the beach", "❤️", "so\xadft", "a\xa0cat", "קֻמְקוּם", "नमस्ते", "猫"],
        ["007", "yes", "null", "~", "1e3"],
    ],
    ids=lambda prompts: prompts[0],
)
def test_plain_prompts_are_taken_as_they_stand(prompts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("\n".join(prompts), encoding="utf-8")
    assert resolve(path) == prompts


@pytest.mark.parametrize("sign", [0x00, 0x07, 0x0B, 0x0C, 0x1C, 0x1E, 0x85, 0x9B, 0x2028, 0x2029, 0x202E, 0xFEFF])
def test_signs_that_would_break_a_line_or_steer_a_terminal_are_refused(sign: int, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for text in (f"a{chr(sign)}cat", f"a cat{chr(sign)}"):
        path.write_text(f"two dogs\n{text}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"line 2 .* holds"):
            resolve(path)


def test_prompts_that_differ_only_in_how_an_accent_is_written_are_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("café\ncafe\u0301\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1 and in line 2, with its accents in other signs"):
        resolve(path)


@pytest.mark.parametrize("text", ["\u200b", "\u00ad", "\u3164", "\u2060\u200d"], ids=ascii)
def test_a_prompt_that_shows_nothing_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"two dogs\n{text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2 .*(shows nothing|holds)"):
        resolve(path)


def test_a_pipe_is_refused_as_it_can_be_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no plain file"):
        resolve(tmp_path / "pipe")
