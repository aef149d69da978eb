"""ALBEF's training step at the encoder sizes of a config, as a user would write it in plain torch.

Align before Fuse, Li et al., NeurIPS 2021 (arXiv 2107.07651), written from the paper. Captions are padded to the
longest of the batch; attention is torch's; products are bfloat16 on a GPU; nothing waits for the device.

    V, T, F     image encoder (ViT), text encoder (BERT), fusion encoder: captions that read images in every block
    V~, T~, F~  their momentum copies, w~ <- m w~ + (1 - m) w before each step, m = 0.995; no gradient
    Q_i, Q_t    queues of the last momentum embeddings, 65,536 of each side

    ITC   s(z, K) = z K^T / tau over the batch's momentum embeddings and the queue
          target = (1 - a) own pair + a softmax(s(z~, K)), a = 0.4
          L = mean of both directions of -sum target log softmax(s(z, K))
    ITM   two classes on the fusion encoder's global row: the pair itself, its caption with a hard negative image, its
          image with a hard negative caption; drawn within the batch with probability softmax(s), never the own pair
    MLM   masked captions through T and F, every token scored:
          L = mean over masked tokens of (1 - a) (-log p(token)) + a (-sum p~ log p), p~ from T~ and F~
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvle.config import Config
from mvle.data.batch import Batch
from mvle.engine.optim import build_optimizer
from mvle.model.config import ModelConfig

from . import Provider, Step
from .plain import PlainInputs, plain_inputs
from .training import Decayed, Sized, normalised, training_step

QUEUE = 65_536  # the paper's
QUEUE_ON_A_CPU = 4_096  # at tiny the paper's would cost more than all the encoders
MOMENTUM, SOFT = 0.995, 0.4

DIFFERENCES = (
    "no masked image modelling: neither a masked image view (a quarter of plain's FLOPs at base) nor image cross "
    "encoder and decoder; in all 273 GFLOP a pair, plain 444 (base, captions padded to 32)",
    "momentum copies of all encoders: a second forward of each pass but ITM's, without gradient; all weights twice in "
    "memory, and one pass over them a step",
    "captions read images, images read nothing: one fusion encoder of 2 * cross_depth blocks (6 at base, as in the "
    "paper), where ours has an image and a text cross encoder of cross_depth blocks each",
    "text encoder of model.text.depth blocks, as ours (base: 12); the paper's has 6",
    "contrast with queues of 65,536 embeddings (4,096 on a CPU), soft targets; ours is over the batch alone",
    "MLM's targets are softened by the momentum model: a second masked pass, and a softmax over the vocabulary twice",
    "MLM masks as many tokens as ours (masking.text_ratio), the paper 15 %: every token is scored, so the same cost",
    "one matrix for words in and out, behind a layer; ours has two matrices and no layer",
    "equal images or captions of a batch count as negatives",
    "no dropout (the paper's text side has it): ours has none either",
)


class Attention(nn.Module):
    """Multi-head attention of rows [B, L, D] over a context [B, L', D]; None: over themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, real_BL: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        k, v = self.key_value(source).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), k, v))
        seen = None if real_BL is None else real_BL[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


def feed_forward(width: int, inner: int) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class VitBlock(nn.Module):
    """Pre-norm block over images."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), feed_forward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BertBlock(nn.Module):
    """Post-norm block over captions; with `crosses` it also reads images."""

    def __init__(self, width: int, heads: int, inner: int, crosses: bool) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width, eps=1e-5)
        if crosses:
            self.cross, self.norm_cross = Attention(width, heads), nn.LayerNorm(width, eps=1e-5)
        self.mlp, self.norm2 = feed_forward(width, inner), nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, real_BL: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.attention(x, None, real_BL))
        if image is not None:
            x = self.norm_cross(x + self.cross(x, image))
        return self.norm2(x + self.mlp(x))


class Towers(nn.Module):
    """Everything that has a momentum copy: the three encoders, the projections, the word head."""

    def __init__(self, model: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        width, heads, inner = model.width, model.heads, int(model.width * model.mlp_ratio)
        rows, columns = model.image.grid
        self.patches = nn.Conv2d(3, width, model.image.patch, model.image.patch)
        self.class_token = nn.Parameter(torch.empty(width))
        self.image_positions = nn.Parameter(torch.empty(1 + rows * columns, width))
        self.image_blocks = nn.ModuleList(VitBlock(width, heads, inner) for _ in range(model.image.depth))
        self.image_norm = nn.LayerNorm(width, eps=1e-6)
        self.words = nn.Embedding(vocabulary, width)
        self.text_positions = nn.Parameter(torch.empty(model.text.max_tokens, width))
        self.text_norm = nn.LayerNorm(width, eps=1e-5)
        self.text_blocks = nn.ModuleList(BertBlock(width, heads, inner, False) for _ in range(model.text.depth))
        self.fusion_blocks = nn.ModuleList(BertBlock(width, heads, inner, True) for _ in range(2 * model.cross_depth))
        self.image_projection = nn.Linear(width, model.projection)
        self.text_projection = nn.Linear(width, model.projection)
        self.word_layer = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-5))
        self.word_bias = nn.Parameter(torch.empty(vocabulary))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> rows [B, 1 + N, D]; row 0 is the global one."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.image_positions
        for block in self.image_blocks:
            x = block(x)
        return self.image_norm(x)

    def encode_text(self, tokens_BL: Tensor, real_BL: Tensor) -> Tensor:
        """Token ids -> rows [B, L, D]; row 0 is the global one."""
        x = self.text_norm(self.words(tokens_BL) + self.text_positions[: tokens_BL.shape[1]])
        for block in self.text_blocks:
            x = block(x, real_BL)
        return x

    def fuse(self, text: Tensor, real_BL: Tensor, image: Tensor) -> Tensor:
        """Rows [B, L, D] of captions that have read rows [B, 1 + N, D] of images."""
        for block in self.fusion_blocks:
            text = block(text, real_BL, image)
        return text

    def embed(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of the global rows, float32 [B, d] each."""
        z_i, z_t = self.image_projection(image[:, 0]), self.text_projection(text[:, 0])
        return F.normalize(z_i.float(), dim=1), F.normalize(z_t.float(), dim=1)

    def score_words(self, rows: Tensor) -> Tensor:
        """Logits [B, L, C] of every word at every row."""
        return F.linear(self.word_layer(rows), self.words.weight, self.word_bias)


class Albef(nn.Module):
    """The model, its momentum copy and its queues; `losses` is one step's forward.

    queue: embeddings kept of each side; at least as many as a batch has pairs.
    """

    image_queue: Tensor
    text_queue: Tensor

    def __init__(self, config: Config, vocabulary: int, queue: int = QUEUE) -> None:
        super().__init__()
        model = config.model
        self.image, self.initial_temperature, self.std = model.image, model.temperature, model.initial_std
        self.towers = Towers(model, vocabulary)
        self.match = nn.Linear(model.width, 2)
        self.temperature = nn.Parameter(torch.empty(1))
        self.momentum = copy.deepcopy(self.towers).requires_grad_(False)
        self.register_buffer("image_queue", torch.empty(queue, model.projection))
        self.register_buffer("text_queue", torch.empty(queue, model.projection))
        self.oldest = 0  # place in the queues that is written next; on the host, so that nobody waits for it

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """First weights, the copy equal to them, and random unit embeddings in the queues."""
        draw = torch.Generator(self.match.weight.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 or name.endswith("_token"):
                parameter.normal_(0, self.std, generator=draw)
            elif name.endswith("bias"):
                parameter.zero_()
        self.temperature.fill_(self.initial_temperature)
        self.momentum.load_state_dict(self.towers.state_dict())
        for kept in (self.image_queue, self.text_queue):
            kept.copy_(F.normalize(kept.normal_(generator=draw), dim=1))

    @torch.no_grad()
    def follow(self) -> None:
        """The momentum copy goes a step towards the model."""
        slow, fast = list(self.momentum.parameters()), list(self.towers.parameters())
        torch._foreach_lerp_(slow, fast, 1 - MOMENTUM)

    @torch.no_grad()
    def enqueue(self, image_z: Tensor, text_z: Tensor) -> None:
        """The oldest embeddings make room for those of this batch, [B, d] each. Raises ValueError if all do not fit."""
        size, pairs = len(self.image_queue), len(image_z)
        if pairs > size:
            raise ValueError(f"expected at most {size} pairs, the queue's length; got {pairs}. Make the queue longer.")
        for kept, new in ((self.image_queue, image_z), (self.text_queue, text_z)):
            first = min(pairs, size - self.oldest)
            kept[self.oldest : self.oldest + first] = new[:first]
            kept[: pairs - first] = new[first:]
        self.oldest = (self.oldest + pairs) % size

    def losses(self, inputs: PlainInputs) -> dict[str, Tensor]:
        """itc, itm and mlm, 0-d each. Moves the momentum copy and the queues on."""
        assert inputs.masked_tokens_BL is not None and inputs.token_masked_BL is not None
        fast, slow, real = self.towers, self.momentum, inputs.real_BL
        pixels = normalised(inputs.batch.images, self.image)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
            self.follow()
            slow_image = slow.encode_image(pixels)
            slow_z = slow.embed(slow_image, slow.encode_text(inputs.tokens_BL, real))
            slow_words = slow.score_words(slow.fuse(slow.encode_text(inputs.masked_tokens_BL, real), real, slow_image))
        image, text = fast.encode_image(pixels), fast.encode_text(inputs.tokens_BL, real)
        itc, similarity = self.contrast(fast.embed(image, text), slow_z)
        self.enqueue(*slow_z)
        itm = self.matching(image, text, real, similarity)
        words = fast.score_words(fast.fuse(fast.encode_text(inputs.masked_tokens_BL, real), real, image))
        return {"itc": itc, "itm": itm, "mlm": self.masked_words(words, slow_words, inputs)}

    def contrast(self, z: tuple[Tensor, Tensor], slow_z: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss, and the similarities [B, B] of image to captions and of caption to images."""
        own, losses, within = torch.arange(len(z[0]), device=z[0].device), [], []
        for asks, slow_asks, answers, kept in (
            (z[0], slow_z[0], slow_z[1], self.text_queue),
            (z[1], slow_z[1], slow_z[0], self.image_queue),
        ):
            keys = torch.cat([answers, kept])  # a copy: the queue moves on before the backward reads it
            with torch.no_grad():
                target = SOFT * (slow_asks @ keys.T / self.temperature).float().softmax(1)
                target[own, own] += 1 - SOFT
            s = (asks @ keys.T / self.temperature).float()
            losses.append(-(target * s.log_softmax(1)).sum(1).mean())
            within.append(s[:, : len(asks)].detach())
        return (losses[0] + losses[1]) / 2, (within[0], within[1])

    def matching(self, image: Tensor, text: Tensor, real: Tensor, similarity: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the pair, its caption with another image, its image with another caption."""
        other_text, other_image = draw_other(similarity[0]), draw_other(similarity[1])
        own = self.towers.fuse(text, real, image)[:, 0]
        others = self.towers.fuse(
            torch.cat([text, text[other_text]]),
            torch.cat([real, real[other_text]]),
            torch.cat([image[other_image], image]),
        )[:, 0]
        logits = self.match(torch.cat([own, others])).float()
        label = (torch.arange(len(logits), device=logits.device) < len(own)).long()
        loss = F.cross_entropy(logits, label, reduction="none")
        # a batch of one pair has no negative: the work is the same, and nothing is learned from it
        counted = (label == 1) | (len(own) > 1)
        return (loss * counted).sum() / counted.sum()

    @staticmethod
    def masked_words(words: Tensor, slow_words: Tensor, inputs: PlainInputs) -> Tensor:
        """Mean over masked tokens of the soft and the hard cross-entropy."""
        assert inputs.token_masked_BL is not None
        logp, chosen = words.float().log_softmax(-1), inputs.token_masked_BL
        hard = -logp.gather(-1, inputs.tokens_BL[..., None])[..., 0]
        soft = -(slow_words.float().softmax(-1) * logp).sum(-1)
        loss = (1 - SOFT) * hard + SOFT * soft
        return (loss * chosen).sum() / chosen.sum().clamp(min=1)


@torch.no_grad()
def draw_other(similarity_BB: Tensor) -> Tensor:
    """For each row another column than its own, int64 [B], with probability softmax(similarity): Gumbel's trick, since
    torch.multinomial waits for the device. A single pair gets itself."""
    own = torch.eye(len(similarity_BB), dtype=torch.bool, device=similarity_BB.device)
    noise = -torch.empty_like(similarity_BB).exponential_().log()
    return (similarity_BB + noise).masked_fill(own, -torch.inf).argmax(1)


def make(config: Config, vocabulary: int, mask_id: int, batch: Batch, device: torch.device, dtype: torch.dtype) -> Step:
    """ALBEF's step over a batch; it is not charged for drawing its masks. Raises ValueError if no words are masked."""
    if not config.objectives.mlm.weight:
        raise ValueError("ALBEF masks words: objectives.mlm.weight must be above 0; got 0.")
    queue = QUEUE_ON_A_CPU if device.type == "cpu" else QUEUE
    with torch.device(device):
        model = Albef(config, vocabulary, max(queue, len(batch)))
    model.init_weights(config.run.seed)
    inputs = plain_inputs(Sized(config, vocabulary, mask_id), batch, config.run.seed)
    optimizer = build_optimizer(Decayed(model), config.optim)
    return training_step(optimizer, lambda: model.losses(inputs), None, config.optim.clip, device, dtype)


PROVIDER = Provider("ALBEF", "ALBEF's step at the same encoder sizes (benchmarks/peers/albef.py)", make, DIFFERENCES)
