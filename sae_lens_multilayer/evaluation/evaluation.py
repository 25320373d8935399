"""Evaluates an SAE on held-out tokens, by itself and spliced into the model."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_multilayer import hooks
from sae_lens_multilayer.evaluation.encoder import LayerEncoder, ReconstructionSums
from sae_lens_multilayer.evaluation.metrics import LayerMetrics, SpliceMetrics
from sae_lens_multilayer.evaluation.runs import EvaluationRuns, mean_vectors
from sae_lens_multilayer.evaluation.splicing import make_splicer
from sae_lens_multilayer.lens.carrier import check_lenses
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.text.prompts import (
    Tokens,
    check_positions,
    counted_positions,
    take_prompts,
)

_POSITIONS_PER_BLOCK = {"cpu": 2**10, "cuda": 2**14}
"""Positions in one call of a block; more would not fit the cache of a CPU."""

Ablation = Literal["zero", "mean"]


@torch.no_grad()
def evaluate(
    sae: SAE[Any] | Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    *,
    n_prompts: int | None = None,
    batch_size_prompts: int = 8,
    exclude_tokens: Sequence[int] | None = None,
    exclude_positions: Sequence[int] = (),
    keep_tokens: Sequence[int] = (),
    keep_positions: Sequence[int] = (),
    ablation: Ablation = "zero",
    together: int | str | Sequence[int | str] | None = None,
    use_error_term: bool = False,
    from_middle: bool | None = None,
) -> SpliceMetrics:
    """Splice reconstructions into each layer in turn and compare with the clean run.

    Args:
        sae: A multi-layer SAE, ours or a stock one trained by this package, or one or
            a list of SAEs of one hook each. All metrics are in raw space. A crosscoder
            reconstructs each layer from the clean vectors of all, also for `together`.
        model: The model that the SAE was trained on, without SAEs attached.
        tokens: Prompts with their special tokens, `Prompts` with the positions that
            count, or a store to take them from.
        n_prompts: Prompts taken from a store, none of them twice; None:
            `store_batch_size_prompts`.
        batch_size_prompts: Prompts of a clean forward pass.
        exclude_tokens: Token ids whose positions keep their own vectors and are left
            out of all averages; None: those that a store excludes. As in SAELens, the
            prediction of an excluded token, such as the first pad token on the right,
            is scored; cut such prompts to equal lengths if it must not be.
        exclude_positions: Positions in a prompt, treated likewise; negative ones count
            from its end.
        keep_tokens: As `exclude_tokens`, but left out of the metrics of reconstruction
            only.
        keep_positions: As `exclude_positions`, likewise.
        ablation: What the ablated runs replace a layer's vectors by: zeros (as SAELens)
            or their mean over these tokens.
        together: Hooks, by name or block number, that one more run replaces all at
            once; "all" for all of them.
        use_error_term: Add the error of each reconstruction back, as a check.
        from_middle: See `make_splicer`; None: where the model can.

    References:
        Delta CE: Lawson et al. (2025), section 4; the score and the direction of KL:
        `sae_lens.evals`.
    """
    model, encoder = as_model(model), LayerEncoder(sae)
    _check_model(encoder, model)
    if any(one.cfg.metadata.hook_head_index is not None for one in encoder.saes):
        raise ValueError(
            "SAEs of an attention head cannot be spliced; use `reconstruction_metrics`."
        )
    if ablation not in get_args(Ablation):
        raise ValueError(f"`ablation` must be in {get_args(Ablation)}; got {ablation}.")
    hook_names = encoder.hook_names
    prompts = take_prompts(
        model, tokens, n_prompts, batch_size_prompts, exclude_tokens, exclude_positions
    )
    check_positions("keep_positions", keep_positions, prompts.ids)
    if not prompts.counted[:, :-1].any():
        raise ValueError(
            "The evaluation needs at least one predicted token: prompts of two tokens "
            "or more, not all of them excluded."
        )
    most = _POSITIONS_PER_BLOCK.get(model.device.type, 2**13) // prompts.ids.shape[1]
    splicer = make_splicer(model, hook_names, max(1, most), from_middle)
    prompts = prompts.to(model.device)
    batches = prompts.split(batch_size_prompts)
    chosen = _find_hooks(hook_names, together)
    runs = EvaluationRuns(model, encoder, splicer, chosen, use_error_term)
    if ablation == "mean":
        ids = [batch.ids for batch in batches]
        runs.means = mean_vectors(model, hook_names, ids)
    for batch in tqdm(batches, desc="Splicing", unit="batch"):
        replaced = counted_positions(batch.ids, keep_tokens, keep_positions)
        runs.add(batch.ids, batch.counted, ~(batch.counted & replaced))
    runs.add_ablations_without_prompts(prompts.ids, prompts.counted)
    return runs.result()


@torch.no_grad()
def reconstruction_metrics(
    sae: SAE[Any] | Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    *,
    n_prompts: int | None = None,
    batch_size_prompts: int = 8,
    exclude_tokens: Sequence[int] | None = None,
    exclude_positions: Sequence[int] = (),
) -> LayerMetrics:
    """The part of `evaluate` that needs one pass up to the last hook, and no logits.

    The arguments are those of `evaluate`. Prompts of one token and SAEs of one
    attention head are measured, too.
    """
    model, encoder = as_model(model), LayerEncoder(sae)
    _check_model(encoder, model)
    heads = [one.cfg.metadata.hook_head_index for one in encoder.saes]
    prompts = take_prompts(
        model, tokens, n_prompts, batch_size_prompts, exclude_tokens, exclude_positions
    )
    sums = ReconstructionSums(encoder)
    batches = prompts.split(batch_size_prompts)
    for batch in tqdm(batches, desc="Evaluating", unit="batch"):
        vectors = model.vectors(batch.ids, encoder.hook_names, heads)
        sums.start(lambda vectors=vectors: vectors)
        for hook, x in enumerate(vectors):
            sums.reconstruct(hook, x, batch.counted)
    return sums.compute()


def _check_model(encoder: LayerEncoder, model: Model) -> None:
    model.check_no_saes_attached()
    for name, sae in zip(encoder.hook_names, encoder.saes, strict=True):
        model.shape.check_width([name], sae.cfg.d_in)
    check_lenses(model, encoder.saes, stacklevel=6)


def _find_hooks(hook_names: Sequence[str], chosen: Any) -> list[int]:
    if chosen == "all":
        return list(range(len(hook_names)))
    if chosen is None or isinstance(chosen, (int, str)):
        chosen = [] if chosen is None else [chosen]
    return sorted({hooks.find_hook(hook_names, hook) for hook in chosen})
