"""Every command of README and docs/ is one that its program takes: read by the program's own parser, up to where it
would begin to work. What runs for real: test_documents_runs.py."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mvle.config import Config, ConfigError, load_config
from mvle.config_files import config_names, find_config
from mvle.config_keys import walk

from .documents import COMMANDS, MORE, OWN, PLACEHOLDERS, ROOT, Command, commands_in, fences, programs

KEYS = {key for key, _ in walk(Config)}
NEWER = {"--shutdown-timeout": (2, 12)}  # options of torchrun and the torch that brought them


class Parsed(BaseException):
    """A program took its command line; nothing of it is to run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


class Refused(Exception):
    """A program does not take its command line."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse ends a program once it has read the command line, with what it read or with why not."""

    def ending(parse: Any) -> Any:
        def run(self: argparse.ArgumentParser, *args: Any, **kw: Any) -> None:
            raise Parsed(parse(self, *args, **kw))

        return run

    def error(self: argparse.ArgumentParser, message: str) -> None:
        raise Refused(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the file that docs/configuration.md shows, under the name that it has there."""
    (tmp_path / "mine.yaml").write_text(fences("docs/configuration.md", "yaml")[0][0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=str)
def test_every_command_of_a_document_is_one_that_its_program_takes(
    command: Command, parse_only: None, mine: Path
) -> None:
    check(command)


@pytest.mark.parametrize("name", config_names())
def test_every_command_at_the_head_of_a_recipe_is_one_that_its_program_takes(
    name: str, parse_only: None, mine: Path
) -> None:
    path = find_config(name)
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert head is not None
    lines = re.sub(r"\\\n#\s*", " ", head[0]).splitlines()
    lines = [re.sub(r"^#[\s\w,:(-]*?(?=python -m|torchrun)", "", line).rstrip(")") for line in lines]
    found = [command for line in lines for command in commands_in(name, line)]

    assert any(name in command.words for command in found), f"{path} does not say how it is started"
    for command in found:
        check(command)


def check(command: Command) -> None:
    """Its program exists and takes its words; a piece of code in a text may leave out what must be there."""
    try:
        check_words(command.words)
    except Refused as refusal:
        incomplete = not command.whole and re.search(r"are required|must be .* got none", str(refusal))
        assert incomplete, f"{command}: {refusal}"


def check_words(words: Sequence[str]) -> None:
    """Raises Refused where the program would not take them."""
    program, *words = words
    if program == "make":
        check_make(words)
    elif program == "pytest":
        check_pytest(words)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        release = tuple(map(int, torch.__version__.split(".")[:2]))
        absent = {option for option, since in NEWER.items() if release < since}
        words = [w for before, w in zip(["", *words], words, strict=False) if not {before, w} & absent]
        options = parsed(get_args_parser().parse_args, words)
        assert options.module, f"expected -m MODULE; got {options.training_script}"
        check_module(options.training_script, options.training_script_args)
    elif program == "python" and words[:1] == ["-m"]:
        check_module(words[1], words[2:])
    elif program == "python" and words[:1] == ["csrc/build.py"]:
        assert words[1:] in (["cuda"], ["emulated"]), words
    else:
        assert program == "ruff" and words[0] in ("check", "format"), f"{program}: a program that no test knows"


def check_module(module: str, words: Sequence[str]) -> None:
    """`python -m module words`: through its own main, up to where it has read its command line."""
    if module.split(".")[0] not in OWN:
        assert module in ("pytest", "pip", "venv", "build", "ruff", "mypy"), f"{module} is a module that no test knows"
        return check_pytest(words) if module == "pytest" else None
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if module == "mvle.train":
        return check_train(words)
    entry = f"{module}.__main__" if find_spec(module) and find_spec(module).submodule_search_locations else module
    options = parsed(importlib.import_module(entry).main, words)
    if options is not None and hasattr(options, "overrides"):
        check_config(getattr(options, "config", None), options.overrides)
    return None


def parsed(program: Any, words: Sequence[str]) -> Any:
    """What argparse made of the words; None where the program printed its help."""
    try:
        program(list(words))
    except Parsed as end:
        return end.options
    except SystemExit as end:
        assert end.code == 0, f"ended with {end.code}"
        return None
    raise AssertionError(f"{program} read no command line")


def check_train(words: Sequence[str]) -> None:
    """mvle.train reads its words itself."""
    options = {word for word in words if word.startswith("-")}
    if unknown := options - {"--dry-run", "--help"}:
        raise Refused(f"unknown options {unknown}")
    names = [word for word in words if word not in options]
    if not names and "--help" not in options:
        raise Refused("CONFIG must be a recipe; got none")
    if names:
        check_config(names[0], names[1:])


def check_config(name: str | None, overrides: Sequence[str]) -> None:
    """The config loads. Of a value that is left out (…, S, $variable) its key must exist."""
    given = [o for o in overrides if not re.search(rf"=({MORE}|[A-Z]|\$.*)$", o)]
    for override in set(overrides) - set(given):
        assert override.partition("=")[0] in KEYS, f"{override}: no such key"
    try:
        load_config(name, given)
    except ConfigError as error:
        raise Refused(str(error)) from None


def check_make(words: Sequence[str]) -> None:
    """Targets and variables that the Makefile has."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        target, equals, _ = word.partition("=")
        known = f"$({target})" in makefile if equals else re.search(rf"^{re.escape(word)}:", makefile, re.M)
        if not known:
            raise Refused(f"the Makefile has no {word}")


@cache
def pytest_help() -> str:
    """Every option of pytest as it is installed, with those of the benchmarks."""
    command = [sys.executable, "-m", "pytest", "--help", "benchmarks"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def check_pytest(words: Sequence[str]) -> None:
    """Folders and files that are there, options that it has."""
    before = ""
    for word in words:
        option = word.partition("=")[0]
        if word.startswith("-"):
            if not re.search(rf"{re.escape(option)}\b", pytest_help()):
                raise Refused(f"pytest has no {option}")
        elif not before.startswith("-") and not (ROOT / word.split("::")[0]).exists():
            raise Refused(f"{word} is not there")
        before = word


def test_a_command_that_is_wrong_would_be_found(parse_only: None, mine: Path) -> None:
    for words in (
        "python -m mvle.train tiny --resume",
        "python -m mvle.train tinny",
        "python -m mvle.train tiny optim.lrr=1",
        "python -m mvle.train tiny optim.lr=fast",
        "python -m mvle.evaluate everything runs/tiny",
        "python -m mvle.evaluate all runs/tiny --checkpoint newest",
        "python -m mvle.data pack --format parquets --input a --images b --output c",
        "python -m mvle.data unpack",
        "python -m mvle.capacity base --rank 1 --gpus h100",
        "torchrun --nproc-per-gpu 8 -m mvle.train base",
        "torchrun --nproc-per-node 8 -m mvle.train bsae",
        "make training",
        "make gpu WHEEL=folder",
        "pytest benchmarks/test_nothing.py",
        "pytest benchmarks/ --benchmark-solely",
    ):
        with pytest.raises(Refused):
            check_words(words.split())
    for words in ("python -m mvle.training tiny", "python -m numpy.f2py", "ruff clean"):
        with pytest.raises((AssertionError, ModuleNotFoundError)):
            check_words(words.split())


def test_the_help_of_every_program_that_is_named_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    known = programs()
    assert {"mvle.train", "mvle.data", "mvle.evaluate", "mvle.report", "mvle.capacity", "mvle.model"} <= {*known}
    for program in known:
        package = find_spec(program)
        assert package is not None
        entry = f"{program}.__main__" if package.submodule_search_locations else program
        try:
            code = importlib.import_module(entry).main(["--help"])
        except SystemExit as end:
            code = end.code
        assert code == 0 and len(capsys.readouterr().out) > 100, program
