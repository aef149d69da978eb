"""Words: a byte-level BPE trained on the shards' captions, or the tokenizer of a published model.

Both end up as one `tokenizers` file, saved with the run, so that a run never needs the network again; encode adds bos
and eos itself. transformers is imported only to fetch a published tokenizer by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..hub import HubError, cache_then_hub
from ..section import Section
from .errors import DataError
from .files import temporary_beside

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0..4 of a trained vocabulary, in RoBERTa's order
_FILE, _NOTE = "tokenizer.json", "mvle_tokenizer.json"
_ROLES = ("bos_id", "pad_id", "eos_id", "unk_id", "mask_id")
_MOST_CAPTIONS = 5_000_000  # more teach a vocabulary nothing new
ROBERTA_WORDS = 50_265


class TokenizerConfig(Section):
    """Which words: trained on the captions, or those of a published model."""

    kind: Literal["bpe", "transformers"] = Field(
        "transformers", description="bpe: trained on the captions of data.train, lower case; transformers: by name"
    )
    name: str = Field("roberta-base", description="kind transformers: name on the Hugging Face hub, or a local folder")
    vocabulary: int = Field(
        8192,
        ge=320,
        description="kind bpe: most tokens of the vocabulary, with 256 single bytes and five special ones; small "
        "corpora give fewer",
    )


class TokenizerError(DataError):
    """A tokenizer that cannot be had; the message names the key and what else to try."""


class Tokenizer:
    """Captions <-> token ids. bos_id, eos_id, mask_id, pad_id, unk_id; vocabulary = number of ids."""

    def __init__(self, backend: Any, specials: dict[str, int]) -> None:
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        self._specials = {role: int(specials[role]) for role in _ROLES}
        self.bos_id, self.pad_id, self.eos_id, self.unk_id, self.mask_id = (self._specials[role] for role in _ROLES)
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocabulary = max(ids) + 1

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked and never a word."""
        return tuple(sorted(set(self._specials.values())))

    @property
    def fingerprint(self) -> str:
        """Hex hash of the whole tokenizer: equal fingerprints give equal ids."""
        content = json.dumps([json.loads(self._backend.to_str()), self._specials], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def same_words(self, other: Tokenizer) -> bool:
        """Whether every id is the same word (or piece of one) in both, and has the same role."""
        one, two = (t._backend.get_vocab(with_added_tokens=True) for t in (self, other))
        return one == two and self._specials == other._specials

    def encode(self, captions: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
        """(ids of each caption with bos and eos, at most max_tokens of them; how many captions were cut).

        A cut caption keeps bos and eos. The literal "<mask>" (or the model's own mask token) becomes mask_id.
        """
        room = max_tokens - 2
        encoded = self._backend.encode_batch_fast(list(captions), add_special_tokens=False)
        bodies = [one.ids for one in encoded]
        cut = sum(len(body) > room for body in bodies)
        return [[self.bos_id, *body[:room], self.eos_id] for body in bodies], cut

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without bos, eos and padding; mask tokens stay visible."""
        dropped = (self.bos_id, self.eos_id, self.pad_id)
        kept = [int(i) for i in ids if int(i) not in dropped]
        text = self._backend.decode(kept, skip_special_tokens=False)
        mask = self._backend.id_to_token(self.mask_id)
        return " ".join(text.replace(mask, f" {mask} ").split())  # the mask token takes the space before it

    def word(self, token_id: int) -> str:
        """The text of one token, stripped ("" for ids that a padded vocabulary adds)."""
        return self._backend.decode([int(token_id)], skip_special_tokens=False).strip()

    def save(self, folder: str | os.PathLike[str], max_tokens: int | None = None) -> Path:
        """Write the folder whole (temporary name, rename); one that is there stays. transformers can read it too.

        max_tokens: for other hands than ours: what reads the file adds bos and eos by itself, and knows that length.
        """
        target = Path(folder)
        if (target / _NOTE).is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        temporary.mkdir()
        try:
            whole = self._backend if max_tokens is None else self._with_bos_and_eos()
            (temporary / _FILE).write_text(whole.to_str(pretty=True), encoding="utf-8")
            names = {role: self._backend.id_to_token(i) for role, i in self._specials.items()}
            hub: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
            hub |= {f"{role[:-3]}_token": token for role, token in names.items() if token is not None}
            hub |= {} if max_tokens is None else {"model_max_length": max_tokens}
            (temporary / "tokenizer_config.json").write_text(json.dumps(hub, indent=1), encoding="utf-8")
            (temporary / _NOTE).write_text(json.dumps(self._specials, indent=1), encoding="utf-8")
            try:
                os.replace(temporary, target)
            except OSError:
                if not (target / _NOTE).is_file():  # not another rank that was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _with_bos_and_eos(self) -> Any:
        from tokenizers import Tokenizer as Backend
        from tokenizers import processors

        copy = Backend.from_str(self._backend.to_str())
        bos, eos = (self._backend.id_to_token(i) for i in (self.bos_id, self.eos_id))
        copy.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", special_tokens=[(bos, self.bos_id), (eos, self.eos_id)]
        )
        return copy

    @staticmethod
    def load(folder_or_name: str | os.PathLike[str]) -> Tokenizer:
        """A folder written by `save`, else any transformers tokenizer by local path or name. Raises TokenizerError."""
        folder = Path(folder_or_name)
        if (folder / _NOTE).is_file():
            from tokenizers import Tokenizer as Backend

            specials = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
            return Tokenizer(Backend.from_file(str(folder / _FILE)), specials)
        return _from_transformers(os.fspath(folder_or_name))


def build_tokenizer(config: TokenizerConfig, shards: Any, folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a run: the one saved in `folder`, or a new one, saved there. shards: a ShardSet.

    Raises TokenizerError (a published tokenizer that cannot be fetched).
    """
    if not (Path(folder) / _NOTE).is_file():
        made = (
            train_bpe(all_captions(shards), config.vocabulary) if config.kind == "bpe" else Tokenizer.load(config.name)
        )
        made.save(folder)
    return Tokenizer.load(folder)


def check_tokenizer(config: TokenizerConfig, run_folder: str | os.PathLike[str]) -> None:
    """Raise TokenizerError, within seconds, where a run could not have its tokenizer. Trains nothing, saves nothing.

    run_folder: the run's; a tokenizer saved in its tokenizer/ needs nothing else.
    """
    if config.kind == "transformers" and not (Path(run_folder) / "tokenizer" / _NOTE).is_file():
        Tokenizer.load(config.name)


def known_vocabulary(config: TokenizerConfig) -> tuple[int, str]:
    """(number of ids, where that comes from), as far as it is known before any caption is read."""
    if config.kind == "bpe":
        return config.vocabulary, "at most; a run trains them on the captions of data.train"
    try:
        return Tokenizer.load(config.name).vocabulary, f"{config.name}"
    except TokenizerError:
        return ROBERTA_WORDS, f"as roberta-base has; {config.name} cannot be had here, and a run would need it"


def all_captions(shards: Any) -> Iterator[str]:
    """The captions of a set in order; of more than five million every k-th image's."""
    stride = -(-shards.pairs // _MOST_CAPTIONS)
    for row in range(0, shards.images, stride):
        yield from shards.captions(row)


def train_bpe(captions: Iterator[str] | Sequence[str], vocabulary: int) -> Tokenizer:
    """A lower-case byte-level BPE of at most `vocabulary` tokens. The same captions give the same vocabulary."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A space before the first word too: "red" is one token wherever it stands.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False, lstrip=t == "<mask>") for t in SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    return Tokenizer(backend, dict(zip(_ROLES, range(5), strict=True)))


# --- published tokenizers --------------------------------------------------------------------------------------------


def _from_transformers(name: str) -> Tokenizer:
    """By local path, from the local cache, then from the hub if that answers. Raises TokenizerError within seconds."""
    from transformers import AutoTokenizer

    try:
        found = cache_then_hub(
            lambda local: AutoTokenizer.from_pretrained(name, local_files_only=local),
            (OSError, ValueError, KeyError, ImportError),
            folder=os.path.isdir(name),
        )
    except HubError as error:
        raise TokenizerError(
            f"tokenizer.name={name} cannot be had. {error}\n"
            "Name a folder that holds it (tokenizer.name=PATH), fetch it once where there is a network, or train one "
            "on the captions: tokenizer.kind=bpe"
        ) from error.reason
    return _wrap(found, name)


def _wrap(found: Any, name: str) -> Tokenizer:
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"tokenizer.name={name} has no tokenizer.json form. Name another, or set tokenizer.kind=bpe."
        )
    candidates = {
        "bos_id": (found.bos_token_id, found.cls_token_id),
        "eos_id": (found.sep_token_id, found.eos_token_id),
        "mask_id": (found.mask_token_id,),
        "unk_id": (found.unk_token_id, found.pad_token_id),
        "pad_id": (found.pad_token_id, found.eos_token_id),
    }
    specials = {role: next((i for i in ids if i is not None), None) for role, ids in candidates.items()}
    lacking = [role[:-3] for role in _ROLES if specials[role] is None]
    if lacking:
        raise TokenizerError(
            f"tokenizer.name={name} has no {' and no '.join(lacking)} token, which masked language modelling needs. "
            "Name another, such as roberta-base, or set tokenizer.kind=bpe."
        )
    return Tokenizer(backend, {role: i for role, i in specials.items() if i is not None})
