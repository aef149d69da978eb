"""Config keys as text: the dotted names of a tree of sections, what each may hold, and what to say of a mistake.

mvle/config.py hands its root class in; nothing here knows which sections there are.
"""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .section import Section

SectionKind = TypeVar("SectionKind", bound=Section)
PLAIN_TYPES = {int: "integer", float: "number", str: "text", bool: "true | false", NoneType: "null", Any: "anything"}
LIMITS = {
    "gt": "above",
    "ge": "at least",
    "lt": "below",
    "le": "at most",
    "min_length": "of length at least",
}


class NamedMistakes(ValueError):
    """Mistakes below a key that is no section, a line each that names its key in full. A validator may raise it."""


def subsection(field: FieldInfo | None) -> type[Section] | None:
    """The section that a field holds, or None for a plain value."""
    annotation = field.annotation if field is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def named_section(field: FieldInfo) -> type[Section] | None:
    """The section of which a field holds several, each by a name; or None."""
    for one in _alternatives(field.annotation):
        if get_origin(one) is dict and isinstance(kind := get_args(one)[1], type) and issubclass(kind, Section):
            return kind
    return None


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every value below a section, in its order."""
    for name, field in section.model_fields.items():
        if (below := subsection(field)) is not None:
            yield from walk(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def sections(root: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted key, section) of every section below the root."""
    for name, field in root.model_fields.items():
        if (below := subsection(field)) is not None:
            yield f"{prefix}{name}", below
            yield from sections(below, f"{prefix}{name}.")


def flatten(values: Mapping[str, Any], section: type[Section], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {dotted key: value}; a value that is no section stays whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        below = subsection(section.model_fields.get(name))
        if below is not None and isinstance(value, Mapping):
            flat.update(flatten(value, below, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# --- mistakes --------------------------------------------------------------------------------------------------------


def checked(section: type[SectionKind], values: Mapping[str, Any], key: str) -> SectionKind:
    """The section that stands below `key`, which the root does not know. Raises NamedMistakes."""
    if problems := list(wrong_keys(section, values, f"{key}.")):
        raise NamedMistakes("\n".join(problems))
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise NamedMistakes("\n".join(explain(section, error, f"{key}."))) from None


def wrong_keys(root: type[Section], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One message for each key that does not exist, each section that is given a plain value, and each true or false
    where a number belongs (pydantic would read true as 1). prefix: where the root stands, with a dot at its end."""
    known = [key for key, _ in walk(root, prefix)] + [key for key, _ in sections(root, prefix)]

    def below(values: Mapping[str, Any], section: type[Section], prefix: str) -> Iterator[str]:
        for name, value in values.items():
            key = f"{prefix}{name}"
            field = section.model_fields.get(name) if isinstance(name, str) else None
            inner = subsection(field)
            if field is None:
                yield f"unknown config key {key}.{near(key, known)}"
            elif inner is not None and isinstance(value, Mapping):
                yield from below(value, inner, f"{key}.")
            elif inner is not None:
                example = next(walk(inner, f"{key}."))[0]
                yield f"config key {key} is a section: expected keys below it such as {example}; got {shown(value)}."
            elif isinstance(value, bool) and bool not in _alternatives(field.annotation):
                yield f"config key {key}: expected {_expected(field)}; got {shown(value)}."

    yield from below(values, root, prefix)


def explain(root: type[Section], error: ValidationError, prefix: str = "") -> Iterator[str]:
    """One line a key of what pydantic found. A union complains once for each of its members: that is one mistake.
    prefix: where the root stands, with a dot at its end."""
    fields, own = dict(walk(root)), {key for key, _ in sections(root)}
    seen = set()
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        while key and key not in fields and key not in own:  # masking.image_ratio.float -> masking.image_ratio
            key = key.rpartition(".")[0]
        if key in seen:
            continue
        seen.add(key)
        reason = detail["ctx"]["error"] if detail["type"] == "value_error" else ""
        message = str(reason)
        if isinstance(reason, NamedMistakes):
            yield from message.splitlines()
        elif not key:  # the root checks across sections, and names keys itself
            yield from (message or detail["msg"]).splitlines()
        elif message or key not in fields:
            yield f"config key {prefix}{key}: {(message or detail['msg']).rstrip('.')}."
        else:
            field, value = fields[key], detail["input"]
            meant = near(value, _choices(field))
            yield f"config key {prefix}{key}: expected {_expected(field)}; got {shown(value)}.{meant}"


def near(word: Any, known: Sequence[str]) -> str:
    """A question, "Did you mean ...?", with the nearest known word or the same name in another section; or nothing."""
    match = difflib.get_close_matches(str(word), known, n=1)
    if not match:
        last = str(word).rpartition(".")[2]
        match = [k for k in known if k.rpartition(".")[2] == last][:1]
    return f" Did you mean {match[0]}?" if match else ""


def shown(value: Any) -> str:
    """A value and its type, as messages show them."""
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _expected(field: FieldInfo) -> str:
    limits = [f"{word} {getattr(m, name)}" for m in field.metadata for name, word in LIMITS.items() if hasattr(m, name)]
    return f"{type_name(field.annotation)} {' and '.join(limits)}".strip()


# --- types -----------------------------------------------------------------------------------------------------------


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _choices(field: FieldInfo) -> list[str]:
    literals = [a for a in _alternatives(field.annotation) if get_origin(a) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal)]


def type_name(annotation: Any) -> str:
    """A type in the words of a config file: integer, number, text, [number, number], cosine | constant, ... | null."""
    if annotation in PLAIN_TYPES:
        return PLAIN_TYPES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        names = [type_name(a) for a in arguments]
        return " | ".join(n for n in names if not (n == "integer" and "number" in names))
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(type_name(a) for a in arguments)}]"
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}"
    if origin is dict and isinstance(arguments[1], type) and issubclass(arguments[1], Section):
        return "sections"
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    return getattr(annotation, "__name__", str(annotation))


# --- help ------------------------------------------------------------------------------------------------------------


def describe_keys(root: type[Section]) -> str:
    """Every key with its type, default and meaning, aligned section by section, as wide as the terminal."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    lines = []
    for name, field in root.model_fields.items():
        section = subsection(field)
        if section is None:
            continue
        about = (section.__doc__ or field.description or "").strip().splitlines()[0]
        rows = [_row(*one) for one in with_named(section, f"{name}.")]
        lines += ["", f"{name}: {about}", *_table(rows, width)]
    return "\n".join(lines[1:])


def with_named(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """`walk`, and below each field that holds sections by name the keys of one, called NAME."""
    for key, field in walk(section, prefix):
        yield key, field
        if (below := named_section(field)) is not None:
            yield from walk(below, f"{key}.NAME.")


def _row(key: str, field: FieldInfo) -> tuple[str, str, str, str]:
    return key, type_name(field.annotation), _default(field), field.description or ""


def _table(rows: Sequence[tuple[str, str, str, str]], width: int) -> Iterator[str]:
    sizes = [max(len(row[i]) for row in rows) for i in range(3)]
    for key, kind, default, meaning in rows:
        head = f"  {key:<{sizes[0]}}  {kind:<{sizes[1]}}  {default:<{sizes[2]}}  "
        if width - len(head) >= 32:
            indent = " " * len(head)
        else:  # a narrow terminal: the meaning goes below
            yield head.rstrip()
            head = indent = " " * 8
        yield from textwrap.wrap(meaning, width, initial_indent=head, subsequent_indent=indent)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return text.replace("\n...", "").strip()
