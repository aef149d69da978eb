"""Export a run: `python -m mvle.export RUN --output DIR`.

    DIR/README.md            the model card, with the run's own figures
        model.safetensors    every parameter, float32, by its name in mvle
        config.yaml, tokenizer/, meta.json       with it all that mvle.load(DIR) and model.init_from=DIR need
        evaluation.json      the figures, where `mvle.evaluate` found some of exactly these weights
        image_encoder/       for timm: timm.create_model("local-dir:DIR/image_encoder", pretrained=True)
        text_encoder/        for transformers: RobertaModel.from_pretrained("DIR/text_encoder")

Nothing in it is a pickle. The folder appears whole or not at all; one that is there is replaced with --overwrite alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .evaluate import add_checkpoint_arguments

if TYPE_CHECKING:
    from .inference import OpenedRun

FORMAT = 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m mvle.export", description=__doc__.split("\n", 1)[0])
    made.add_argument("run", metavar="RUN", help="folder of a run")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add_checkpoint_arguments(made)
    made.add_argument("--overwrite", action="store_true", help="replace DIR if it is an export")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a run that cannot be used or a folder that cannot be written."""
    options = parser().parse_args(arguments)
    from .config import ConfigError
    from .data.errors import DataError
    from .engine.errors import CheckpointError, RunError
    from .inference import open_run

    try:
        check_output(options.output, options.overwrite)
        run = open_run(options.run, "cpu", options.checkpoint, options.weights)
        export(run, options.output, options.overwrite)
    except (RunError, ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"mvle.export: {error}", file=sys.stderr)
        return 2
    where = options.output
    print(
        f"{run}: {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f}M parameters\n"
        f"written to {where}\n"
        f"    mvle           mvle.load({str(where)!r}), model.init_from={where}\n"
        f"    timm           timm.create_model('local-dir:{where / 'image_encoder'}', pretrained=True)\n"
        f"    transformers   RobertaModel.from_pretrained({str(where / 'text_encoder')!r}, add_pooling_layer=False)"
    )
    return 0


def check_output(output: Path, overwrite: bool) -> None:
    """Raise RunError where something is there that is not to be replaced."""
    from .engine.errors import RunError
    from .engine.stored import is_export

    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not is_export(output):
        raise RunError(f"--output must be a new folder, or an export with --overwrite; {output} is something else.")
    if not overwrite:
        raise RunError(f"--output must be a new folder; {output} is an export already. --overwrite replaces it.")


def export(run: OpenedRun, output: Path, overwrite: bool = False) -> Path:
    """Write an opened run (on any device) as a folder; returns it. Raises RunError where it is there, OSError."""
    output = Path(output).absolute()
    check_output(output, overwrite)
    temporary = output.with_name(f".{output.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(run, temporary, output.name)
        put_in_place(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def write(run: OpenedRun, folder: Path, name: str) -> None:
    """Every file. name: that of the folder when it is in its place."""
    from .data.remote import shown  # a folder for others holds no keys of URLs
    from .engine.run import RunFolder
    from .engine.stored import MODEL_FILE
    from .exporting.card import card
    from .exporting.encoders import tensors_of, write_image_encoder, write_tensors, write_text_encoder
    from .report import figures

    files = RunFolder(folder)
    model, config = run.model, run.config
    write_tensors(folder / MODEL_FILE, tensors_of(model))
    run.tokenizer.save(files.tokenizer)
    files.write_config(shown(config.to_yaml()))
    write_image_encoder(folder / "image_encoder", config.model, model.image_encoder)
    write_text_encoder(folder / "text_encoder", config.model, model.text_encoder, run.tokenizer)
    known = figures(run)
    if known:
        files.evaluation.write_text(shown(json.dumps(known, indent=1, allow_nan=False)) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(shown(card(name, run, known, validation_row(run))), encoding="utf-8")
    (folder / "meta.json").write_text(shown(json.dumps(meta(run, folder), indent=1)) + "\n", encoding="utf-8")


def meta(run: OpenedRun, folder: Path) -> dict[str, Any]:
    """meta.json: what the checkpoint's says of the model, which weights these are, sizes of the files that must stay as
    they are (the card and the figures may change), and checksums of those that hold weights."""
    from .engine.stored import sha256

    about_the_checkpoint = ("files", "metadata_crc32", "ranks", "threads")
    kept = {key: value for key, value in run.meta.items() if key not in about_the_checkpoint}
    fixed = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    fixed += [folder / "model.safetensors", folder / "config.yaml"]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(fixed)}
    sums = {name: sha256(folder / name) for name in sizes if name.endswith(".safetensors")}
    made = {"weights": run.weights, "export": FORMAT, "exported_by": f"mvle {__version__}"}
    return {**kept, **made, "files": sizes, "sha256": sums}


def validation_row(run: OpenedRun) -> Mapping[str, Any]:
    """What training found at its validation after exactly this step, of the weights that it validates; {}: nothing."""
    from .engine.metrics import read_rows
    from .engine.run import RunFolder

    path = RunFolder(run.folder).metrics
    validated = "model" if run.config.optim.ema is None else "ema"
    if not path.is_file() or run.weights != validated:
        return {}
    return next((row for row in reversed(read_rows(path, "val")) if row["step"] == run.step), {})


def put_in_place(temporary: Path, output: Path) -> None:
    """Give a folder its name; what had it before is removed afterwards."""
    aside = output.with_name(f".{output.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if output.exists():
        os.rename(output, aside)
    os.rename(temporary, output)
    shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
