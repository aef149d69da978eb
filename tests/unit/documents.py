"""The project's documents taken apart: links, headings, commands, Python and YAML in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
NAMES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
PROGRAMS = ("python", "torchrun", "make", "pytest", "ruff", "mypy", "srun")
OWN = ("mvle", "mvle_kernels", "benchmarks")  # packages whose programs are the project's
MORE = "…"  # something that is left out: a value, or the rest of a command
# What stands for a word of the reader's, and such a word.
PLACEHOLDERS = {"CONFIG": "tiny", "NAME": "tiny", "ablation/NAME": "ablation/all", "N": "1", "STEP": "1"}


@dataclass(frozen=True)
class Command:
    """document · words of the command line · whole: it stands in a block of its own, not in the middle of a text."""

    document: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def text_of(name: str) -> str:
    """A document."""
    return (ROOT / name).read_text(encoding="utf-8")


def tokens(name: str) -> Iterator[Token]:
    """Every token of a document, those inside of lines too."""
    for token in MarkdownIt("commonmark").enable("table").parse(text_of(name)):
        yield token
        yield from token.children or ()


def links(name: str) -> list[str]:
    """What a document links to or shows, but the addresses of other places."""
    found = (str(token.attrGet("href") or token.attrGet("src") or "") for token in tokens(name))
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


def anchors(name: str) -> set[str]:
    """The anchors of a document's headings, as they are made where Markdown is shown."""
    found: list[str] = []
    for token, inline in pairwise(MarkdownIt("commonmark").parse(text_of(name))):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def inline_code(name: str) -> list[str]:
    """Every `piece of code` in the text of a document, in one line."""
    return [" ".join(token.content.split()) for token in tokens(name) if token.type == "code_inline"]


def fences(name: str, language: str) -> list[tuple[str, str]]:
    """(text, words behind the language) of each fenced block of a language."""
    found = [(token.content, token.info.split()) for token in tokens(name) if token.type == "fence"]
    return [(text, " ".join(info[1:])) for text, info in found if info[:1] == [language]]


def commands(name: str) -> list[Command]:
    """Every command of a document: lines of blocks, and pieces of code in the text, that begin with a program."""
    found = []
    for token in tokens(name):
        if token.type == "code_block" or (token.type == "fence" and token.info.split()[:1] in ([], ["bash"], ["sh"])):
            for line in re.sub(r"\\\n\s*", " ", token.content).splitlines():
                found += commands_in(name, line, whole=True)
        elif token.type == "code_inline":
            found += commands_in(name, " ".join(token.content.split()), whole=False)
    return found


def commands_in(name: str, line: str, whole: bool = True) -> list[Command]:
    """The command that a line is, or none."""
    if line.split()[:1] and line.split()[0] in PROGRAMS:
        line = re.split(r"\s{3,}", line.strip())[0]  # what stands behind a gap explains
        words = [word for word in shlex.split(line, comments=True) if word != MORE]
        words = words[1:] if words[0] == "srun" else words
        if words and not (len(words) == 1 and not whole):  # a program's name alone is no command
            return [Command(name, tuple(words), whole)]
    return []


def programs() -> list[str]:
    """The modules of the project that a document starts with `python -m`."""
    found = {c.words[2] for c in COMMANDS if c.words[:2] == ("python", "-m")}
    return sorted(name for name in found if name.split(".")[0] in OWN)


def rows(name: str) -> list[list[list[str]]]:
    """The tables of a document: of each row the cells, as text with its `code`."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text_of(name)):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.level >= 3 and tables[-1]:
            tables[-1][-1].append(token.content)
    return tables


COMMANDS = [command for name in NAMES for command in commands(name)]
