"""From the command line to a typed Config.

    schema.py's defaults  <-  conf/default.yaml  <-  conf/experiment/<name>.yaml  <-  key=value on the command line

A text is used as it is written: on the command line to the last sign, in a file as typed_yaml.py has it.
The first word is the experiment: a name in conf/experiment, or the path of a YAML file (a run's config.yaml, too).
Everything that is wrong with any of them is a UserError of one sentence.
"""

import dataclasses
import difflib
import functools
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from common.errors import UserError, quoted, shown
from common.version import goes_on, written_by
from conf import replay, typed_yaml
from conf.evaluations import used_rewards
from conf.names import check_name
from conf.places import ROOT, anchored, is_file, write_out
from conf.schema import Config
from conf.settings import hint_of, holds_texts, is_text, section_type, settings, type_name
from conf.texts import check_texts
from prompts.sets import named_sets

CONF = Path(__file__).resolve().parent
# What is meant for one objective or advantage and no other, with its default. A penalty on the KL is in the unit of its
# objective's loss.
BELONGS: dict[str, dict[str, Any]] = {
    "objective": {"objective_args": {}, "kl_weight": 0.0, "kl_target": None, "train_share": 1.0},
    "advantage": {"advantage_args": {}},
}
HELP = """usage: python launch.py EXPERIMENT [KEY=VALUE ...]

  python launch.py compressibility learner.lr=5e-4 run.name=mine
  python launch.py my_experiment.yaml run.name=second_try
  python launch.py replay from=runs/a,runs/b learner.objective=rwr    a new LoRA from what those runs have sampled

The same command on an existing run goes on with it; docs/configuration.md says what may change.
While it runs: python launch.py --scale runs/NAME samplers.count=4 rewards.NAME.count=2
The version: python launch.py --version

experiments (conf/experiment), or the path of a YAML file:"""


def load(argv: list[str]) -> Config:
    """The configuration that a command line asks for, such as ["compressibility", "learner.lr=1e-4"].

    Without a first word the experiment of conf/default.yaml is taken. Raises UserError.
    """
    default = read_yaml(CONF / "default.yaml")
    word, overrides = (argv[0], argv[1:]) if argv and _is_experiment(argv[0]) else (default["experiment"], argv)
    if word == replay.WORD:
        runs, overrides = replay.runs_of(overrides)
        path = runs[0] / "config.yaml"
        layers = [replay.layer(runs, _experiment(path)), {"experiment": word}]
        replay.check_words(parse_overrides(overrides))
    else:
        path = experiment_path(word)
        layers = [{"experiment": path.stem}, _experiment(path)]
    merged: dict[str, Any] = {}
    for layer in (default, *layers):
        merged = merge(merged, layer, f"{_named(path)}: ")
    own = parse_overrides(overrides)
    for text in overrides:
        if _parse_override(text)[1] == {}:  # also where later words set something below the key
            merged = merge(merged, parse_overrides([text]), "")
    config = _in_the_checkout(merge(merged, anchored(own, Path.cwd()), ""))
    write_out(config)
    config.rewards = used_rewards(config)
    return config


def _experiment(path: Path) -> dict[str, Any]:
    """The layer in a YAML file: a user's, one of ours, or a run's config.yaml, which has its prompts beside it."""
    layer = read_yaml(path)
    own = path.with_name("prompts.txt")
    if path.name == "config.yaml" and own.is_file():
        prompts = layer.get("prompts")
        if isinstance(prompts, dict) and prompts.get("file"):  # the user's file may be gone by now
            layer = {**layer, "prompts": {**prompts, "file": str(own)}}
        return layer
    ours = path.resolve().is_relative_to(CONF)
    return layer if ours else dict(anchored(layer, Path.cwd()))


def from_file(path: Path) -> Config:
    """A resolved configuration as a run saved it. Raises UserError."""
    return _in_the_checkout(merge({}, read_yaml(path), f"{_named(path)}: "))


def _named(path: Path) -> str:
    """A file in the sentences about it: with its version, if another one wrote it."""
    a_run = path.name == "config.yaml" and path.with_name("prompts.txt").is_file()
    another = a_run and not goes_on(written := written_by(path))
    return f"{shown(path)}, written by {written}" if another else shown(path)


def _in_the_checkout(layer: dict[str, Any]) -> Config:
    """With what schema.py, conf/ and runs name in the checkout as it lies there; the user's own is absolute by now."""
    return to_config(anchored(_over(dataclasses.asdict(Config()), layer), ROOT))


def experiments() -> dict[str, str]:
    """The shipped experiments: name -> the first line of the file, which says what it is."""
    files = sorted((CONF / "experiment").glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for file in files}


def experiment_path(word: str) -> Path:
    """The YAML file of an experiment's name or path. Raises UserError."""
    shipped = CONF / "experiment" / f"{word}.yaml"
    if "/" not in word and is_file(shipped):
        return shipped
    if is_file(path := Path(os.path.expanduser(word))):  # noqa: PTH111, as Path raises where there is no such user
        return path
    if is_file(path / "config.yaml"):
        raise UserError(f"{quoted(word)} is a run's folder: give {shown(path / 'config.yaml')} to go on with it")
    known = list(experiments())
    raise UserError(
        f"there is no experiment {quoted(word)}{_did_you_mean(word, known).rstrip('?')}: "
        f"give one of {', '.join(known)}, or the path of a YAML file"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, as nested dicts. Raises UserError on what is not YAML or not a mapping."""
    try:
        content = typed_yaml.read(path.read_text(encoding="utf-8"), Config, shown(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)} is not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    if isinstance(content, str):
        content = {content: None}  # a key that lacks its colon
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{shown(path)} must hold settings as key: value, and holds a {type(content).__name__}")
    return content or {}


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """The command line's `key=value` words as nested dicts; of the same key the last one counts. Raises UserError."""
    layer: dict[str, Any] = {}
    for text in texts:
        *parents, last = (parsed := _parse_override(text))[0]
        node = layer
        for parent in parents:
            below = node.setdefault(parent, {})
            if not isinstance(below, dict):
                raise UserError(
                    f"{quoted(text)} sets something below {shown(parent)}, which has the value {shown(below)}: "
                    "leave one out"
                )
            node = below
        node[last] = parsed[1]
    return layer


def _parse_override(text: str) -> tuple[list[str], Any]:
    """The parts of the key, and the value: a text is taken as it is, all else is read as YAML."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or key.startswith("-") or key != key.strip():
        raise UserError(
            f"{quoted(text)} is not a setting: write key=value, such as learner.lr=1e-4 (--help lists them)"
        )
    if parts == ["experiment"]:
        raise UserError(
            f"{quoted(text)}: the experiment is the first word of the command, `python launch.py {shown(value)} ...`"
        )
    for end in range(1, len(parts)):  # below a mapping of numbers a name may have dots
        if get_args(hint_of(".".join(parts[:end]))) == (str, float):
            parts = [*parts[:end], ".".join(parts[end:])]
            break
    hint = hint_of(key)
    if is_text(hint):
        return parts, None if value == "null" else value
    return parts, typed_yaml.read(value, hint, f"the value in {quoted(text)}", verbatim=True)


def merge(below: dict[str, Any], layer: dict[str, Any], where: str) -> dict[str, Any]:
    """`layer` over `below`; `where` begins the sentence of the UserError for unknown keys and wrong types.

    A layer that says where the prompts come from replaces what the layers below it said; so does one that names another
    objective or advantage, with what belongs to that one.
    """
    _check(layer, Config, "", where)
    if any(value is not None for value in layer.get("prompts", {}).values()):
        layer = {**layer, "prompts": {"set": None, "list": None, "file": None, **layer["prompts"]}}
    merged: dict[str, Any] = _over(below, layer)
    learner = layer.get("learner", {})
    for kind, own in BELONGS.items():
        if kind in learner and not _share_arguments(below.get("learner", {}).get(kind), learner[kind]):
            merged["learner"] |= {name: learner.get(name, default) for name, default in own.items()}
    return merged


def _share_arguments(*objectives: str | None) -> bool:
    """Whether arguments that were given for one of these are meant for the other, too."""
    built_in = [name or "ddpo_is" for name in objectives]
    return len({*objectives}) == 1 or all(name.startswith("ddpo_") and ":" not in name for name in built_in)


def _over(below: Any, layer: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(layer, dict)):
        return layer
    # An empty mapping takes away what is below.
    return {**below, **{name: _over(below.get(name), value) if value != {} else {} for name, value in layer.items()}}


def to_config(layer: dict[str, Any]) -> Config:
    """`layer` over the defaults of schema.py, as plain dataclasses, interpolations resolved. Raises UserError."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), layer)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = shown(getattr(error, "full_key", None) or "a setting")
        raise UserError(f"{key} has no value: give it one, {key}=...") from error
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = shown(getattr(error, "full_key", None) or "a setting")
        raise UserError(f"{key} cannot be worked out: {_one_line(error)}") from error
    except RecursionError as error:
        raise UserError("a setting cannot be worked out: its value is nested too deeply") from error
    assert isinstance(config, Config)
    check_texts(config)
    return config


def help_text() -> str:
    """What `python launch.py --help` prints: how to call it, experiments, settings and prompt sets."""
    lines = HELP.splitlines() + [f"  {name:<24}{meaning}" for name, meaning in experiments().items()]
    lines += ["", "settings, with their type, default and meaning:"]
    section = None
    for setting in settings():
        if setting.key.split(".")[0] != section:
            section = setting.key.split(".")[0]
            lines.append("")
        lines.append(f"  {setting.key} ({setting.type}) = {setting.default}")
        lines.append(f"      {setting.meaning}")
    lines += ["", "prompt sets, for prompts.set:"]
    return "\n".join(lines + [f"  {name:<40} {meaning}" for name, meaning in named_sets().items()])


def _is_experiment(word: str) -> bool:
    """Whether the first word of a command is an experiment and no setting; a folder's name may hold a =."""
    return not word.startswith("-") and ("=" not in word or (word.endswith(".yaml") and is_file(Path(word))))


def _check(layer: dict[str, Any], cls: type, prefix: str, where: str) -> None:
    """Unknown keys and values of the wrong type, named by us: OmegaConf's messages are for programmers."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    group = where + "{key}={value} names a group of settings: write {key}.<setting>=..."
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if name not in names:
            elsewhere = {setting.key.rpartition(".")[2]: setting.key for setting in settings()}
            guess = _did_you_mean(str(name), names, prefix) or _did_you_mean(str(name), list(elsewhere.values()))
            if name in elsewhere:
                guess = f", did you mean {elsewhere[name]}?"
            raise UserError(
                f"{where}there is no setting {shown(key, 80)}{guess} (`python launch.py --help` lists them)"
            )
        hint, section = hints[name], section_type(hints[name])
        if section is None:
            _check_leaf(key, value, hint, where)
        elif not isinstance(value, dict):
            raise UserError(group.format(key=key, value=shown(value)))
        elif section is hint:
            _check(value, section, f"{key}.", where)
        else:
            for entry, below in value.items():
                check_name(key, entry)
                if not isinstance(below, dict):
                    raise UserError(group.format(key=f"{key}.{entry}", value=shown(below)))
                _check(below, section, f"{key}.{entry}.", where)


def _check_leaf(key: str, value: Any, hint: Any, where: str) -> None:
    """One value against the type of its setting, by OmegaConf's own conversion of a lone field of that type."""
    if key != "run.name" and (is_text(hint) or holds_texts(hint)):
        _check_as_written(key, value, where)
    if type(value) is hint or (isinstance(value, str) and "${" in value):
        return  # an interpolation is converted when it is resolved
    # A truth value is only a truth value, and text only text: OmegaConf would read 3 as true and 7 as "7".
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    nothing = value is None and NoneType in allowed
    loose = (bool in allowed and not isinstance(value, bool | str)) or (is_text(hint) and not isinstance(value, str))
    try:
        if loose and not nothing:
            raise ValueError("loose")
        OmegaConf.merge(_lone(hint), {"value": value})
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(
            f"{where}{shown(key, 80)}={shown(value)} has the wrong type: it takes {type_name(hint)}"
        ) from error


@functools.cache
def _lone(hint: Any) -> DictConfig:
    """A configuration of one field, `value`, of this type."""
    fields = [("value", hint, dataclasses.field(default="???"))]
    lone: DictConfig = OmegaConf.structured(dataclasses.make_dataclass("Lone", fields))
    return lone


def _check_as_written(key: str, value: Any, where: str) -> None:
    """Raises UserError for a text, or an entry of a list of texts, that OmegaConf would take for another thing."""
    for number, text in enumerate(value if isinstance(value, list) else [value], start=1):
        what = f"{where}{key}: entry {number}" if isinstance(value, list) else f"{where}{key}"
        if isinstance(value, list) and not isinstance(text, str):
            raise UserError(f"{what} is {shown(text, 60)} and not a text: put it in quotes")
        if isinstance(text, str) and ("${" in text or text == "???"):
            raise UserError(
                f"{what} ({quoted(text, 60)}) holds ${{ or is ???, which has a meaning of its own: change it"
            )


def _did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.7)  # of a long text it takes minutes
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split("full_key:")[0].split()), 300)
