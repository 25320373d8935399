"""Runs of a prompt with vectors added: edited positions alone, or whole prompts."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import Edit, ResidualSplicer, Splicer
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.models.prefix import Prefix, prefix_differs
from sae_lens_multilayer.models.unembed import ModelUnembed
from sae_lens_multilayer.models.walk import Walk, agree

logger = logging.getLogger(__name__)


class Additions(NamedTuple):
    """Vectors that are added, each in its own run, at one layer and position."""

    layer: Int[Tensor, " edit"]
    """Index on the layer axis."""
    position: Int[Tensor, " edit"]
    dx: Float[Tensor, "edit d_in"]
    """In raw space."""

    @classmethod
    def joined(cls, parts: "Sequence[Additions]") -> "Additions":
        """All additions of some parts, in order."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


Found = tuple[Float[Tensor, "edit d_vocab"], Float[Tensor, "edit layer d_in"]]
"""Logits of each run at the position of its edit; and the vectors that later hooks have
there, NaN up to the edited layer."""


class PositionRunner:
    """Runs the edited positions only, after the clean keys and values before them."""

    def __init__(
        self,
        prefix: Prefix,
        depths: Sequence[int],
        streams: Sequence[Float[Tensor, "1 pos d_model"]],
        unembed: ModelUnembed | None,
    ) -> None:
        """See `make_runner`; without `unembed`, all logits are computed."""
        self._prefix, self._depths, self._streams = prefix, depths, streams
        self._unembed = unembed

    def run(self, part: Additions) -> Found:
        """All edits together, from the first edited layer on."""
        walk = self._prefix.walk(part.position)
        stream, later = self._last(walk, part)
        return walk.logits(stream)[:, 0].to(later.device), later

    def token_logits(
        self, part: Additions, token: Int[Tensor, " edit"]
    ) -> Float[Tensor, " edit"]:
        """The logit of one token for each edit."""
        walk = self._prefix.walk(part.position)
        stream, _ = self._last(walk, part)
        if self._unembed is None:
            return _of_tokens(walk.logits(stream)[:, 0], token)
        return self._unembed.token_logits(stream[:, 0], token)

    def _last(self, walk: Walk, part: Additions) -> tuple[Tensor, Tensor]:
        """The stream after the last block [edit, 1, d_model], and the later vectors."""
        first = self._depths[int(part.layer.min())]
        stream = self._streams[first][0, part.position].unsqueeze(1)
        later = _no_vectors(part, len(self._depths))
        for depth in range(first, len(self._streams)):
            if depth > first:
                stream = walk.run_block(stream, depth - 1)
            for hook in (h for h, of in enumerate(self._depths) if of == depth):
                is_later = part.layer < hook
                later[is_later, hook] = stream[is_later, 0].detach().to(later)
                dx = part.dx * (part.layer == hook).unsqueeze(1).to(part.dx)
                stream = stream + dx.to(stream).unsqueeze(1)
        return stream, later


class PromptRunner:
    """Runs the prompt up to the edited position, with any model."""

    def __init__(
        self, splicer: Splicer, ids: Int[Tensor, "1 pos"], n_hooks: int
    ) -> None:
        """See `make_runner`."""
        self._splicer, self._ids, self._n_hooks = splicer, ids, n_hooks

    def run(self, part: Additions) -> Found:
        """The runs share batches if the splicer can do so."""
        ids = self._ids[:, : int(part.position.max()) + 1]
        later = _no_vectors(part, self._n_hooks)
        edits = [self._edit(part, i, later) for i in range(len(later))]
        found: dict[int, Tensor] = {}
        for _, runs in self._splicer.runs(ids, edits):
            for i, run in runs.items():
                at = int(part.position[i])
                found[i] = run(slice(at, at + 1))[0, 0].to(later.device)
        return torch.stack([found[i] for i in range(len(later))]), later

    def token_logits(
        self, part: Additions, token: Int[Tensor, " edit"]
    ) -> Float[Tensor, " edit"]:
        """The logit of one token for each edit."""
        return _of_tokens(self.run(part)[0], token)

    def _edit(self, part: Additions, i: int, later: Tensor) -> Edit:
        """Add the vector, and keep what later hooks have at its position."""
        position, first = int(part.position[i]), int(part.layer[i])

        def read(hook: int, x: Tensor) -> Tensor:
            later[i, hook] = x[0, position].detach()
            return x

        reads = {h: partial(read, h) for h in range(first + 1, self._n_hooks)}
        return {first: partial(_added, position, part.dx[i]), **reads}


def make_runner(
    model: Model,
    splicer: Splicer,
    ids: Int[Tensor, "1 pos"],
    depths: Sequence[int],
    streams: Sequence[Float[Tensor, "1 pos d_model"]],
    logits: Float[Tensor, "1 pos d_vocab"],
    positions: Int[Tensor, " edited"],
    unembed: ModelUnembed,
) -> PositionRunner | PromptRunner:
    """The faster of both, if it gives the vectors and logits of the whole prompt.

    Args:
        splicer: Runs whole prompts.
        depths: Of each hook: the number of blocks before it.
        streams: Before each block and after the last one, without edits.
        logits: Without edits.
        positions: Those to be edited; vectors and logits are compared at the first and
            the last one.
        unembed: Gives single logits, if they are the model's.
    """
    whole, positions = PromptRunner(splicer, ids, len(depths)), positions[[0, -1]]
    if not isinstance(splicer, ResidualSplicer):
        return whole
    try:
        prefix = model.prefix(ids)
        reason = prefix_differs(prefix, positions, streams, logits)
    # Whatever happens in a model unlike the others, whole prompts remain.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if reason is None:
            clean = logits[0, positions]
            target, last = clean.argmax(-1), streams[-1][0, positions]
            alone = unembed.token_logits(last, target).unsqueeze(1)
            is_same = agree(alone, _of_tokens(clean, target).unsqueeze(1))
            unembed_or_none = unembed if is_same else None
            return PositionRunner(prefix, depths, streams, unembed_or_none)
    logger.info("Each edited run takes all positions up to its own: %s.", reason)
    return whole


def _of_tokens(
    logits: Float[Tensor, "row d_vocab"], token: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    return logits.gather(1, token.unsqueeze(1))[:, 0]


def _no_vectors(part: Additions, n_hooks: int) -> Float[Tensor, "edit layer d_in"]:
    n_edits, d_in = part.dx.shape
    return part.dx.new_full((n_edits, n_hooks, d_in), torch.nan)


def _added(
    position: int, dx: Float[Tensor, " d_in"], x: Float[Tensor, "prompt pos d_in"]
) -> Float[Tensor, "prompt pos d_in"]:
    after = x.clone()
    after[:, position] += dx.to(x)
    return after
