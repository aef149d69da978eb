"""The root config, and how YAML files and key=value overrides become it.

    defaults of the sections  <  the file that is extended  <  the YAML file  <  key.sub=value

Each section is a frozen model that lives beside the code that it configures; this file composes them, checks what
spans sections, and turns every mistake into one line that names the key, what was expected, what came, and the file.
Files are found and read in config_files.py.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from .config_files import ConfigError, read_config
from .config_keys import describe_keys, explain, flatten, shown, wrong_keys
from .data.config import DataConfig
from .data.tokenizer import TokenizerConfig
from .engine.checkpoint import CheckpointConfig
from .engine.metrics import MetricsConfig
from .engine.optim import OptimConfig
from .engine.parallel import BatchConfig, ParallelConfig
from .engine.run import RunConfig
from .engine.schedule import ScheduleConfig
from .evaluation.config import EvaluationConfig
from .model.config import KernelsConfig, ModelConfig
from .objectives.config import ObjectivesConfig
from .objectives.masking import MaskingConfig
from .section import Section

log = logging.getLogger(__name__)

# Runs and exports have them in their configs -> why they went.
FORMER = {"data.max_pixels": "how large an image may be is said where it is indexed (index --max-pixels)."}
# A resumed run may differ in these: they change neither what is learned nor in which order. Where the shards are is
# looked at through their fingerprint, and the schedule through the learning rates that it has had (engine/resume.py).
FREE_ON_RESUME = (
    "run.name",
    "run.folder",
    "run.device",
    "run.threads",
    "data.train",
    "data.val",
    "data.test",
    "data.shapes_folder",
    "data.index_folder",
    "data.read_ahead",
    "data.cache_folder",
    "data.cache_gib",
    "data.decoder",
    "data.threads",
    "data.prefetch",
    "data.max_bad_share",
    "optim.backend",
    "optim.max_skipped",
    "batch.micro",
    "parallel",
    "checkpoint",
    "evaluation.every",
    "metrics",
    "kernels",
)


class Config(Section):
    """Everything that decides a run."""

    run: RunConfig = Field(default_factory=RunConfig, description="where it lives")
    data: DataConfig = Field(default_factory=DataConfig, description="which pairs")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="which words")
    model: ModelConfig = Field(default_factory=ModelConfig, description="how large")
    masking: MaskingConfig = Field(default_factory=MaskingConfig, description="what is masked")
    objectives: ObjectivesConfig = Field(default_factory=ObjectivesConfig, description="what is learned")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="the optimizer")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="how long")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="pairs of a step")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="how ranks share the model")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="what is kept")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="validation while training")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="the log")
    kernels: KernelsConfig = Field(default_factory=KernelsConfig, description="which implementation of each op")

    @model_validator(mode="after")
    def check(self) -> Config:
        """What spans sections: every line that fails, at once."""
        if problems := list(cross_checks(self)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def approximations(self) -> list[str]:
        """What makes the steps something else than the paper's, a line each; none: they are exact."""
        return [line for section in (self.masking, self.schedule) if (line := section.approximation)]

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as plain dicts, lists, numbers and strings, which JSON has too."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved config as YAML; `load_config` reads it back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """The checked config of nested dicts; keys of FORMER are left out, with a word. Raises ConfigError."""
        values = _without_former(values)
        if problems := list(wrong_keys(Config, values)):
            raise ConfigError("\n".join(problems))
        try:
            return Config.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("\n".join(explain(Config, error))) from None


def _without_former(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    for key, why in FORMER.items():
        section, _, name = key.partition(".")
        if isinstance(kept.get(section), dict) and name in kept[section]:
            del kept[section][name]
            log.warning("%s is no config key any more, and is left out: %s", key, why)
    return kept


def describe() -> str:
    """Every key with its type, default and meaning, by section: the text of --help."""
    return describe_keys(Config)


def differences(now: Config, before: Config, ignore: Collection[str] = FREE_ON_RESUME) -> list[tuple[str, Any, Any]]:
    """(key, value now, value before) wherever two configs differ; `ignore` names keys or whole sections."""
    flat, old = flatten(now.to_dict(), Config), flatten(before.to_dict(), Config)
    ignored = tuple(f"{key}." for key in ignore)
    return [(key, flat[key], old[key]) for key in flat if flat[key] != old[key] and not f"{key}.".startswith(ignored)]


def load_config(name_or_path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file over what it extends (None: no file), then each `key.sub=value`; checked as a whole.

    The value of an override is YAML: `masking.image_ratio=[0.6,1.0]`, `optim.encoder_lr=null`. Raises ConfigError.
    """
    stated = read_config(name_or_path, overrides)
    try:
        return Config.from_dict({k: {} if v is None else v for k, v in stated.values.items()})  # data=null: defaults
    except ConfigError as error:
        raise ConfigError("\n".join(stated.where(line) for line in str(error).splitlines())) from None


# --- checks ----------------------------------------------------------------------------------------------------------


def cross_checks(config: Config) -> Iterator[str]:
    """One message for each impossible combination of sections. Ranks are known only at run time: see `check_ranks`."""
    batch, image, masking = config.batch, config.model.image, config.masking
    slots = config.data.slots_for(batch.total)
    if batch.total % slots:
        yield (
            f"data.slots must divide batch.total ({batch.total}); got {slots}. "
            f"Set it to a divisor, such as {math.gcd(batch.total, slots)}, or null."
        )
    if batch.micro is not None and batch.total % batch.micro:
        yield (
            f"batch.micro must divide batch.total ({batch.total}); got {batch.micro}. "
            f"Set it to a divisor, such as {math.gcd(batch.total, batch.micro)}."
        )
    else:  # advice about a micro-batch that cannot stay would contradict the line above
        yield from _check_group(config, batch.micro or batch.total, "batch.micro" if batch.micro else "batch.total")
    yield from _check_best(config)
    if (window := config.metrics.profile) is not None and window[1] > config.schedule.steps:
        yield f"metrics.profile must end within schedule.steps ({config.schedule.steps}); got {list(window)}."
    if masking.cell % image.patch:
        yield (
            f"masking.cell must be a multiple of model.image.patch ({image.patch}); got {masking.cell}. "
            f"Cells are made of whole patches; {image.patch} always fits."
        )
    elif image.size % masking.cell:
        yield (
            f"masking.cell must divide model.image.size ({image.size}); got {masking.cell}. "
            f"An image is made of whole cells; {image.patch} always fits."
        )
    if masking.insert == "decoder" and masking.mode != "drop":
        yield (
            "masking.insert=decoder expected masking.mode=drop, where mask tokens enter after the encoder; got "
            f"masking.mode={masking.mode}. Set masking.mode=drop or masking.insert=cross."
        )
    for side in {side for side, _ in config.schedule.resolution}:
        if side >= image.size or side % masking.cell:
            fits = max(min(side, image.size - 1) // masking.cell, 1) * masking.cell
            yield (
                f"schedule.resolution must name sides below model.image.size ({image.size}) that are multiples of "
                f"masking.cell ({masking.cell}); got {side}."
                + (f" {fits} fits." if fits < image.size else " No side fits: the image is one cell.")
            )
    kinds = config.objectives
    words_read_images = kinds.mlm.weight and masking.context == "clean"
    if masking.clean_keep < 1 and not (words_read_images or kinds.itc.weight or kinds.itm.weight):
        yield (
            f"masking.clean_keep={masking.clean_keep:g} expected a loss that reads whole images (itc, itm, or mlm with "
            "masking.context=clean); got weight 0 for each, so there is nothing to shorten. Set masking.clean_keep=1."
        )


def _check_best(config: Config) -> Iterator[str]:
    """checkpoint.best must be a figure that validation will give."""
    best = config.checkpoint.best
    if best is None:
        return
    if config.evaluation.every == 0:
        yield (
            f"checkpoint.best={best} expected validation while training; got evaluation.every=0. Set evaluation.every, "
            "or checkpoint.best=null."
        )
    objective = "itc" if best.startswith("val_r1_") else best.removeprefix("val_").removesuffix("_accuracy")
    if objective != "loss" and getattr(config.objectives, objective).weight == 0:
        yield (
            f"checkpoint.best={best} expected objectives.{objective}.weight above 0; got 0: validation gives no "
            "such figure. Choose another, such as val_loss."
        )


def _check_group(config: Config, micro: int, key: str) -> Iterator[str]:
    itm = config.objectives.itm
    if itm.weight and micro % itm.group:
        divisor = math.gcd(micro, itm.group)
        yield (
            f"objectives.itm.group must divide {key} ({micro}), so that negatives are drawn within one forward; got "
            f"{itm.group}. " + (f"Set it to {divisor}." if divisor >= 2 else f"Make {key} a multiple of it.")
        )


@dataclass(frozen=True)
class BatchArithmetic:
    """How batch.total is made: ranks x micro x accumulate."""

    ranks: int
    micro: int
    accumulate: int

    @property
    def per_rank(self) -> int:
        """Pairs of a step on one rank."""
        return self.micro * self.accumulate

    @property
    def total(self) -> int:
        """Pairs of a step."""
        return self.ranks * self.per_rank

    def __str__(self) -> str:
        return f"{self.ranks} ranks x {self.micro} x {self.accumulate} accumulate = {self.total} pairs"


def check_ranks(config: Config, ranks: int) -> BatchArithmetic:
    """How `ranks` ranks share a step. Raises ConfigError where they cannot."""
    total, per_rank = config.batch.total, config.batch.total // ranks
    slots = config.data.slots_for(total)
    micro = config.batch.micro or max(per_rank, 1)
    problems = []
    if total % ranks:
        problems.append(
            f"batch.total must be a multiple of the number of ranks ({ranks}); got {total}. Start "
            f"{math.gcd(total, ranks)} ranks, or set batch.total={-(-total // ranks) * ranks}."
        )
    if slots % ranks:
        problems.append(
            f"data.slots must be a multiple of the number of ranks ({ranks}); got {slots}. Start "
            f"{math.gcd(slots, ranks)} ranks, or choose another data.slots for a new run: it orders the pairs."
        )
    if not problems and per_rank % micro:
        problems.append(
            f"batch.micro must divide batch.total / ranks ({total} / {ranks} = {per_rank}); got {micro}. "
            f"Set batch.micro={math.gcd(per_rank, micro)}."
        )
    if not problems:
        problems += _check_group(config, micro, "batch.micro" if config.batch.micro else "batch.total / ranks")
    if problems:
        raise ConfigError("\n".join(problems))
    return BatchArithmetic(ranks, micro, per_rank // micro)


def require_data(config: Config, command: str = "python -m mvle.train CONFIG") -> None:
    """Raise ConfigError, with what to type, where data.train (or data.val, if validation is on) names no shards."""
    missing = [key for key in ("train", "val") if not getattr(config.data, key)]
    if config.evaluation.every == 0:
        missing = [key for key in missing if key == "train"]
    if not missing:
        return
    names, got = " and ".join(f"data.{key}" for key in missing), shown(getattr(config.data, missing[0]))
    raise ConfigError(
        f"{names} must name shards of image-caption pairs; got {got}.\n"
        "Make shards of your own pairs (one JSON line each: image, captions, split), index them, and name them:\n"
        "    python -m mvle.data pack --format jsonl --input pairs.jsonl --images DIR --output data/mine\n"
        "    python -m mvle.data index data/mine/*.tar\n"
        f"    {command} 'data.train=data/mine/train-*.tar' 'data.val=data/mine/val-*.tar'\n"
        "Or try the engine without data, on pictures of shapes that it draws itself:\n"
        f"    {command} data.train=shapes:train data.val=shapes:val tokenizer.kind=bpe"
    )
