"""Edits each latent where it is active, and measures what follows, with controls."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.analysis.nulls import Null, RandomWeights
from sae_lens_multilayer.evaluation.encoder import is_multi_layer
from sae_lens_multilayer.files import complete_or_absent, read_tensors
from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.results import TENSORS_FILE
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.studies.interventions.controls import CONTROLS
from sae_lens_multilayer.studies.interventions.edits import TokenEdits
from sae_lens_multilayer.studies.interventions.result import Interventions
from sae_lens_multilayer.studies.interventions.sample import Sample, take_sample
from sae_lens_multilayer.sweeps.cost import available_bytes
from sae_lens_multilayer.text.prompts import Prompts, Tokens, take_prompts

_FLOATS_PER_POSITION = 24
"""Numbers that autograd keeps of each block, position and dimension, about."""


def interventions(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *,
    alpha: float = 0.0,
    latents: Sequence[int] | None = None,
    n_latents: int = 200,
    n_tokens: int = 8,
    n_steps: int = 8,
    n_top: int = 100,
    max_edits: int = 64,
    seed: int = 0,
    n_prompts: int | None = None,
    batch_size_prompts: int = 8,
    exclude_positions: Sequence[int] = (),
    null: Null | None = None,
    parts: str | Path | None = None,
) -> Interventions:
    """Scale latents where they are active, one layer and token at a time.

    Each edit takes `6 + n_steps` runs from the middle: five for the edit and its
    controls, and `1 + n_steps` with gradients. A run computes the edited position only,
    with the clean keys and values of those before it, if the model allows this
    (`models.prefix`); else the prompt up to this position.

    Args:
        sae: A multi-layer SAE on the residual stream.
        alpha: Factor of the activation: 0 ablates, 2 doubles.
        latents: The latents to edit; None: `n_latents`, stratified by mean layer and
            number of layers.
        n_tokens: Most tokens for each latent, at random. All layers at which it is
            active there are edited.
        n_steps: Steps of integrated gradients.
        n_top: Logits of each effect to keep.
        max_edits: Most runs in one call of a block.
        seed: Of latents, tokens and controls.
        n_prompts, batch_size_prompts, exclude_positions: See `PassOptions`.
        null: See `PassOptions`. "random_weights" are those of the edited runs too. With
            the others, a latent is edited at the layers, and by the activations, that
            the null gives it at a token, along its own decoder row.
        parts: Folder for the edits of each prompt that is done, from which an
            interrupted call with the same arguments continues; None: none.

    Raises:
        ValueError: If `alpha` is not finite or 1, a hook is not at the residual stream,
            a latent in `latents` is never active, or the edits do not fit the memory.
    """
    _check(sae, alpha)
    lm = as_model(model)
    prompts = take_prompts(
        lm, tokens, n_prompts, batch_size_prompts, None, exclude_positions
    )
    of_pass: Any = {"batch_size_prompts": batch_size_prompts, "null": null}
    sizes = n_latents, n_tokens, seed
    sample = take_sample(sae, model, prompts, latents, *sizes, **of_pass)
    _check_memory(sample, lm, len(prompts.ids[0]), n_top, max_edits)
    is_random = null == "random_weights"
    with RandomWeights(lm.module).applied() if is_random else nullcontext():
        options: Any = {"alpha": alpha, "n_steps": n_steps, "n_top": n_top}
        edits = TokenEdits(sae, lm, **options, max_edits=max_edits, seed=seed)
        columns = _all_columns(edits, sample, prompts, parts)
    counts = sample.active_layers.n_active_tokens
    return Interventions(
        hook_names=hook_names_of(sae),
        alpha=alpha,
        seed=seed,
        null=null or "",
        latents=sample.latents,
        probs=sample.distributions.probs[:, sample.latents],
        hit_rate=(counts / sample.distributions.n_tokens)[sample.latents],
        **columns,
    )


def _all_columns(
    edits: TokenEdits, sample: Sample, prompts: Prompts, parts: str | Path | None
) -> dict[str, Any]:
    """The columns of all edits, prompt by prompt; those in `parts` are read."""
    tables: list[dict[str, Tensor]] = []
    for prompt in tqdm(sample.pairs[:, 1].unique().tolist(), desc="Editing"):
        done = None if parts is None else Path(parts) / f"prompt-{prompt}"
        if done is not None and done.exists():
            tables.append(read_tensors(done / TENSORS_FILE))
            continue
        rows = sample.pairs[:, 1] == prompt
        latents, _, position = sample.pairs[rows].unbind(1)
        one = prompts[prompt : prompt + 1]
        acts = sample.acts[rows]
        tables.append(edits.columns(one, prompt, position, latents, acts))
        if done is not None:
            with complete_or_absent(done) as folder:
                save_file(tables[-1], folder / TENSORS_FILE)
    return {name: torch.cat([t[name] for t in tables]) for name in tables[0]}


def _check(sae: SAE[Any], alpha: float) -> None:
    if not abs(alpha) < float("inf") or alpha == 1:
        raise ValueError(
            f"`alpha` must be finite and not 1, which changes nothing; got {alpha}."
        )
    if not is_multi_layer(sae):
        raise ValueError(
            f"Interventions need a multi-layer SAE; got a {type(sae).__name__}."
        )
    inside = [name for name in hook_names_of(sae) if block_end(name) is None]
    if inside:
        raise ValueError(
            "Interventions need hooks at the residual stream, the input or output of a "
            f"block, as predictions follow it; got {inside[:3]}."
        )


def _check_memory(
    sample: Sample, model: Model, n_positions: int, n_top: int, max_edits: int
) -> None:
    """Raise ValueError if the edits need more memory than is free.

    Counted are the columns of all edits, the later vectors and gradients of those of
    one prompt, the logits of the runs that share a call of a block, and what autograd
    keeps of these, as if a run took its whole prompt.
    """
    shape = model.shape
    n_edits = int((sample.acts > 0).sum())
    by_layers = 16 * sample.acts.shape[1]
    of_pair = (sample.acts > 0).sum(1)
    n_runs = int(sample.pairs[:, 1].bincount(of_pair).max()) * (1 + len(CONTROLS))
    of_run = sample.acts.shape[1] * shape.d_model
    graph = _FLOATS_PER_POSITION * n_positions * shape.n_layers * shape.d_model
    of_call = 6 * (shape.d_vocab or 0) + graph
    needed = n_edits * (12 * n_top + by_layers + 100)
    needed += 4 * (n_runs * of_run + max_edits * of_call)
    free = available_bytes()
    if needed > free:
        raise ValueError(
            f"{n_edits:,} edits need {needed / 2**30:.1f} GiB of memory; "
            f"{free / 2**30:.1f} GiB are free. Reduce `max_edits` ({max_edits}), the "
            f"length of prompts ({n_positions}), `n_latents` or `n_tokens`."
        )
