"""README, docs/ and the other documents are true: links lead somewhere, keys exist, messages are said.

Their commands: test_documents_commands.py and test_documents_runs.py. docs/kernels.md has more of its own in
tests/kernels/test_documents.py.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from mvle.config import FORMER, FREE_ON_RESUME, Config, ConfigError, load_config
from mvle.config_files import config_names
from mvle.config_keys import sections, walk

from .documents import MORE, NAMES, ROOT, anchors, fences, inline_code, links, rows, text_of

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
ATTRIBUTES = ("model.training",)  # what looks like a key, and is one of torch's own


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
            known = KEYS | SECTIONS | (set(FORMER) if name == "CHANGELOG.md" else set())
            assert found[1] in known, f"{name} names {word}, and there is no such key"
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
