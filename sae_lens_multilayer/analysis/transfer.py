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

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import PassOptions, TokenStream
from sae_lens_multilayer.evaluation.encoder import LayerEncoder, ReconstructionSums
from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.evaluation.metrics import LayerMetrics
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.pictures.description import (
    FVU_LABEL,
    Axis,
    Heatmap,
    Panel,
    Picture,
    layer_axis,
    layer_panel,
)
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
DRAWN = {"fvu": FVU_LABEL, "delta_ce": "ΔCE (nats)", "kl_div": "KL divergence (nats)"}
"""Those that are drawn and printed, and their labels."""


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
        index = pd.Index(layer_labels(self.trained_on), name="trained_on")
        columns = layer_labels(self.hook_names)
        table = pd.DataFrame(self.fvu.numpy(), index=index, columns=pd.Index(columns))
        if self.multi_layer_fvu is not None:
            table.loc["multi_layer"] = self.multi_layer_fvu.numpy()
        return table

    def pictures(self, **context: Any) -> dict[str, Picture]:
        table = self.to_dataframe()
        names = [str(name).removeprefix("layer_") for name in table.index]
        rows = [name.replace("_", "-") for name in names]
        printed = table.shape[1] <= 16
        panel = Panel(
            layer_axis(self.hook_names, "evaluated on layer"),
            Axis("trained on layer", rows, most_names=len(rows)),
            heatmap=Heatmap(
                table.to_numpy(), FVU_LABEL, colours="viridis_r", print_values=printed
            ),
        )
        title = f"Transfer between layers, {self.n_tokens:,} tokens"
        return {"": Picture(title, [panel], "Values above 1 have the colour of 1.")}


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
        names = ("multi_layer", "single_layer")
        return pd.DataFrame(
            both.flatten(1).numpy(),
            index=pd.Index(self.hook_names, name="hook_name"),
            columns=pd.MultiIndex.from_product([COMPARED, names]),
        )

    def pictures(self, **context: Any) -> dict[str, Picture]:
        table = self.to_dataframe()
        panels: list[Panel] = []
        means: list[str] = []
        for metric, label in DRAWN.items():
            one, each = (
                table[metric, which].to_numpy()
                for which in ("multi_layer", "single_layer")
            )
            series = {"one SAE": one, "one SAE for each layer": each}
            panels.append(layer_panel(self.hook_names, label, series))
            means.append(f"{label} {one.mean():.4g} and {each.mean():.4g}")
        caption = f"Means of one SAE and one for each layer: {'; '.join(means)}."
        return {"": Picture("One SAE beside single-layer SAEs", panels, caption)}


class TransferSums:
    """Adds up the metrics of several SAEs at the hooks of the stream."""

    def __init__(self, encoders: Sequence[LayerEncoder]) -> None:
        self._sums = [ReconstructionSums(encoder) for encoder in encoders]

    def update(self, batch: TokenBatch) -> None:
        counted = torch.ones(len(batch.x), dtype=torch.bool, device=batch.x.device)
        for sums in self._sums:
            sums.start(lambda: batch.x.unbind(1))
            for layer in range(batch.x.shape[1]):
                sums.reconstruct(layer, batch.x[:, layer], counted)

    def compute(self) -> list[LayerMetrics]:
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
        multi_layer: A multi-layer SAE to measure on the same tokens; the layers are its
            hooks. None: the layers are the hooks of `saes`.
    """
    saes = _of_one_hook(saes, *([] if multi_layer is None else [multi_layer]))
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
    stream = TokenStream(model, names, tokens, sae=saes[0], **options)
    metrics: list[LayerMetrics] = stream.run(TransferSums(encoders))[0]
    fvu = torch.stack([m.fvu for m in metrics[: len(saes)]])
    multi_layer_fvu = None if multi_layer is None else metrics[-1].fvu
    n_tokens = metrics[0].n_tokens
    return TransferMatrix(names, trained_on, n_tokens, fvu, multi_layer_fvu)


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
        saes: SAEs of one of its hooks each, in any order; these hooks are compared.
        options: `exclude_tokens` and `exclude_positions` of `evaluate`.
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
    """SAEs of one hook each, in the order of the layers of a multi-layer SAE."""
    if not saes:
        return []
    names = hook_names_of(multi_layer)
    saes = _of_one_hook(saes, multi_layer)
    by_hook = dict(zip(LayerEncoder(saes).hook_names, saes, strict=True))
    if other := [name for name in by_hook if name not in names]:
        raise ValueError(
            f"Hooks of single-layer SAEs must be among {names}, the multi-layer SAE's; "
            f"got {other}."
        )
    return [by_hook[name] for name in names if name in by_hook]


def _of_one_hook(saes: Sequence[SAE[Any]], *more: SAE[Any]) -> list[SAE[Any]]:
    """SAEs in their form of one hook, after a check of the widths, with `more`."""
    hooks = [sae.cfg.metadata.hook_names for sae in saes]
    if several := [names for names in hooks if names and len(names) > 1]:
        raise ValueError(f"A single-layer SAE must have one hook; got {several[0]}.")
    widths = {sae.cfg.d_in for sae in (*saes, *more)}
    if len(widths) > 1:
        raise ValueError(f"The SAEs must have the same `d_in`; got {sorted(widths)}.")
    return [view(s, n[0]) if n else s for s, n in zip(saes, hooks, strict=True)]
