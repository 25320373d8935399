"""Compares a multi-layer SAE with single-layer SAEs on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.stream import (
    PassOptions,
    TokenBatch,
    TokenStream,
)
from sae_lens_multilayer.evaluation.encoder import (
    LayerEncoder,
    ReconstructionSums,
)
from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.evaluation.metrics import LayerMetrics
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of, view
from sae_lens_multilayer.text.prompts import Tokens, take_prompts

COMPARED = (
    "fvu",
    "fvu_scalar",
    "mse",
    "l0",
    "dead_fraction",
    "delta_ce",
    "kl_div",
    "ce_loss_score",
)
"""Columns of `SpliceMetrics.to_dataframe` that are compared."""


@dataclass
class TransferMatrix(Result):
    """FVU of single-layer SAEs on the vectors of every layer, as `LayerMetrics.fvu`."""

    hook_names: list[str]
    """The hooks whose vectors are reconstructed."""
    trained_on: list[str]
    """The hook of each SAE."""
    n_tokens: int
    fvu: Float[Tensor, "sae layer"]
    """FVU of the SAE trained on one hook, on the vectors of another."""
    multi_layer_fvu: Float[Tensor, " layer"] | None = None
    """FVU of the multi-layer SAE, if there is one."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each SAE and one column for each layer; "multi_layer" last."""
        rows = [self.fvu.numpy()]
        names = layer_labels(self.trained_on)
        if self.multi_layer_fvu is not None:
            rows.append(self.multi_layer_fvu.unsqueeze(0).numpy())
            names = [*names, "multi_layer"]
        columns = layer_labels(self.hook_names)
        table = pd.concat([pd.DataFrame(r, columns=pd.Index(columns)) for r in rows])
        return table.set_axis(names, axis="index").rename_axis("trained_on")


@dataclass
class Comparison(Result):
    """The metrics `COMPARED` of a multi-layer SAE and of single-layer SAEs, by hook."""

    hook_names: list[str]
    multi_layer: Float[Tensor, "layer metric"]
    single_layer: Float[Tensor, "layer metric"]

    @classmethod
    def of_tables(
        cls, multi_layer: pd.DataFrame, single_layer: pd.DataFrame
    ) -> "Comparison":
        """Compare two tables of `SpliceMetrics`, at the hooks of the second."""
        names = [str(name) for name in single_layer.index]
        tables = (multi_layer.loc[names], single_layer)
        columns = list(COMPARED)
        return cls(names, *(torch.tensor(t[columns].to_numpy()) for t in tables))

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each hook; each metric for `multi_layer` and `single_layer`."""
        both = torch.stack([self.multi_layer, self.single_layer], dim=2)
        return pd.DataFrame(
            both.flatten(1).numpy(),
            index=pd.Index(self.hook_names, name="hook_name"),
            columns=pd.MultiIndex.from_product(
                [COMPARED, ("multi_layer", "single_layer")]
            ),
        )


class TransferSums:
    """Adds up the metrics of several SAEs at the same hooks."""

    def __init__(self, encoders: Sequence[LayerEncoder]) -> None:
        """Start with no token; the encoders' hooks are those of the stream."""
        self._sums = [ReconstructionSums(encoder) for encoder in encoders]

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        counted = torch.ones(len(batch.x), dtype=torch.bool, device=batch.x.device)
        for sums in self._sums:
            for layer in range(batch.x.shape[1]):
                sums.reconstruct(layer, batch.x[:, layer], counted)

    def compute(self) -> list[LayerMetrics]:
        """The metrics of each SAE."""
        return [sums.compute() for sums in self._sums]


def transfer_matrix(
    saes: Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    *,
    multi_layer: SAE[Any] | None = None,
    **options: Unpack[PassOptions],
) -> TransferMatrix:
    """FVU of SAEs of single layers on the vectors of every layer.

    Args:
        saes: SAEs of one hook each, from a run with `layers=[3]` or ordinary SAELens
            SAEs, without a lens.
        model, tokens: As in `analyze`.
        multi_layer: A multi-layer SAE to measure on the same tokens; the layers are its
            hooks. None: the layers are the hooks of `saes`.
        options: See `PassOptions`.

    Raises:
        ValueError: If an SAE has no hook or several, two have the same one, one has a
            lens, the SAEs differ in width, or as `analyze`.
    """
    saes = [_of_one_hook(sae) for sae in saes]
    trained_on = LayerEncoder(saes).hook_names
    names = trained_on if multi_layer is None else hook_names_of(multi_layer)
    encoders = [LayerEncoder(sae, names) for sae in saes]
    if multi_layer is not None:
        encoders.append(LayerEncoder(multi_layer))
    if any(lens_of(sae) is not None for sae in saes):
        raise ValueError(
            "Single-layer SAEs must have no lens, as its translator is for one layer "
            "only; train them without."
        )
    _check_widths([encoder.saes[0] for encoder in encoders])
    stream = TokenStream(model, names, tokens, sae=saes[0], **options)
    metrics: list[LayerMetrics] = stream.run(TransferSums(encoders))[0]
    return TransferMatrix(
        names,
        trained_on,
        metrics[0].n_tokens,
        torch.stack([m.fvu for m in metrics[: len(saes)]]),
        None if multi_layer is None else metrics[-1].fvu,
    )


def compare_with_single_layers(
    multi_layer: SAE[Any],
    saes: Sequence[SAE[Any]],
    model: Any,
    tokens: Tokens,
    *,
    n_prompts: int | None = None,
    batch_size_prompts: int = 8,
    **options: Any,
) -> Comparison:
    """The metrics `COMPARED` of `evaluate` for both, on the same tokens.

    Args:
        multi_layer: A multi-layer SAE, ours or stock.
        saes: SAEs of one of its hooks each, in any order; these hooks are compared.
        model, tokens, n_prompts, batch_size_prompts: As in `evaluate`.
        options: `exclude_tokens` and `exclude_positions` of `evaluate`.

    Raises:
        ValueError: If a hook is not the multi-layer SAE's, or as `evaluate`.
    """
    saes = single_layers_of(multi_layer, saes)
    prompts = take_prompts(model, tokens, n_prompts, batch_size_prompts, **options)
    multi, single = (
        evaluate(
            sae, model, prompts, batch_size_prompts=batch_size_prompts
        ).to_dataframe()
        for sae in (multi_layer, saes)
    )
    return Comparison.of_tables(multi, single)


def single_layers_of(multi_layer: SAE[Any], saes: Sequence[SAE[Any]]) -> list[SAE[Any]]:
    """SAEs of one hook each, in the order of the layers of a multi-layer SAE.

    Raises:
        ValueError: If one has no hook or several, two have the same one, or one has
            another hook or width than the multi-layer SAE.
    """
    if not saes:
        return []
    names = hook_names_of(multi_layer)
    saes = [_of_one_hook(sae) for sae in saes]
    by_hook = dict(zip(LayerEncoder(saes).hook_names, saes, strict=True))
    if other := [name for name in by_hook if name not in names]:
        raise ValueError(
            f"Hooks of single-layer SAEs must be among {names}, the multi-layer SAE's; "
            f"got {other}."
        )
    _check_widths([multi_layer, *saes])
    return [by_hook[name] for name in names if name in by_hook]


def _of_one_hook(sae: SAE[Any]) -> SAE[Any]:
    names = sae.cfg.metadata.hook_names
    if not names:
        return sae
    if len(names) > 1:
        raise ValueError(
            f"A single-layer SAE must have one hook; got one with {list(names)}."
        )
    return view(sae, names[0])


def _check_widths(saes: Sequence[SAE[Any]]) -> None:
    widths = {sae.cfg.d_in for sae in saes}
    if len(widths) > 1:
        raise ValueError(f"The SAEs must have the same `d_in`; got {sorted(widths)}.")
