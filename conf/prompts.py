"""The prompts of a run, from exactly one of a named set, a list, or the user's text file."""

import difflib
import unicodedata
from pathlib import Path

from common.errors import UserError, quoted, shown
from conf.schema import Config, PromptsConfig
from conf.texts import unwritable
from prompts.files import lines_of
from prompts.sets import named_sets, prompts_of

# CLIP reads 77 tokens; a line far beyond is no prompt but, say, a page of text without line breaks.
LONGEST = 1000
BLANK_LETTERS = "\u115f\u1160\u3164\uffa0"  # Hangul fillers, which Unicode counts as letters


def prompts_of_run(config: Config) -> list[str]:
    """Those of the settings; of a replay those of the runs that it learns from. Raises UserError."""
    if not config.run.replay:
        return resolve_prompts(config.prompts)
    return list(dict.fromkeys(prompt for run in config.run.replay for prompt in saved_prompts(Path(run))))


def saved_prompts(run_dir: Path) -> list[str]:
    """Those that a run was begun with. Raises UserError where they are lost."""
    path = run_dir / "prompts.txt"
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run_dir}: a prompts.txt cannot be read ({error}): put it back") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt: put it back")
    return prompts


def resolve_prompts(prompts: PromptsConfig, key: str = "prompts") -> list[str]:
    """The prompts that `prompts`, the group of settings `key`, asks for, in a fixed order, stripped, none twice.
    Raises UserError."""
    given = {"set": prompts.set, "list": prompts.list, "file": prompts.file}
    chosen = [f"{key}.{name}" for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            f"{' and '.join(chosen) or f'none of {key}.set, {key}.list and {key}.file'} "
            f"{'are' if chosen else 'is'} given: give exactly one"
        )
    if prompts.set is not None:
        return _named_set(prompts.set, key)
    if prompts.list is not None:
        return _checked(prompts.list, f"{key}.list", "entry")
    assert prompts.file is not None
    return _checked(lines_of(prompts.file, key), f"{key}.file={shown(prompts.file)}", "line", blank_is_skipped=True)


def _named_set(name: str, key: str) -> list[str]:
    known = named_sets()
    if name not in known:
        close = difflib.get_close_matches(name[:100], known, n=1)
        guess = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"{key}.set={shown(name)} is not a prompt set{guess} (`python launch.py --help` lists them)")
    return prompts_of(name)


def _checked(texts: list[str], source: str, unit: str, blank_is_skipped: bool = False) -> list[str]:
    """Stripped prompts. A prompt that stands twice is refused: statistics are kept for each prompt."""
    seen: dict[str, tuple[int, str]] = {}  # by what is seen of a prompt: an accent may be a sign of its own
    for number, text in enumerate(texts, start=1):
        if (problem := unwritable(text)) is not None:
            raise UserError(f"{source}: {unit} {number} ({quoted(text, 60)}) holds {problem}: remove it")
        prompt = text.strip()
        if not prompt:
            if blank_is_skipped:
                continue
            raise UserError(f"{source}: {unit} {number} is blank, give it a text or leave it out")
        if all(unicodedata.category(sign)[0] in "CZ" or sign in BLANK_LETTERS for sign in prompt):
            raise UserError(f"{source}: {unit} {number} ({quoted(ascii(prompt), 60)}) shows nothing: leave it out")
        if len(prompt) > LONGEST:
            raise UserError(
                f"{source}: {unit} {number} has {len(prompt)} characters, and a prompt at most {LONGEST}: shorten it"
            )
        earlier, other = seen.setdefault(unicodedata.normalize("NFC", prompt), (number, prompt))
        if earlier != number:
            alike = "" if other == prompt else ", with its accents in other signs"
            raise UserError(
                f"{source}: {quoted(prompt)} stands in {unit} {earlier} and in {unit} {number}{alike}: remove one"
            )
    if not seen:
        raise UserError(f"{source} is empty: give at least one prompt")
    return [prompt for _, prompt in seen.values()]
