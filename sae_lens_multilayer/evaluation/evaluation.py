"""How well an SAE does on held-out tokens, by itself and spliced into the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer import hooks
from sae_lens_multilayer.evaluation.encoder import Codec
from sae_lens_multilayer.evaluation.metrics import LayerMetrics, log_dict
from sae_lens_multilayer.evaluation.scores import CrossEntropySums, RunSums, add_scores
from sae_lens_multilayer.evaluation.splicing import (
    Edit,
    ResidualSplicer,
    Splicer,
    make_splicer,
)
from sae_lens_multilayer.forward import check_lenses, check_model, hook_vectors
from sae_lens_multilayer.text.prompts import (
    Prompts,
    Tokens,
    check_integers,
    check_positions,
    counted_positions,
    take_prompts,
)

_PROMPTS_PER_BLOCK = 64

Ablation = Literal["zero", "mean"]


@dataclass
class SpliceMetrics:
    """What happens to the model when layers pass through the SAE, in nats.

    Each list has one entry for each hook, spliced by itself, in the order of
    `reconstruction.hook_names`.
    """

    reconstruction: LayerMetrics
    """How well the vectors themselves are reconstructed."""
    ce_loss_clean: float
    """Mean cross-entropy over predicted tokens, model untouched."""
    ce_loss_spliced: list[float]
    """The same with the layer's vectors replaced by their reconstructions."""
    kl_div: list[float]
    """Mean over positions of KL(clean ‖ spliced), as in SAELens."""
    kl_div_reverse: list[float]
    """Mean over positions of KL(spliced ‖ clean), as in the paper's code (which sums it
    over the positions of a prompt)."""
    ce_loss_ablated: list[float]
    """Mean cross-entropy with the layer ablated at every position."""
    together: dict[str, float] | None = None
    """`ce_loss_spliced`, `delta_ce`, `kl_div` and `kl_div_reverse` of one run with
    several layers replaced, each reconstructed from what the replaced ones before it
    led to; None if not asked for."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each hook, in order; the index is the hook name."""
        reconstruction = self.reconstruction.to_dataframe()
        splices = pd.DataFrame(
            {
                "ce_loss_clean": self.ce_loss_clean,
                "ce_loss_spliced": self.ce_loss_spliced,
                "kl_div": self.kl_div,
                "kl_div_reverse": self.kl_div_reverse,
                "ce_loss_ablated": self.ce_loss_ablated,
            },
            index=reconstruction.index,
        )
        lost = splices.ce_loss_ablated - splices.ce_loss_spliced
        score = lost / (splices.ce_loss_ablated - splices.ce_loss_clean)
        delta = splices.ce_loss_spliced - splices.ce_loss_clean
        splices.insert(2, "delta_ce", delta)
        return splices.assign(ce_loss_score=score).join(reconstruction)

    def mean(self) -> pd.Series:
        """The mean over layers of every column."""
        return self.to_dataframe().mean()

    def to_log_dict(self) -> dict[str, float]:
        """Flat keys for loggers: `layer_3/delta_ce` and so on."""
        return log_dict(self.to_dataframe())


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

    One clean pass gives the vectors of all hooks. The run of a layer starts after it,
    and the runs of all layers share the blocks above as one larger batch, where the
    model can start in the middle; else each is a whole pass with a hook. No more than a
    few positions' logits are held (whole prompts' where the model cannot start in the
    middle). The result does not depend on the batch size.

    Args:
        sae: A multi-layer SAE, ours or a stock one trained by this package, or one or
            a list of SAEs of one hook each. At a hook with heads they take the heads
            end to end. Their tuned lenses are applied; all metrics are in raw space.
        model: The model that the SAE was trained on, without SAEs attached.
        tokens: Prompts with their special tokens, `Prompts` with the positions that
            count, or a store to take them from.
        n_prompts: Prompts taken from a store, none of them twice; None:
            `store_batch_size_prompts`.
        batch_size_prompts: Prompts of a clean forward pass.
        exclude_tokens: Token ids whose positions keep their own vectors and are left
            out of all averages, as SAELens' `exclude_special_tokens`; None: those that
            a store excludes.
        exclude_positions: Positions in a prompt, treated likewise; negative ones count
            from its end. The first one's vectors are often many times longer.
        keep_tokens: Token ids whose positions keep their own vectors and are left out
            of the metrics of reconstruction only.
        keep_positions: Positions in a prompt, treated likewise; negative ones count
            from its end.
        ablation: What the ablated runs replace a layer's vectors by: zeros (as SAELens)
            or their mean over these tokens.
        together: Hooks, by name or block number, that one more run replaces all at
            once; "all" for all of them.
        use_error_term: Add the error of each reconstruction back, so that nothing is
            changed; a check.
        from_middle: See `make_splicer`; None: where the model can.

    Raises:
        ValueError: If there is no prompt, no token is predicted, a token id is not in
            the vocabulary, a prompt is longer than the context, the store has too few
            prompts, the model lacks a hook or has SAEs attached, an SAE has another
            width or was trained on one attention head, or an option is out of range.

    References:
        Delta CE: Lawson et al. (2025), section 4; the score and the direction of KL:
        `sae_lens.evals`.
    """
    if ablation not in get_args(Ablation):
        raise ValueError(
            f"`ablation` must be one of {get_args(Ablation)}; got {ablation!r}."
        )
    for name, values in [
        ("exclude_tokens", () if exclude_tokens is None else exclude_tokens),
        ("exclude_positions", exclude_positions),
        ("keep_tokens", keep_tokens),
        ("keep_positions", keep_positions),
    ]:
        check_integers(name, values)
    codec = Codec(sae)
    _check_no_heads(codec)
    _check_model(codec, model)
    hooks_together = _find_hooks(codec.hook_names, together)
    splicer = make_splicer(model, codec.hook_names, _PROMPTS_PER_BLOCK, from_middle)
    prompts = take_prompts(
        model,
        codec.model_name,
        tokens,
        n_prompts,
        batch_size_prompts,
        exclude_tokens,
        exclude_positions,
    )
    check_positions("keep_positions", keep_positions, prompts.ids)
    if not prompts.counted[:, :-1].any():
        raise ValueError(
            "The evaluation needs at least one predicted token; got none. Prompts need "
            "two tokens or more, not all of them excluded."
        )
    evaluation = _Evaluation(
        codec,
        splicer,
        keep=(keep_tokens, keep_positions),
        use_error_term=use_error_term,
        together=hooks_together,
    )
    prompts = prompts.to(hooks.device_of_model(model))
    batches = prompts.split(batch_size_prompts)
    if ablation == "mean":
        evaluation.find_means(batches)
    for batch in tqdm(batches, desc="Splicing", unit="batch"):
        evaluation.add(batch)
    evaluation.add_ablations(prompts)
    return evaluation.result()


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

    Args:
        sae: As in `evaluate`.
        model: The model that the SAE was trained on, without SAEs attached.
        tokens: Held-out prompts with their special tokens, or a store to take them
            from.
        n_prompts: As in `evaluate`.
        batch_size_prompts: Prompts in a forward pass.
        exclude_tokens: Token ids whose positions are left out; None: those that a store
            excludes.
        exclude_positions: Positions in a prompt that are left out; negative ones count
            from its end.

    Raises:
        ValueError: As `evaluate`, but prompts of one token and SAEs of one attention
            head are measured.
    """
    codec = Codec(sae)
    _check_model(codec, model)
    own_names = hooks.model_hook_names(model, codec.hook_names)
    heads = [one.cfg.metadata.hook_head_index for one in codec.saes]
    prompts = take_prompts(
        model,
        codec.model_name,
        tokens,
        n_prompts,
        batch_size_prompts,
        exclude_tokens,
        exclude_positions,
    )
    for batch in tqdm(
        prompts.split(batch_size_prompts), desc="Evaluating", unit="batch"
    ):
        for hook, x in enumerate(hook_vectors(model, own_names, heads, batch.ids)):
            codec.reconstruct(hook, x, batch.counted)
    return codec.compute()


class _Evaluation:
    """Sums over batches, and the edits that make them."""

    def __init__(
        self,
        codec: Codec,
        splicer: Splicer,
        *,
        keep: tuple[Sequence[int], Sequence[int]],
        use_error_term: bool,
        together: Sequence[int],
    ) -> None:
        self._codec = codec
        self._splicer = splicer
        self._keep = keep
        self._use_error_term = use_error_term
        self._together = together
        self._means: list[Tensor] | None = None
        self._clean = CrossEntropySums()
        n_hooks = len(codec.hook_names)
        self._spliced = [RunSums() for _ in range(n_hooks)]
        self._ablated = [CrossEntropySums() for _ in range(n_hooks)]
        self._joint = RunSums()

    def find_means(self, batches: Sequence[Prompts]) -> None:
        """Set the mean vector of each hook, over all positions of these batches."""
        sums: dict[int, Tensor] = {}
        n_tokens = 0

        def add(hook: int, x: Tensor) -> Tensor:
            total = x.flatten(0, 1).double().sum(0)
            sums[hook] = sums.get(hook, 0.0) + total
            return x

        hooks_seen = range(len(self._codec.hook_names))
        edit = Edit({hook: partial(add, hook) for hook in hooks_seen})
        for batch in batches:
            n_tokens += batch.ids.numel()
            for _ in self._splicer.runs(batch.ids, [edit]):
                pass
        self._means = [sums[hook] / n_tokens for hook in hooks_seen]

    def add(self, prompts: Prompts) -> None:
        """Add the runs of a batch of prompts, but those of `add_ablations`."""
        tokens, counted = prompts.ids, prompts.counted
        kept = ~(counted & counted_positions(tokens, *self._keep))
        edits, sums = self._splices(kept), [*self._spliced]
        if not isinstance(self._splicer, ResidualSplicer):
            edits += self._ablations()
            sums += self._ablated
        if self._together:
            replace = {h: partial(self._splice, h, kept, None) for h in self._together}
            edits.append(Edit(replace))
            sums.append(self._joint)
        clean_sums = self._clean
        for clean, runs in self._splicer.runs(tokens, edits):
            by_run = {i: sums[i] for i in runs}
            add_scores(by_run, clean_sums, clean, runs, tokens, counted)
            clean_sums = None

    def add_ablations(self, prompts: Prompts) -> None:
        """Add the ablated runs once for all prompts, if they are the same.

        Nothing of a prompt is left where the whole residual stream is ablated; past
        other hooks, such as an MLP's output, it goes on.
        """
        if not isinstance(self._splicer, ResidualSplicer):
            return
        sums = dict(enumerate(self._ablated))
        edits = self._ablations()
        for clean, runs in self._splicer.runs_of_any_prompt(prompts.ids, edits):
            add_scores(sums, None, clean, runs, prompts.ids, prompts.counted)

    def _splices(self, kept: Bool[Tensor, "prompt pos"]) -> list[Edit]:
        return [
            Edit({hook: partial(self._splice, hook, kept, ~kept)})
            for hook in range(len(self._codec.hook_names))
        ]

    def _ablations(self) -> list[Edit]:
        return [
            Edit({hook: partial(self._ablate, hook)})
            for hook in range(len(self._codec.hook_names))
        ]

    def _splice(
        self,
        hook: int,
        kept: Bool[Tensor, "prompt pos"],
        counted: Bool[Tensor, "prompt pos"] | None,
        x: Float[Tensor, "prompt pos d_in"],
    ) -> Float[Tensor, "prompt pos d_in"]:
        x_hat = self._codec.reconstruct(hook, x, counted)
        if self._use_error_term:
            x_hat = _with_error(x_hat, x)
        return torch.where(kept.to(x.device).unsqueeze(-1), x, x_hat)

    def _ablate(
        self, hook: int, x: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        if self._means is None:
            return torch.zeros_like(x)
        return self._means[hook].to(x.device, x.dtype).expand_as(x)

    def result(self) -> SpliceMetrics:
        """The metrics of all batches."""
        together = None
        if self._together:
            together = {
                "ce_loss_spliced": self._joint.ce_loss(),
                "delta_ce": self._joint.ce_loss() - self._clean.ce_loss(),
                "kl_div": self._joint.kl_div(),
                "kl_div_reverse": self._joint.kl_div_reverse(),
            }
        return SpliceMetrics(
            ce_loss_clean=self._clean.ce_loss(),
            ce_loss_spliced=[sums.ce_loss() for sums in self._spliced],
            kl_div=[sums.kl_div() for sums in self._spliced],
            kl_div_reverse=[sums.kl_div_reverse() for sums in self._spliced],
            ce_loss_ablated=[sums.ce_loss() for sums in self._ablated],
            together=together,
            reconstruction=self._codec.compute(),
        )


def _with_error(
    x_hat: Float[Tensor, "prompt pos d_in"], x: Float[Tensor, "prompt pos d_in"]
) -> Float[Tensor, "prompt pos d_in"]:
    """`x_hat + (x - x_hat)` in float32 or wider: bfloat16 would not give x back."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x_hat.to(dtype)
    return (wide + (x.to(dtype) - wide)).to(x.dtype)


def _check_model(codec: Codec, model: Any) -> None:
    for name, sae in zip(codec.hook_names, codec.saes, strict=True):
        check_model(model, [name], sae.cfg.d_in)
    check_lenses(model, codec.saes, stacklevel=6)


def _check_no_heads(codec: Codec) -> None:
    for sae in codec.saes:
        if sae.cfg.metadata.hook_head_index is not None:
            raise ValueError(
                "The evaluation needs SAEs of whole activation vectors; got one of "
                f"attention head {sae.cfg.metadata.hook_head_index}. "
                "`reconstruction_metrics` measures it by itself."
            )


def _find_hooks(hook_names: Sequence[str], chosen: Any) -> list[int]:
    if chosen is None:
        return []
    if chosen == "all":
        return list(range(len(hook_names)))
    if isinstance(chosen, (int, str)):
        chosen = [chosen]
    # True would be the hook of block 1.
    if not isinstance(chosen, Sequence) or any(isinstance(c, bool) for c in chosen):
        raise ValueError(
            '`together` must be hooks by name or block number, "all" or None; got '
            f"{chosen!r}."
        )
    if not chosen:
        raise ValueError(
            '`together` must name at least one hook, or be "all" or None; got an empty '
            "list."
        )
    return sorted({hooks.find_hook(hook_names, hook) for hook in chosen})
