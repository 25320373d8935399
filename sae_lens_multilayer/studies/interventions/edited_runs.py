"""Runs of a model in which latents are ablated, scaled or added."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.active import check_are_active, check_latents
from sae_lens_multilayer.evaluation.edits import (
    EditKind,
    LatentEdit,
    LatentReplacement,
)
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.evaluation.splicing import Edit, make_splicer
from sae_lens_multilayer.lens.carrier import check_lenses
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Replace
from sae_lens_multilayer.text.prompts import Tokens, check_positions, take_prompts

_CALLS_FROM_USER = 7
"""`stacklevel` of a warning about the lens, from the caller of `ablate`."""


@dataclass
class EditedRun:
    """A run of some prompts with an edit, beside the clean run."""

    edit: LatentEdit
    clean_logits: Float[Tensor, "prompt pos d_vocab"]
    logits: Float[Tensor, "prompt pos d_vocab"]
    clean_vectors: dict[str, Float[Tensor, "prompt pos d_in"]]
    vectors: dict[str, Float[Tensor, "prompt pos d_in"]]
    """By hook name, from the first edited layer on, after the edit."""
    hit_rate: Float[Tensor, " latent"]
    """Share of the chosen layers and positions at which each latent of the edit was
    active before it was edited; NaN for "reconstruct"."""

    def kl_div(self) -> Float[Tensor, "prompt pos"]:
        """KL(clean ‖ edited) of the prediction after each position, nats."""
        return kl_div(self.clean_logits, self.logits)


def kl_div(
    clean: Float[Tensor, "*batch d_vocab"], other: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(clean ‖ other) of distributions given by their logits, nats."""
    log_p, log_q = clean.float().log_softmax(-1), other.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ablate(
    sae: SAE[Any] | Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    latents: Sequence[int],
    layers: Sequence[int | str],
    positions: Sequence[int] | slice | Tensor | None = None,
) -> EditedRun:
    """Run prompts with latents set to 0 at some layers and positions, all at once.

    Args:
        sae: A multi-layer SAE, or SAEs of single hooks.
        model: The model that it was trained on.
        layers: Block numbers or hook names.
        positions: Positions in the prompts, or a mask; None: all.

    Raises:
        ValueError: If a latent is not active at any of these layers and positions, or a
            layer has no hook.
    """
    return _edited(sae, model, tokens, "scale", 0.0, (latents, layers, positions))


def scale(
    sae: SAE[Any] | Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    alpha: float,
    latents: Sequence[int],
    layers: Sequence[int | str],
    positions: Sequence[int] | slice | Tensor | None = None,
) -> EditedRun:
    """Run prompts with the activations of latents times `alpha`; see `ablate`."""
    return _edited(sae, model, tokens, "scale", alpha, (latents, layers, positions))


def steer(
    sae: SAE[Any] | Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    addition: float,
    latents: Sequence[int],
    layers: Sequence[int | str],
    positions: Sequence[int] | slice | Tensor | None = None,
) -> EditedRun:
    """Run prompts with an addition to the activations of latents; see `ablate`.

    The latents need not be active.
    """
    return _edited(sae, model, tokens, "add", addition, (latents, layers, positions))


def _edited(
    sae: Any,
    model: Any,
    tokens: Tokens,
    kind: EditKind,
    value: float,
    where: tuple[Sequence[int], Sequence[int | str], Any],
) -> EditedRun:
    latents, layers, positions = where
    edit = LatentEdit(kind, layers, latents, value, positions)
    return run_edits(sae, model, tokens, [edit])[0]


@torch.no_grad()
def run_edits(
    sae: SAE[Any] | Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    edits: Sequence[LatentEdit],
    *,
    max_prompts: int = 64,
) -> list[EditedRun]:
    """Run prompts once for each edit; the runs share batches if the model allows it.

    Positions that do not count in `Prompts` are not edited.

    Args:
        max_prompts: Most prompts in one call of a block.

    Raises:
        ValueError: See `ablate`.
    """
    encoder, lm = LayerEncoder(sae), as_model(model)
    lm.check_no_saes_attached()
    check_lenses(lm, encoder.saes, _CALLS_FROM_USER)
    prompts = take_prompts(lm, tokens, None, 1)
    splicer = make_splicer(lm, encoder.hook_names, max_prompts, None)
    replacements: list[dict[int, LatentReplacement]] = []
    for edit in edits:
        _check(edit, encoder, prompts.ids)
        replacements.append(edit.replacements(encoder, prompts.counted.cpu()))
    readers = [_Reader(len(encoder.hook_names), of_edit) for of_edit in replacements]
    clean = _Reader(len(encoder.hook_names), {})
    everywhere, by_index = slice(0, None), [clean.edit, *(r.edit for r in readers)]
    logits: dict[int, Tensor] = {}
    for _, runs in splicer.runs(prompts.ids, by_index):
        logits |= {i: run(everywhere) for i, run in runs.items()}
    names = encoder.hook_names
    clean_vectors = {name: clean.vectors[i] for i, name in enumerate(names)}
    results: list[EditedRun] = []
    for i, (edit, of_edit) in enumerate(zip(edits, replacements, strict=True)):
        _check_active(edit, encoder, of_edit)
        vectors = {names[hook]: x for hook, x in sorted(readers[i].vectors.items())}
        own = {name: clean_vectors[name] for name in vectors}
        rate = _hit_rate(edit, of_edit)
        results.append(EditedRun(edit, logits[0], logits[i + 1], own, vectors, rate))
    return results


class _Reader:
    """Replacements that keep the vectors of each hook, from the first edited one on."""

    def __init__(self, n_hooks: int, replacements: dict[int, Any]) -> None:
        self._replacements = replacements
        self.vectors: dict[int, Tensor] = {}
        start = min(replacements, default=0)
        self.edit: Edit = {h: self._at(h) for h in range(start, n_hooks)}

    def _at(self, hook: int) -> Replace:
        return partial(self._keep, hook)

    def _keep(
        self, hook: int, x: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        replace = self._replacements.get(hook)
        self.vectors[hook] = x if replace is None else replace(x)
        return self.vectors[hook]


def _check(edit: LatentEdit, encoder: LayerEncoder, ids: Tensor) -> None:
    if not edit.layers:
        raise ValueError("An edit needs at least one layer; got none.")
    if edit.kind != "reconstruct":
        check_latents(edit.latents, encoder.saes[0].cfg.d_sae)
    if isinstance(edit.positions, Tensor):
        if edit.positions.shape != ids.shape:
            raise ValueError(
                f"The mask of positions must have the prompts' shape "
                f"{tuple(ids.shape)}; got {tuple(edit.positions.shape)}."
            )
    elif isinstance(edit.positions, Sequence):
        check_positions("positions", edit.positions, ids)


def _hit_rate(
    edit: LatentEdit, replacements: dict[int, LatentReplacement]
) -> Float[Tensor, " latent"]:
    counts = sum(one.counts[list(edit.latents)] for one in replacements.values())
    n_positions = sum(one.n_positions for one in replacements.values())
    return torch.as_tensor(counts) / (n_positions or torch.nan)


def _check_active(
    edit: LatentEdit, encoder: LayerEncoder, replacements: dict[int, LatentReplacement]
) -> None:
    """Raise ValueError if scaling changes nothing, as a latent is never active."""
    if edit.kind != "scale":
        return
    sae = encoder.saes[next(iter(replacements))]
    counts = sum(one.counts for one in replacements.values())
    check_are_active(edit.latents, torch.as_tensor(counts), sae.W_dec.detach())
