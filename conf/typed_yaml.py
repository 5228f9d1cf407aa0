"""YAML, read with the settings' types in view: where a setting is a text, what is written is used.

By itself YAML reads an unquoted 007 as the number 7, yes as true, 12:30 as 750 and 1e3 as a thousand. The name of a
run, a prompt and a folder must stay as they are written. Only null stays null, unless it is quoted.
"""

import re
from typing import Any, get_args, get_origin

import yaml
from yaml.resolver import BaseResolver

from common.errors import UserError, shown
from conf.settings import below, holds_texts, is_text, without_null
from conf.texts import unwritable

TEXT = BaseResolver.DEFAULT_SCALAR_TAG
NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """1e-4 is a number, a date is a text; no key stands twice, and no tag makes something else of a value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"a tag, {event.tag}, has no meaning here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == TEXT and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            seen.add(key.value if key.tag == TEXT else "")
        return dict(super().construct_mapping(node, deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read(source: str, hint: Any, what: str, verbatim: bool = False) -> Any:
    """The value that `source` writes for a setting, or a group of settings, of type `hint`.

    verbatim: an unquoted text must be the very signs of the source, and nothing may be left over: on a command line
    nobody means YAML's anchors, comments and folded lines. `what` begins the sentence of the UserError.
    """
    if verbatim and holds_texts(hint) and (problem := unwritable(source)) is not None:
        raise UserError(f"{what} holds {problem}: leave it out")
    try:
        loader = _Loader(source)
        node = loader.get_single_node()
        if node is None:
            return None
        if verbatim and source[node.end_mark.index :].strip():
            raise UserError(f"{what} goes on after its end, with {shown(source[node.end_mark.index :].strip(), 40)}")
        _keep_texts(node, hint, source if verbatim else None, what)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number that Python does not read, such as 0x_
        raise UserError(f"{what} is not valid YAML: {shown(' '.join(str(error).split()), 300)}") from error
    except RecursionError as error:
        raise UserError(f"{what} is not valid YAML: it is nested too deeply, or in itself") from error


def _keep_texts(node: yaml.Node, hint: Any, source: str | None, what: str) -> None:
    """Marks as text what stands unquoted where a text belongs, and every key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            plain = isinstance(key, yaml.ScalarNode) and key.tag != MERGE
            if plain and hint is not Any:
                key.tag = TEXT
            _keep_texts(value, below(hint, key.value) if plain else hint, source, what)
    elif isinstance(node, yaml.SequenceNode):
        entry = get_args(without_null(hint))[0] if get_origin(without_null(hint)) is list else Any
        for value in node.value:
            _keep_texts(value, entry, source, what)
    elif is_text(hint) and not node.style and node.tag != NULL:
        if source is not None and source[node.start_mark.index : node.end_mark.index] != node.value:
            raise UserError(f"{what} has {shown(node.value, 60)} in it, which YAML does not read as written: quote it")
        node.tag = TEXT
