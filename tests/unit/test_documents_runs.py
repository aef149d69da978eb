"""What README and docs/ tell their readers to type is typed: commands run, and so do the blocks of Python.

In a folder as the documents suppose one, with every model shrunk to milliseconds a step. A command that no test can run
is in NOT_RUN, with the reason; any other runs.
"""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.counts import release
from mvle.config import load_config
from mvle.data import shapes

from .documents import COMMANDS, MORE, NAMES, PLACEHOLDERS, ROOT, Command, commands, fences, inline_code, text_of
from .small_run import SMALL

# Command, as a pattern -> why it is not run here, and what holds it instead.
NOT_RUN = {
    r"make .*": "sets up an environment, or needs a GPU; what `make train` runs is run here by its parts",
    r"pytest .*": "is this suite, or minutes of measuring",
    r"ruff format \.": "changes the sources; `make test` and CI ask whether it would",
    r"python -m mvle\.(capacity|evaluate|evaluate all|report)": "names the program; its words stand elsewhere",
    r"python -m mvle\.capacity base --ranks 8 --gpu h100": "traces for seconds; the same runs for 1, 8 and 64 ranks",
    r"python -m mvle_kernels\.regress": "compiles for minutes; tests/kernels/test_regress.py runs it",
    r"python csrc/build\.py emulated": "compiles; the tests of kernels in CUDA begin with it",
    r"python -m mvle_kernels\.tune": "tunes on a GPU, and changes launches.json; tests/kernels/test_tune.py runs it",
    r"python -m benchmarks\.counts( --write)?": "counts for half a minute: tests/unit/test_step_counts.py does so; "
    "--write changes the baseline",
    r"python -m benchmarks\.gpu --exercise": "makes every part of `make gpu`, for minutes",
    r"python -m benchmarks\.fed": "trains base; tests/unit/test_loader_benchmark.py has a toy of it",
    r"python -m benchmarks\.quality tiny": "trains a dozen whole runs; tests/unit/test_quality.py makes short ones",
    r"python -m benchmarks\.loader( --write)?": "measures for minutes, and writes what it measured: "
    "tests/unit/test_loader_benchmark.py runs it at toy size",
    r"python -m benchmarks\.loader_report": "changes a document; the same file holds what it writes",
    r"python -m benchmarks\.report( run\.json)?( --gate)?": "changes documents, out of minutes of measuring; "
    "tests/unit/test_benchmarks.py holds that they are what it writes",
    r"python -m mvle\.\w+ .*(s3|https)://.*": "asks another machine; tests/unit/test_data_servers.py has a server",
    r"python -m mvle\.train .*(base_pretrained|model\.image\.pretrained=).*": "fetches published weights; "
    "tests/unit/test_pretrained_sources.py reads such from files",
    r"torchrun --max-restarts 3": "names an option; its words stand elsewhere",
    r"torchrun --nnodes .*": "starts several machines",
    r"torchrun .*--nproc-per-node 8 .*": "starts eight ranks; two are started below, and more in tests/distributed",
}
if release() != "2.14":
    NOT_RUN[r"python -m benchmarks\.fusions"] = "reads plans of torch 2.14"

DATA = ("data.train=data/mine/train-*.tar", "data.val=data/mine/val-*.tar", "data.test=data/mine/val-*.tar")
# Words of a document and what they are here, beside PLACEHOLDERS: two steps, two shards, the run that is there.
HERE = {"RUN": "runs/tiny", "SHARDS": "data/mine/*.tar", "2000": "2", "checkpoint.every=500": "checkpoint.every=1"}
HERE |= {"cc3m/{00000..00331}.tar": "cc3m/{00000..00001}.tar", "model.init_from=runs/base": "model.init_from=runs/tiny"}
HERE |= {"run.seed=S": "run.seed=0"}
TRAINED = "python -m mvle.train tiny checkpoint.every=500 checkpoint.keep=2 checkpoint.best=val_loss"  # … asynchronous

PACK, EXPORT = "pack", "mvle.export"  # commands that will not write where something is


def why_not(command: Command) -> str | None:
    """The reason why a command is not run, or None: it is."""
    line = " ".join(command.words)
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, line)), None)


RUN = list(dict.fromkeys(c.words for c in COMMANDS if why_not(c) is None))


def run(words: tuple[str, ...]) -> int:
    """`python -m MODULE words`, as it is started there but in this process, small and over what is here; the exit
    code."""
    python, flag, module, *rest = (HERE.get(word, PLACEHOLDERS.get(word, word)) for word in words)
    assert (python, flag) == ("python", "-m"), f"no test knows how to run {shlex.join(words)}; see NOT_RUN"
    if module == "mvle.train" and "--help" not in rest:
        rest = [rest[0], *SMALL, *DATA, *rest[1:]]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # imported before it is run
        patch.setattr(sys, "argv", [module, *rest])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
    raise AssertionError(f'{module} is started by nothing: it has no `if __name__ == "__main__"`')


# ---- the folder that the documents suppose --------------------------------------------------------------------------


def lay_out(folder: Path) -> None:
    """Pictures and captions in every form that docs/data.md packs; mine.yaml as docs/configuration.md has it."""
    (folder / "mine.yaml").write_text(fences("docs/configuration.md", "yaml")[0][0])
    captions = [f"a {colour} {shape} in the top left" for colour in shapes.COLOURS for shape in shapes.SHAPES][:24]
    splits = ["train" if i % 2 else "val" for i in range(len(captions))]
    for name in ("DIR", "flickr30k-images", "coco/train2014", "photos/train", "photos/val"):
        (folder / name).mkdir(parents=True)
    for i, caption in enumerate(captions):
        picture = folder / "DIR" / f"{i}.png"
        Image.new("RGB", (72 + i, 64), (10 * i, 255 - 10 * i, 80)).save(picture)
        for name in ("flickr30k-images", "coco/train2014", f"photos/{splits[i]}"):
            shutil.copy(picture, folder / name)
        (folder / "photos" / splits[i] / f"{i}.txt").write_text(f"{caption}\n")
    rows = [
        {"image": f"{i}.png", "captions": [c, f"{c} again"], "split": s}
        for i, (c, s) in enumerate(zip(captions, splits))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    coco = [
        {"filepath": "train2014", "filename": row["image"], "split": row["split"], "cocoid": i, "imgid": i}
        | {"sentences": [{"raw": c} for c in row["captions"]]}
        for i, row in enumerate(rows)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": coco}))
    for name, mark, heads in (
        ("train.tsv", "\t", ("filepath", "title")),
        ("results.csv", "|", ("image_name", "comment")),
    ):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows([heads, *((f"{i}.png", c) for i, c in enumerate(captions))])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data; data/mine packed and indexed from it, runs/tiny and its export, by commands of documents."""
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        chain = [c.words for c in commands("README.md") if c.whole and c.words[:3] == ("python", "-m", "mvle.data")]
        (trained,) = (words for words in RUN if " ".join(words).startswith(TRAINED))
        (exported,) = (words for words in RUN if EXPORT in words)
        assert [run(words) for words in (*chain, trained, exported)] == [0] * 5
        (folder / "cc3m").mkdir()
        for i in range(2):
            shutil.copy(folder / "data" / "mine" / "train-00000.tar", folder / "cc3m" / f"{i:05d}.tar")
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, as the one in which everything is started."""
    monkeypatch.chdir(place)
    return place


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [w for w in RUN if w[0] == "python" and not {PACK, EXPORT} & {*w}], ids=shlex.join)
def test_a_command_that_is_not_excused_runs(words: tuple[str, ...], there: Path) -> None:
    assert run(words) == 0


@pytest.mark.parametrize("words", [w for w in RUN if PACK in w], ids=shlex.join)
def test_a_command_that_packs_does_so_from_what_the_page_describes(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)

    assert run(words) == 0
    packed = list((tmp_path / words[words.index("--output") + 1]).glob("*.tar"))
    assert packed and all(p.stat().st_size > 10_000 for p in packed)


@pytest.mark.parametrize("words", [w for w in RUN if w[0] == "torchrun"], ids=shlex.join)
def test_several_ranks_start_as_it_is_said(words: tuple[str, ...], there: Path) -> None:
    words = tuple({"N": "2"}.get(word, PLACEHOLDERS.get(word, word)) for word in words)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        *words[1:],
        *SMALL,
        *DATA,
        "run.name=ranks",
    ]

    done = subprocess.run(command, env=paths(), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert (there / "runs" / "ranks" / "checkpoints" / "latest").is_file()


def test_every_excuse_is_of_a_command_that_is_there() -> None:
    lines = [" ".join(c.words) for c in COMMANDS]
    idle = [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, line) for line in lines)]

    assert not idle, "no document has these any more"
    held_by = {path for reason in NOT_RUN.values() for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason)}
    assert len(held_by) >= 6 and all((ROOT / path).exists() for path in held_by), held_by
    assert len(RUN) >= 25 and {words[0] for words in RUN} == {"python", "torchrun"}


def test_a_command_that_fails_would_be_found(there: Path) -> None:
    for line in ("mvle.train tiny optim.lrr=1", "mvle.evaluate all runs/nothing", "mvle.data index nothing-*.tar"):
        assert run(("python", "-m", *line.split())) != 0, line


def test_what_the_readme_says_of_a_row_of_pairs_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its three commands, as they stand there, over its row of pairs.jsonl."""
    row = next(
        json.loads(code.replace(MORE, "a word")) for code in inline_code("README.md") if code.startswith('{"image"')
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "DIR" / row["image"])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")

    chain = [c.words for c in commands("README.md") if c.whole and c.words[:3] == ("python", "-m", "mvle.data")]
    assert [words[3] for words in chain] == ["pack", "index", "inspect"]
    assert [run(words) for words in chain] == [0, 0, 0]

    assert "1 images, 2 captions" in capsys.readouterr().out
    shards = load_config("base", ["data.train=data/mine/train-*.tar"]).data.train
    assert list(tmp_path.glob((shards or ("",))[0])) == [tmp_path / "data" / "mine" / "train-00000.tar"]


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_behind_what_the_readme_shows(there: Path) -> None:
    tree = text_of("README.md").split("## A run and what it leaves behind")[1].split("\n\n")[1]
    names = [line.removeprefix("    runs/tiny/").split()[0] for line in tree.splitlines()]
    assert {"config.yaml", "checkpoints/", "report.html"} <= {*names}

    for words in ("mvle.evaluate all runs/tiny", "mvle.report runs/tiny"):
        assert run(("python", "-m", *words.split())) == 0

    run_folder = there / "runs" / "tiny"
    for name in [*names, "checkpoints/latest", "checkpoints/best.json", "checkpoints/step_00000002"]:
        assert (run_folder / name).exists(), name


# ---- Python ---------------------------------------------------------------------------------------------------------


def paths() -> dict[str, str]:
    """The environment of a process that imports from this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def blocks() -> Iterator[str]:
    """Python of the README, and what another document marks as ```python run; docs/kernels.md has a test of its own."""
    yield from (text for text, _ in fences("README.md", "python"))
    for name in NAMES:
        yield from (text for text, how in fences(name, "python") if how == "run" and name != "README.md")


def test_the_python_of_the_documents_runs_on_a_run_and_on_its_export(there: Path) -> None:
    programs = list(blocks())
    assert len(programs) >= 3

    for program in programs:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=there, env=paths(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{program}\n{done.stderr}"
    assert (there / "red_circle.png").is_file()
