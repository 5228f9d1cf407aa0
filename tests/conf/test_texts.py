"""Texts of all sorts at every text setting: used as they are written, or refused in one sentence before a file is made.

Only two things are not taken by the letter: `~` is written out where a setting is a place, and null is none.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import LONGEST, UserError
from conf.load import load
from conf.prompts import resolve_prompts
from conf.resume import check_same, save_config
from conf.schema import Config, PromptsConfig
from conf.settings import hint_of, is_text, without_null
from conf.settings import settings as all_settings
from conf.validate import validate

KEYS = [setting.key.replace("<name>", "mine") for setting in all_settings()]
LONE = [key for key in KEYS if is_text(hint_of(key)) and key != "experiment"]  # that is the command's first word
LISTS = [key for key in KEYS if without_null(hint_of(key)) == list[str]]
PLACES = {"run.dir", "run.mirror", "model.path", "model.lora.init_from", "prompts.file", "ray.temp_dir"}

# What YAML, OmegaConf, a shell or a file system takes for something else.
LOOKALIKES = (
    "007 7 1_000 0x10 0o7 08 1e3 -1 .5 .inf nan 12:30:00 2024-01-01 yes no on off y n true False null Null ~ ~/x "
    "~nobody/x ~root @x *x &x !x !!int %x #x - ? : = < << > | ` {} [] {a: [a ,a a,b ' '' \" '007' \\ \\n a\\tb a=b ??? "
    "${x} ${run.dir} $HOME/x ${HOME} \\${x} $5 a$b . .. ../x / /x //x x/ a/~/b file:///~/x file:///x s3://b/~x"
).split()
LOOKALIKES += [
    "",
    " ",
    " x",
    "x ",
    "a cat: big",
    "a #b",
    "a, b",
    "a: [b",
    "- a",
    "--- a",
    "a\n b",
    "x" * 300,
    "é" * 130,
]
LOOKALIKES += [
    "x" * 100_000,
    "a/" * 3000,
    "a cat\t",
    "\x00",
    "\x07",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
]
LOOKALIKES += [
    "a\u2028b",
    "a\u2029b",
    "a\u202eb",
    "\ufeffa",
    "\ufffe",
    "\ud800",
    "\udcff",
    "\u200f",
    "a\xa0b",
    "\u3000",
]
LOOKALIKES += [
    "👨‍👩‍👧 on the beach",
    "❤️",
    "so\xadft",
    "naïve",
    "nai\u0308ve",
    "קֻמְקוּם",
    "قِطّ",
    "नमस्ते",
    "猫",
    "\U0010ffff",
]
ANY = st.one_of(
    st.sampled_from(LOOKALIKES),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.text("aA0 ~/.:,#-=[]{}'\"\\$&*!|>%@`\n\tü😀", max_size=12),
)
QUICK = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def taken(words: list[str]) -> Config | None:
    """The configuration of a command, or None where it is refused as it should be: in one sentence, leaving nothing."""
    here = Path.cwd()
    before = sorted(here.iterdir())
    try:
        config = load(words)
        validate(config)
        prompts = resolve_prompts(config.prompts)
    except UserError as error:
        assert 10 < len(str(error)) <= LONGEST and str(error).isprintable(), str(error)
        assert sorted(here.iterdir()) == before
        return None
    save_config(here / "saved", config, prompts)
    check_same(here / "saved", config, prompts)
    assert load([str(here / "saved" / "config.yaml")]) == config
    (here / "saved" / "prompts.txt").read_bytes().decode("utf-8")
    return config


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def meant(key: str, text: str) -> str:
    """What a text that was accepted stands for."""
    if key in PLACES:
        text = os.path.expanduser(text)  # noqa: PTH111
    return str(Path(text).absolute()) if key == "ray.temp_dir" else text


@pytest.mark.long
@settings(QUICK, max_examples=50)
@given(st.sampled_from(LONE), ANY)
@example("run.name", "007")
@example("run.dir", "~/x")
@example("ray.temp_dir", "猫")
def test_a_text_of_the_command_line_is_used_as_written_or_refused(key: str, text: str) -> None:
    config = taken(["compressibility", f"{key}={text}"])
    if config is not None:
        none = text == "null" and without_null(hint_of(key)) is not hint_of(key)
        assert value_of(config, key) == (None if none else meant(key, text))


@pytest.mark.long
@settings(QUICK, max_examples=40)
@given(st.sampled_from(LONE), ANY, st.booleans())
@example("run.name", "007", True)
@example("run.name", "2024-01-01", True)
@example("ray.address", "12:30:00", True)
def test_a_text_of_a_file_is_used_as_written_or_refused(key: str, text: str, plain: bool) -> None:
    if plain and ("\n" in text or " #" in text or text[:1] in ("#", "&", "'", '"', "|", ">")):
        return  # a comment, an anchor, quotes and folded lines are YAML's, and meant
    *groups, last = key.split(".")
    lines = [f"{'  ' * depth}{group}:" for depth, group in enumerate(groups)]
    try:
        written = text if plain else yaml.safe_dump(text, width=10**9).removesuffix("\n").removesuffix("\n...")
    except UnicodeEncodeError:
        return
    lines.append(f"{'  ' * len(groups)}{last}: {written}")
    Path("mine.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    needed = ["prompts.list=[a cat]"] * (not key.startswith("prompts"))
    needed += ["rewards.mine.path=m:C"] * (not key.startswith("rewards"))
    needed += ["run.name=mine"] * (key != "run.name")
    config = taken(["mine.yaml", *needed])
    if config is not None:
        nothing = plain and yaml.safe_load(f"a: {text}")["a"] is None
        assert value_of(config, key) == (None if nothing else meant(key, text.strip(" ") if plain else text))


@pytest.mark.long
@settings(QUICK, max_examples=50)
@given(st.sampled_from(LISTS), ANY, st.booleans())
@example("prompts.list", "a cat: big", False)
@example("prompts.list", "007", False)
@example("prompts.list", "&x a", False)
@example("prompts.list", "!x a", False)
@example("prompts.list", "a\n b", False)
@example("prompts.list", "a\x85b", True)
def test_an_entry_of_a_list_is_used_as_written_or_refused(key: str, text: str, quoted: bool) -> None:
    written = json.dumps(text, ensure_ascii=False) if quoted else text
    config = taken(["compressibility", f"{key}=[first, {written}]"])
    if config is None:
        return
    found = value_of(config, key)
    parts = [text] if quoted else [part.strip(" ") for part in text.split(",")]
    if quoted or not any(part[:1] in ("'", '"') for part in parts):  # quotes are YAML's, and meant
        assert found == ["first", *parts[:-1], *filter(None, parts[-1:])]


@settings(QUICK, max_examples=100)
@given(st.lists(ANY, min_size=1, max_size=4))
@example(["👨‍👩‍👧 on the beach", "a\xa0cat", "so\xadft"])
@example(["a\x0bcat"])
@example(["a cat\u2028"])
@example(["café", "cafe\u0301"])
def test_a_line_of_a_prompt_file_is_used_as_written_or_refused(lines: list[str]) -> None:
    lines = [" ".join(line.splitlines()) if "\r" in line or "\n" in line else line for line in lines]
    Path("prompts.txt").write_bytes("\n".join(lines).encode("utf-8", "replace"))
    try:
        prompts = resolve_prompts(PromptsConfig(file="prompts.txt"))
    except UserError as error:
        assert len(str(error)) <= LONGEST and str(error).isprintable(), str(error)
        return
    assert prompts == [line.strip() for line in lines if line.strip()]
    assert all(len(prompt.splitlines()) == 1 for prompt in prompts)
