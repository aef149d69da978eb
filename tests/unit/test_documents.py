"""README, docs/ and the other documents are true: links lead somewhere, commands parse, keys exist, messages are said.

docs/kernels.md has more of its own in tests/kernels/test_documents.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
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
from PIL import Image

from mvle.config import FREE_ON_RESUME, Config, ConfigError, load_config
from mvle.config_files import config_names, find_config
from mvle.config_keys import sections, walk
from mvle.export import main as export

from .documents import (
    MORE,
    NAMES,
    ROOT,
    Command,
    anchors,
    commands,
    commands_in,
    fences,
    inline_code,
    links,
    rows,
    text_of,
)
from .small_run import small_run

OWN = ("mvle", "mvle_kernels", "benchmarks")
KEYS = {key for key, _ in walk(Config)}
SECTIONS = {key for key, _ in sections(Config)}
FILES = (
    "py",
    "md",
    "yaml",
    "yml",
    "json",
    "jsonl",
    "html",
    "png",
    "toml",
    "txt",
    "tar",
    "safetensors",
    "distcp",
    "cff",
)
PLACEHOLDERS = {"CONFIG": "tiny", "NAME": "tiny", "ablation/NAME": "ablation/all", "N": "1", "STEP": "1"}
ATTRIBUTES = ("model.training",)  # what looks like a key, and is one of torch's own
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


# ---- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_document_leads_somewhere(name: str) -> None:
    for link in links(name):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}, which is not there"
        if anchor:
            known = anchors(target.resolve().relative_to(ROOT).as_posix())
            assert anchor in known, f"{name} links to {link}; the headings there are {sorted(known)}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_project_that_a_document_names_is_there(name: str) -> None:
    for code in inline_code(name):
        if re.fullmatch(r"(mvle|kernels|benchmarks|tests|docs|configs|\.github|\.ci)/[\w./-]+\.\w+", code):
            assert (ROOT / code).exists(), f"{name} names {code}"


# ---- commands -------------------------------------------------------------------------------------------------------

COMMANDS = [command for name in NAMES for command in commands(name)]


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


def test_what_the_readme_says_of_ones_own_pairs_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its three commands, as they stand there, over its row of pairs.jsonl."""
    from mvle.data.__main__ import main

    row = next(
        json.loads(code.replace(MORE, "a word")) for code in inline_code("README.md") if code.startswith('{"image"')
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "DIR" / row["image"])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")

    chain = [c.words[3:] for c in commands("README.md") if c.whole and c.words[:3] == ("python", "-m", "mvle.data")]
    assert [words[0] for words in chain] == ["pack", "index", "inspect"]
    assert [main(words) for words in chain] == [0, 0, 0]

    assert "1 images, 2 captions" in capsys.readouterr().out
    shards = load_config("base", ["data.train=data/mine/train-*.tar"]).data.train
    assert list(tmp_path.glob((shards or ("",))[0])) == [tmp_path / "data" / "mine" / "train-00000.tar"]


def test_the_help_of_every_program_that_is_named_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    programs = {c.words[2] for c in COMMANDS if c.words[0] == "python" and c.words[2].split(".")[0] in OWN}
    assert {"mvle.train", "mvle.data", "mvle.evaluate", "mvle.report", "mvle.capacity", "mvle.model"} <= programs
    for program in sorted(programs):
        package = find_spec(program)
        assert package is not None
        entry = f"{program}.__main__" if package.submodule_search_locations else program
        try:
            code = importlib.import_module(entry).main(["--help"])
        except SystemExit as end:
            code = end.code
        assert code == 0 and len(capsys.readouterr().out) > 100, program


# ---- keys and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_config_key_that_a_document_names_is_there(name: str) -> None:
    first = "|".join(Config.model_fields)
    for code in inline_code(name):
        for word in [code] if "{" in code else code.split():  # a mapping has spaces of its own
            found = re.fullmatch(rf"((?:{first})(?:\.[a-z_0-9]+)+)(=.*)?", word := word.rstrip(".,"))
            if found is None or found[1] in ATTRIBUTES or (not found[2] and found[1].rpartition(".")[2] in FILES):
                continue
            if re.match(r"data\.train\.\w+", found[1]):  # a source, whose name is the user's
                assert re.fullmatch(r"data\.train\.\w+(\.(shards|weight))?", found[1]), word
                continue
            assert found[1] in KEYS | SECTIONS, f"{name} names {word}, and there is no such key"
            if found[2] and not re.search(rf"=({MORE}|[A-Z]+)?$", word):
                refuse_unknown_value(name, word)


def refuse_unknown_value(name: str, override: str) -> None:
    """A value of the wrong type fails; one that only fits beside others is fine."""
    try:
        load_config("tiny", [override])
    except ConfigError as error:
        wrong = re.search("config key|must be YAML", str(error))
        assert not wrong, f"{name} has {override}: {error}"


def test_the_page_of_configuration_names_every_section_and_every_recipe() -> None:
    tables = rows("docs/configuration.md")
    firsts = [[row[0] for row in table[1:]] for table in tables]

    assert firsts[0] == [f"`{section}`" for section in Config.model_fields]
    named = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell) for cell in (*firsts[1], *firsts[2])]
    assert sorted(named) == sorted(config_names())


def test_the_losses_that_the_page_of_configuration_gives_an_ablation_are_those_it_trains() -> None:
    for first, losses, *_ in rows("docs/configuration.md")[2][1:]:
        name = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", first)
        objectives = load_config(name).objectives
        trained = {loss.upper() for loss in ("itc", "itm", "mlm", "mim") if getattr(objectives, loss).weight}
        assert trained == (set(losses.split(", ")) if losses != "all" else {"ITC", "ITM", "MLM", "MIM"}), name


def test_the_yaml_of_a_document_loads(tmp_path: Path) -> None:
    found = [text for name in NAMES for text, _ in fences(name, "yaml")]
    assert found
    for text in found:
        (tmp_path / "some.yaml").write_text(text)
        load_config(tmp_path / "some.yaml")


def test_the_page_of_checkpoints_names_all_that_may_change_when_a_run_goes_on() -> None:
    text = text_of("docs/checkpoints.md").split("## What may change when a run goes on")[1].split("\n\n")[1]

    assert re.findall(r"`([\w.]+)`", text) == sorted(FREE_ON_RESUME, key=lambda key: ("." not in key, 0))


# ---- messages -------------------------------------------------------------------------------------------------------


@cache
def said() -> list[str]:
    """Every text that the programs can print, in one line, with … for each value in it."""
    texts = []
    for path in [*(ROOT / "mvle").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else MORE for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [" ".join(text.split()) for text in texts]


def quoted() -> list[str]:
    """The messages that docs/troubleshooting.md quotes: what is `code` in the first column of its tables."""
    cells = [row[0] for table in rows("docs/troubleshooting.md") for row in table[1:]]
    return [quote for cell in cells for quote in re.findall(r"`([^`]*)`", cell) if " " in quote]


@pytest.mark.parametrize("quote", quoted())
def test_every_message_that_is_quoted_is_one_that_the_programs_say(quote: str) -> None:
    parts = [re.escape(part.strip()) for part in quote.split(MORE)]

    assert any(re.search(".*?".join(parts), text) for text in said()), f"no program says {quote}"


# ---- Python ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_python_of_a_document_is_python(name: str) -> None:
    for text, _ in fences(name, "python"):
        compile(text, name, "exec")


def test_the_python_of_the_readme_runs_on_a_run(tmp_path: Path) -> None:
    """And what another document marks as ```python run, except docs/kernels.md, which has a test of its own."""
    (tmp_path / "runs").mkdir()
    small_run(tmp_path / "runs" / "tiny")
    assert export([str(tmp_path / "runs" / "tiny"), "--output", str(tmp_path / "exports" / "tiny")]) == 0
    programs = [text for text, _ in fences("README.md", "python")]
    programs += [text for name in NAMES for text, how in fences(name, "python") if how == "run" and name != "README.md"]
    assert len(programs) >= 2

    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", paths + program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{program}\n{done.stderr}"
    assert (tmp_path / "red_circle.png").is_file()
