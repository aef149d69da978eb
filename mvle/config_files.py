"""Config files: which file a name means, what it extends, and how files and overrides become one tree of values.

    the file that is extended  <  the file that is named  <  key.sub=value

`extends: NAME or PATH` at the top of a file lays that file over another one: mappings are merged, everything else is
replaced. `extends=NAME` on the command line puts the named file over that one instead. What is read here is not
checked: mvle/config.py does that, and asks `Stated.where` which file a mistake is in.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config_keys import shown

EXTENDS = "extends"
COMMAND_LINE = "on the command line"


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line a mistake."""


@dataclass
class Stated:
    """What files and overrides say. values: nested dicts · origins: {dotted key: "in FILE" or COMMAND_LINE} of each."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def lay(self, over: Mapping[Any, Any], origin: str) -> None:
        """Put nested dicts from one place over what there is: mappings are merged, everything else is replaced."""
        self._lay(self.values, over, origin, "")

    def _lay(self, values: dict[Any, Any], over: Mapping[Any, Any], origin: str, prefix: str) -> None:
        for name, value in over.items():
            key, old = f"{prefix}{name}", values.get(name)
            if isinstance(value, Mapping):
                if not isinstance(old, dict):
                    self._forget(key)
                    values[name] = {}
                self._lay(values[name], value, origin, f"{key}.")
            else:
                self._forget(key)
                values[name] = value
                self.origins[key] = origin

    def _forget(self, key: str) -> None:
        self.origins = {k: o for k, o in self.origins.items() if not f"{k}.".startswith(f"{key}.")}

    def where(self, message: str) -> str:
        """A message, and behind it, in brackets, which file sets the keys that it names; as it is where none does."""
        places = {key: self.origins[key] for key in self._named(message.split(" Did you mean")[0])}
        if all(place == COMMAND_LINE for place in places.values()):
            return message
        if len(set(places.values())) == 1:
            return f"{message} [{next(iter(places.values()))}]"
        return f"{message} [{', '.join(f'{key} {place}' for key, place in places.items())}]"

    def _named(self, message: str) -> list[str]:
        """The keys of a message that somebody sets: those that are spelled out, and, where it is about a whole section,
        those below it that it names."""
        words = re.findall(r"[\w.-]*\w", message)
        keys = [word for word in words if word in self.origins]
        if about := re.search(r"config key ([\w.-]*\w)", message):
            below = [key for key in self.origins if key.startswith(f"{about[1]}.")]
            keys += [key for key in below if key.removeprefix(f"{about[1]}.") in words] or below
        return list(dict.fromkeys(keys))


# --- files -----------------------------------------------------------------------------------------------------------


def configs_folder() -> Path:
    """Where the packaged recipes are: beside the package in a checkout or editable install, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "configs"
    return beside if (beside / "tiny.yaml").is_file() else package / "configs"


def config_names() -> list[str]:
    """The names of the packaged recipes: base, tiny, …, ablation/itc, … (those of folders last)."""
    folder = configs_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(names, key=lambda name: ("/" in name, name))


def find_config(name_or_path: str, beside: Path | None = None) -> Path:
    """A path as it is (below the folder `beside`, where one is given); a name (`large`, `ablation/itc`) as that file of
    the packaged recipes. Raises ConfigError with the names."""
    path = Path(name_or_path) if beside is None else beside / name_or_path
    if path.is_file():
        return path
    if not Path(name_or_path).is_absolute() and (packaged := configs_folder() / f"{name_or_path}.yaml").is_file():
        return packaged
    names = config_names()
    last = {name.rpartition("/")[2]: name for name in names}  # `itc` may mean ablation/itc, and lage.yaml large
    close = difflib.get_close_matches(path.stem, last, n=1)
    question = f" Did you mean {last[close[0]]}?" if close else ""
    raise ConfigError(
        f"there is no config {name_or_path}{f' in {beside}' if beside is not None else ''}: expected the path of a "
        f"YAML file, or a packaged name, one of {', '.join(names)}.{question}"
    )


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; a section with no key below it (`data:`) says nothing. Raises ConfigError."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be YAML: {error}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold sections (run:, data:, ...); got {shown(loaded)}.")
    return {key: value for key, value in (loaded or {}).items() if value is not None}


def read_override(override: str) -> dict[str, Any]:
    """One `key.sub=value` as nested dicts; the value is YAML. Raises ConfigError."""
    key, equals, text = override.partition("=")
    *above, last = key.strip().split(".")
    if not equals or not all((*above, last)):
        raise ConfigError(f"an override must be key.sub=value, such as schedule.steps=100; got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"the value of {key} must be YAML; got {text!r}: {problem}.") from None
    nested = {last: value}
    for part in reversed(above):
        nested = {part: nested}
    return nested


def read_config(name_or_path: str | os.PathLike[str] | None, overrides: Sequence[str]) -> Stated:
    """The file over all that it extends, and the overrides on top; None: overrides alone. Raises ConfigError."""
    given = [read_override(override) for override in overrides]
    bases = [nested.pop(EXTENDS) for nested in given if EXTENDS in nested]
    files: list[tuple[Path, dict[str, Any]]] = []
    base, beside, origin = None if name_or_path is None else os.fspath(name_or_path), None, ""
    while True:
        if bases and (files or base is None):  # in the place of what the file itself extends
            base, beside, origin, bases = bases[-1], None, COMMAND_LINE, []
        if base is None:
            break
        path = _find_base(base, beside, origin) if origin else find_config(base)
        if any(path.resolve() == above.resolve() for above, _ in files):
            circle = " -> ".join(str(p) for p in (*(above for above, _ in files), path))
            raise ConfigError(f"extends must end at a config that extends none; got a circle: {circle}.")
        values = read_file(path)
        base, beside, origin = values.pop(EXTENDS, None), path.parent, f"in {path}"
        files.append((path, values))
    stated = Stated()
    for path, values in reversed(files):
        stated.lay(values, f"in {path}")
    for nested in given:
        stated.lay(nested, COMMAND_LINE)
    return stated


def _find_base(base: Any, beside: Path | None, origin: str) -> Path:
    """The file that `extends` names, whose mistakes are told with where it stands."""
    if not (isinstance(base, str) and base):
        raise ConfigError(f"extends must be the name or the path of one config; got {shown(base)}. [{origin}]")
    try:
        return find_config(base, beside)
    except ConfigError as error:
        raise ConfigError(f"extends={base}, set {origin}: {error}") from None
