"""MaskVLM: the model in the order of the paper. One root forward computes everything that a step asks for.

    image --patchify--> mask --> image encoder --> image cross --> decoder --> pixels     MIM, p(image | text)
    text  --tokens----> mask --> text encoder ---> text cross ---------------> words      MLM, p(text | image)
    whole image, whole caption --> global tokens --> ITC --> hard negatives --> both cross encoders --> ITM

Heads and losses run inside `forward`, since under FSDP their weights are whole only there. `encode_images`,
`encode_texts`, `match`, `fill` and `reconstruct` are the entries that evaluation uses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from mvle_kernels import Packed, PatchView, Stream, concatenate, insert_mask_tokens, patchify, words
from torch import Tensor, nn

from ..data.batch import Batch
from ..objectives.itc import ContrastPart, Itc, contrast_parts
from ..objectives.itm import Itm
from ..objectives.mim import Mim, mim_sets
from ..objectives.mlm import Mlm, mlm_sets
from .heads import Heads, Temperature
from .image_encoder import ImageEncoder, resample_positions
from .queries import Draw, QuerySet, StageName, View
from .stage import Stage, plan_stage
from .step import Choices, Step, choose_clean_patches, choose_image_masks, choose_token_masks
from .text_encoder import TextEncoder

if TYPE_CHECKING:
    from ..config import Config
    from ..objectives.base import Objective

STAGES: tuple[StageName, ...] = ("image_cross", "text_cross", "decoder")
NAMES = ("mim", "mlm", "itc", "itm")


@dataclass(frozen=True, eq=False)
class Losses:
    """total: 0-d, to call backward on. report: name -> detached 0-d tensor, shares of the global batch, to be summed
    over micro-batches and ranks. state: what every micro-batch and rank has alike (the temperature). broken: bool [B],
    the pairs whose own rows are not finite, so that a step which has to be skipped can say by whom."""

    total: Tensor
    report: dict[str, Tensor]
    state: dict[str, Tensor]
    broken: Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """rows Packed [T, D] of one side's encoder; z float32 [S, d] of unit length."""

    rows: Packed
    z: Tensor


class MaskVLM(nn.Module):
    """Two encoders, two cross encoders, a decoder and the heads."""

    def __init__(self, config: Config, vocabulary: int, mask_id: int) -> None:
        super().__init__()
        model = config.model
        self.config, self.vocabulary, self.mask_id = config, vocabulary, mask_id
        self.row_multiple = config.kernels.row_multiple
        inner = int(model.width * model.mlp_ratio)
        self.image_encoder = ImageEncoder(model, self.row_multiple)
        self.text_encoder = TextEncoder(model, vocabulary)
        self.image_cross = Stage(model.width, model.heads, inner, model.cross_depth)
        self.text_cross = Stage(model.width, model.heads, inner, model.cross_depth)
        self.decoder = Stage(model.width, model.heads, inner, model.decoder_depth)
        self.heads = Heads(model, vocabulary)
        if config.masking.mode == "drop":
            rows, columns = model.image.grid
            self.insert_token = nn.Parameter(torch.empty(model.width))
            self.insert_positions = nn.Parameter(torch.empty(rows * columns + 1, model.width))
        kinds = config.objectives
        everything: list[Objective] = [
            Mim(kinds.mim, config.masking, model.image),
            Mlm(kinds.mlm, config.masking),
            Itc(kinds.itc),
            Itm(kinds.itm),
        ]
        self.objectives = [o for o in everything if o.weight > 0]

    # ---- training ---------------------------------------------------------------------------------------------------

    def set_contrast_group(self, group: Any) -> None:
        """The process group over which the contrastive loss gathers embeddings; None: this batch alone."""
        for objective in self.objectives:
            if isinstance(objective, Itc):
                objective.group = group

    def counts(self, batch: Batch) -> Tensor:
        """This rank's denominators, float64 [4] in the order mim, mlm, itc, itm; 0 for what is not trained.

        From lengths and ids alone, so that they can be summed over ranks before the first forward of a step.
        """
        own = {o.name: o.count(batch) for o in self.objectives}
        like = torch.zeros((), dtype=torch.float64, device=batch.images.device)
        parts = [own.get(name, 0) for name in NAMES]  # a number is filled in: to copy it would wait for the device
        return torch.stack([p.to(like) if isinstance(p, Tensor) else torch.full_like(like, p) for p in parts])

    @property
    def contrasts(self) -> bool:
        """Whether the contrastive loss is trained."""
        return any(isinstance(o, Itc) for o in self.objectives)

    @torch.no_grad()
    def contrast_embeddings(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(image_z, text_z), each of unit length [B, d], and the temperature [1], without a graph: what the contrastive
        loss of a batch in several micro-batches is taken over before their forwards. seed: the run's."""
        heads = self.heads
        images = self.image_encoder(batch.images, None, None, [self.clean_patches(batch, seed) or "clean"])
        image_z = heads.embed(images, heads.image_projection)
        text_z = heads.embed(self.text_encoder(batch.text), heads.text_projection)
        return image_z, text_z, heads.temperature()

    def contrast_parts(self, batch: Batch, embeddings: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[ContrastPart]:
        """The contrastive loss over all of a rank's batch, for each of the micro-batches whose `contrast_embeddings`
        came, in order. Every rank must call it."""
        group = next(o.group for o in self.objectives if isinstance(o, Itc))
        return contrast_parts([(image, text) for image, text, _ in embeddings], embeddings[0][2], batch, group)

    def forward(
        self, batch: Batch, seed: int, counts: Tensor, contrast: ContrastPart | None = None, only: str | None = None
    ) -> Losses:
        """One (micro-)batch: sum_k weight_k * sum_k / counts_k. seed: the run's; counts as `counts` gives them.

        contrast: the micro-batch's part of a contrastive loss that was taken over the whole batch; None: over this
        batch. only: one objective by name, with the negatives and masks that it has among all of them.
        """
        objectives = [o for o in self.objectives if only in (None, o.name)]
        wanted = frozenset[View]().union(*(o.views() for o in objectives))
        step = Step(batch, seed, self.row_multiple, self.choose(batch, seed, wanted), contrast=contrast)
        self.encode(step, wanted)
        rows = self.ask(step, [s for o in objectives for s in o.sets(step)])
        total: Tensor | None = None
        report: dict[str, Tensor] = {}
        for objective in objectives:
            result = objective.result(step, rows, self.heads)
            count = counts[NAMES.index(objective.name)].clamp(min=1).to(result.loss.dtype)
            loss = result.loss / count
            report[objective.name] = loss.detach()
            report |= {name: value.to(loss.dtype) / count for name, value in result.correct.items()}
            total = objective.weight * loss if total is None else total + objective.weight * loss
        assert total is not None
        report["loss"] = total.detach()
        state = {} if step.temperature is None else {"temperature": step.temperature.detach()[0]}
        return Losses(total, report, state, broken_pairs(step))

    def choose(self, batch: Batch, seed: int, wanted: frozenset[View]) -> Choices:
        """The masks of the sides that some objective wants masked, and what a clean image shows."""
        masking, image = self.config.masking, self.config.model.image
        keep = masked = tokens = positions = read = targets = clean = None
        if View.IMAGE_MASKED in wanted:
            keep, masked = choose_image_masks(batch, seed, masking, image, self.row_multiple)
        if View.TEXT_MASKED in wanted:
            tokens, positions, read, targets = choose_token_masks(
                batch, seed, masking, self.mask_id, self.vocabulary, self.row_multiple
            )
        if View.IMAGE_CLEAN in wanted:
            clean = self.clean_patches(batch, seed)
        return Choices(keep, masked, tokens, positions, read, targets, clean)

    def clean_patches(self, batch: Batch, seed: int) -> Packed | None:
        """The patches that clean image views show (masking.clean_keep); None: all, as always outside training."""
        masking = self.config.masking
        if masking.clean_keep == 1 or not self.training:
            return None
        return choose_clean_patches(batch, seed, masking, self.config.model.image, self.row_multiple)

    def encode(self, step: Step, wanted: frozenset[View]) -> None:
        """Encode the wanted views, each encoder in one call, and project the globals where both sides are whole."""
        images = [v for v in (View.IMAGE_CLEAN, View.IMAGE_MASKED) if v in wanted]
        if images:
            choices = step.choices
            kinds: dict[View, PatchView] = {
                View.IMAGE_CLEAN: choices.clean or "clean",
                View.IMAGE_MASKED: self.config.masking.mode,
            }
            packed = self.image_encoder(step.batch.images, choices.keep, choices.masked, [kinds[v] for v in images])
            step.views |= zip(images, split_sequences(packed, len(images)), strict=True)
        texts = [v for v in (View.TEXT_CLEAN, View.TEXT_MASKED) if v in wanted]
        if texts:
            tokens = {View.TEXT_CLEAN: step.batch.text, View.TEXT_MASKED: step.choices.tokens}
            packed = self.text_encoder(concatenate([tokens[v] for v in texts], self.row_multiple))  # type: ignore
            step.views |= zip(texts, split_sequences(packed, len(texts)), strict=True)
        if self.contrasts and {View.IMAGE_CLEAN, View.TEXT_CLEAN} <= step.views.keys():
            step.image_z = self.heads.embed(step.views[View.IMAGE_CLEAN], self.heads.image_projection)
            step.text_z = self.heads.embed(step.views[View.TEXT_CLEAN], self.heads.text_projection)
            step.temperature = self.heads.temperature()

    def ask(self, step: Step, sets: Sequence[QuerySet], known: Mapping[str, Packed] | None = None) -> dict[str, Packed]:
        """Put the query sets to the cross stages, each stage once (and once more for sets that read no context); rows
        by set name, with those already `known`."""
        rows: dict[str, Packed] = dict(known or {})
        calls = [
            [s for s in sets if s.stage == st and (s.context is None) == alone] for st in STAGES for alone in (0, 1)
        ]
        for asked in filter(None, calls):
            inserted: dict[tuple[Any, bool], Packed] = {}
            sources = {}
            for s in asked:
                key = (s.source, s.insert)
                if key not in inserted:
                    source = rows[s.source] if isinstance(s.source, str) else step.views[s.source]
                    inserted[key] = self.insert(source, step) if s.insert else source
                sources[s.name] = inserted[key]
            contexts = {s.name: None if s.context is None else step.views[s.context] for s in asked}
            module: Stage = getattr(self, asked[0].stage)
            heads = self.config.model.heads
            rows |= module(plan_stage(asked, sources, contexts, self.row_multiple, len(module.blocks), heads))
        return rows

    def insert(self, rows: Packed, step: Step) -> Packed:
        """Drop mode: class + visible rows -> full length, mask tokens with their positions in between."""
        assert step.choices.masked is not None
        image = self.config.model.image
        positions = resample_positions(self.insert_positions, image.grid, image.of(step.batch.images).grid)
        return insert_mask_tokens(rows, step.choices.masked, self.insert_token, positions)

    # ---- what evaluation and users call -----------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Encoded:
        """uint8 [B, size, size, 3] -> rows and unit embeddings."""
        rows = self.image_encoder(images, None, None, ["clean"])
        return Encoded(rows, self.heads.embed(rows, self.heads.image_projection))

    @torch.no_grad()
    def encode_texts(self, text: Packed) -> Encoded:
        """Packed int32 token ids -> rows and unit embeddings."""
        rows = self.text_encoder(text)
        return Encoded(rows, self.heads.embed(rows, self.heads.text_projection))

    @torch.no_grad()
    def match(self, image_rows: Packed, text_rows: Packed, image_index: Tensor, text_index: Tensor) -> Tensor:
        """For each of P (image, caption) pairs of encoded rows: the log-odds that they belong together, [P].

        image_rows, text_rows: `rows` of `encode_images` / `encode_texts`; image_index, text_index int [P] into them.
        """
        images, image = chosen(image_rows, image_index)
        texts, text = chosen(text_rows, text_index)
        step = _bare_step(self.row_multiple)
        step.views |= {View.IMAGE_CLEAN: images, View.TEXT_CLEAN: texts}
        rows = self.ask(
            step,
            [
                QuerySet("image", "image_cross", View.IMAGE_CLEAN, View.TEXT_CLEAN, False, (image,), (text,), "global"),
                QuerySet("text", "text_cross", View.TEXT_CLEAN, View.IMAGE_CLEAN, False, (text,), (image,), "global"),
            ],
        )
        logits = self.heads.match_logits(rows["image"].rows[: len(image_index)], rows["text"].rows[: len(image_index)])
        return logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def fill(self, text: Packed, positions: Packed, images: Tensor | None) -> Tensor:
        """Logits float32 [R, vocabulary] of the words at `positions`, in order.

        text Packed int32 with the mask token where a word is wanted; positions Packed int32: rows of `text`, its
        lengths on the host; images uint8 [B, size, size, 3], one for each caption, or None: no image, and
        cross-attention is skipped, as always in a model that was trained so (masking.context=none).
        """
        sequence = torch.repeat_interleave(torch.arange(text.sequences), torch.tensor(positions.lengths))
        real = positions.rows[: len(sequence)].long()
        read = Packed.layout_of(positions.lengths or (), 1, text.rows.device)
        within = real - text.offsets.long()[sequence.to(real.device)]
        rows = self.text_encoder(text)
        step = _bare_step(self.row_multiple)
        step.views[View.TEXT_MASKED] = rows
        step.choices = Choices(read=read.with_rows(within.to(torch.int32)))
        context = None if images is None or self.config.masking.context == "none" else View.IMAGE_CLEAN
        if context is not None and images is not None:
            step.views[context] = self.encode_images(images).rows
        out = self.ask(step, mlm_sets(step, context))["mlm"].rows[: len(sequence)]
        head = self.heads.tokens
        return (out @ head.weight[: self.vocabulary].T + head.bias[: self.vocabulary]).float()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, masked: Tensor, text: Packed | None) -> Tensor:
        """Rebuilt patches float32 [B, N, X] in pixel units 0..1 (X as `patchify` orders it): predictions where masked,
        the image elsewhere.

        images uint8 [B, size, size, 3]; masked bool [B, N]; text Packed, one caption an image, or None: no captions,
        and cross-attention is skipped, as always in a model that was trained so (masking.context=none).
        With per-patch targets a prediction is scaled by the true patch's own mean and deviation.
        """
        config = self.config
        image = config.model.image
        if text is not None and text.shortest == 0:
            raise ValueError("captions must have tokens; got one of length 0. Without captions, text is None.")
        empty = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        batch = Batch(images, Packed.layout_of([0]), empty, empty, empty, [], (), masks={"image": masked})
        keep, holes = choose_image_masks(batch, 0, config.masking, image, self.row_multiple)
        packed = self.image_encoder(images, keep, holes, [config.masking.mode])
        step = Step(batch, 0, self.row_multiple, Choices(keep, holes), {View.IMAGE_MASKED: packed})
        context = None if text is None or config.masking.context == "none" else View.TEXT_CLEAN
        if context is not None and text is not None:
            step.views[context] = self.text_encoder(text)
        sets = mim_sets(step, config.masking, context)
        predicted = self.heads.pixels(self.ask(step, sets)["mim.decoder"].rows).float()
        predicted = predicted[: sum(holes.lengths or ())]
        target = patchify(images, image.patch, image.mean, image.std)
        if config.objectives.mim.per_patch:
            own = target[masked]
            predicted = predicted * torch.sqrt(own.var(-1, keepdim=True) + 1e-6) + own.mean(-1, keepdim=True)
        target[masked] = predicted
        scale, shift = (torch.tensor(v, device=target.device).repeat(image.patch**2) for v in (image.std, image.mean))
        return target * scale + shift

    # ---- how the engine treats the parameters -----------------------------------------------------------------------

    def blocks_to_shard(self) -> list[nn.Module]:
        """Modules that are sharded one by one (beside those of full precision); the root takes the rest."""
        stages = (self.image_cross, self.text_cross, self.decoder)
        blocks = [*self.image_encoder.blocks, *self.text_encoder.blocks]
        for stage in stages:
            blocks += [stage.context, *stage.blocks]
        return blocks

    def decay(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices of linear layers, not embeddings, tokens, positions, norms, biases."""
        return parameter.ndim >= 2 and not name.endswith(("positions", "words.weight"))

    def is_encoder(self, name: str) -> bool:
        """Whether a parameter belongs to an encoder (which may come pre-trained and take its own learning rate)."""
        return name.startswith(("image_encoder.", "text_encoder."))

    @torch.no_grad()
    def init_weights(self, seed: int, given: Mapping[str, Tensor] | None = None) -> None:
        """Fill every parameter from (seed, its name): the same on any number of ranks, whatever else the model holds.

        given: values by name, whole and on the CPU, in the place of drawn ones; the same on every rank.

        Linear weights, embeddings, tokens and positions: normal with model.initial_std, cut at two deviations; norms 1;
        biases 0. Works on sharded parameters (each is drawn whole on the CPU and every rank keeps its part).
        """
        for name, parameter in self.named_parameters():
            known = (given or {}).get(name)
            whole = self.initial(name, tuple(parameter.shape), seed) if known is None else known
            if whole.shape != parameter.shape:
                raise ValueError(f"given {name} must have shape {tuple(parameter.shape)}; got {tuple(whole.shape)}.")
            whole = whole.to(parameter.dtype)
            if hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import DTensor, distribute_tensor

                assert isinstance(parameter, DTensor)

                whole = distribute_tensor(
                    whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(whole)

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """The initial value of one parameter, float32 on the CPU."""
        std = self.config.model.initial_std
        if name == "heads.temperature.log_value":
            return torch.full(shape, math.log(self.config.model.temperature))
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        which = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        low, high = words(seed, Stream.INITIAL_WEIGHTS, torch.tensor(which), 2).tolist()
        generator = torch.Generator().manual_seed(high << 31 ^ low)
        value = torch.empty(shape)
        return nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in its range; after each optimizer step."""
        self.heads.temperature.log_value.clamp_(math.log(Temperature.LOW), math.log(Temperature.HIGH))


def parameter_counts(model: MaskVLM) -> dict[str, int]:
    """Parameters of each part of the model, and of what lies outside the parts."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    rest = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    return counts | ({"mask insertion": rest} if rest else {})


def split_sequences(packed: Packed, parts: int) -> list[Packed]:
    """Cut a Packed of equal numbers of sequences into `parts`, without tails. Lengths are known on the host."""
    assert packed.lengths is not None
    each = packed.sequences // parts
    sizes = [sum(packed.lengths[i * each : (i + 1) * each]) for i in range(parts)]
    rows = packed.rows.split([*sizes, packed.total - sum(sizes)])
    return [packed.part(i * each, (i + 1) * each).with_rows(rows[i]) for i in range(parts)]


def broken_pairs(step: Step) -> Tensor:
    """bool [B]: the global row of some view of the pair is not finite. It has read all of the view, so whatever is
    wrong with a pixel, a word or a weight that meets only them is seen there."""
    bad = [
        ~packed.rows.detach().index_select(0, packed.offsets[:-1]).sum(1).isfinite() for packed in step.views.values()
    ]
    return torch.stack(bad).any(0)


def chosen(packed: Packed, index: Tensor) -> tuple[Packed, Draw]:
    """The distinct sequences that an index names, and the index into them: what many pairs share is computed once."""
    which, inverse = torch.unique(index.cpu(), return_inverse=True)  # sync: evaluation
    sequences = packed.unpack()
    distinct = Packed.of([sequences[i] for i in which.tolist()])
    assert distinct.lengths is not None
    lengths = tuple(distinct.lengths[i] for i in inverse.tolist())
    return distinct, Draw(inverse.to(packed.rows.device, torch.int32), lengths=lengths)


def _bare_step(row_multiple: int) -> Step:
    """A step without a batch, for rows already encoded."""
    none = torch.zeros(0)
    return Step(Batch(none, Packed.layout_of([0]), none, none, none, [], ()), 0, row_multiple, Choices())
