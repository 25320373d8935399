"""Measures a codec on held-out tokens: FVU, rate and distortion, loss of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import add
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.evaluation.metrics import LayerSums
from sae_lens_multilayer.evaluation.scores import RunSums, add_scores
from sae_lens_multilayer.evaluation.splicing import Edit, make_splicer
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.sae.routed import RoutedActs
from sae_lens_multilayer.studies.comparison.bits import Quantiser, n_distinct
from sae_lens_multilayer.studies.comparison.codecs import Codec, SharedCodec
from sae_lens_multilayer.text.prompts import Prompts

_PROMPTS_PER_BLOCK = 64


def fvu_by_layer(
    x: Float[Tensor, "token layer d_in"], x_hat: Float[Tensor, "token layer d_in"]
) -> list[float]:
    """`LayerMetrics.fvu` of each layer."""
    return [float(layer.fvu) for layer in _sums(x, x_hat)]


def _sums(
    x: Float[Tensor, "token layer d_in"], x_hat: Float[Tensor, "token layer d_in"]
) -> list[LayerSums]:
    """The sums of each layer, without those of activations."""
    none, no_values = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    pairs = zip(x.unbind(1), x_hat.unbind(1), strict=True)
    return [LayerSums.of_layer(*pair, none, no_values, 1) for pair in pairs]


def _chosen_sums(
    x: Float[Tensor, "token layer d_in"],
    x_hat: Float[Tensor, "token layer d_in"],
    chosen: Int[Tensor, " token"],
) -> list[LayerSums]:
    """The sums of each layer over the tokens of which it was chosen."""
    at = [(chosen == layer, layer) for layer in range(x.shape[1])]
    return [_sums(x[index][:, None], x_hat[index][:, None])[0] for index in at]


def chosen_numbers(sums: Sequence[LayerSums]) -> dict[str, float]:
    """FVU at the chosen layer, and how many layers are chosen, `exp H` of the shares.

    `fvu_chosen` is the mean over tokens of the FVU of the layer chosen for them; that
    of a layer is over the tokens for which it was chosen, with their own mean and
    variance. A layer whose chosen vectors do not vary, such as a single one, has no FVU
    and is left out of the mean.
    """
    n_tokens = np.array([one.n_tokens for one in sums])
    varies = [float(one.moments.sum_sq_deviation) > 0 for one in sums]
    fvu = [float(one.fvu) for one, is_used in zip(sums, varies, strict=True) if is_used]
    shares = n_tokens[n_tokens > 0] / n_tokens.sum()
    return {
        "fvu_chosen": float(np.average(fvu, weights=n_tokens[varies]))
        if fvu
        else np.nan,
        "layers_chosen": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def rates(
    codec: Codec,
    fitted_on: Float[Tensor, "fit_token layer d_in"],
    x: Float[Tensor, "token layer d_in"],
    bits_per_value: Sequence[int],
    most_bits: int | float,
) -> list[dict[str, Any]]:
    """Bits and FVU of a codec at each k = 1, 2, 4, ... and each q.

    The SAE was trained at one k; here it keeps another number of latents. The quantiser
    of each k and q is fitted to values of training vectors.

    Args:
        fitted_on: Training vectors.
        x: Held-out vectors.
        bits_per_value: Each q.
        most_bits: The last k is the first one with more bits at all q.
    """
    found: list[dict[str, Any]] = []
    k = 1
    while True:
        values, code = codec.encode(fitted_on, k).values, codec.encode(x, k)
        for q in bits_per_value:
            quantise = Quantiser.fit(values, q)
            x_hat = codec.decode(replace(code, values=quantise(code.values)))
            bits = float(codec.bits(code, q).mean())
            found.append({"k": k, "q": q, "bits": bits, "fvu": fvu_by_layer(x, x_hat)})
        if k == codec.most or min(r["bits"] for r in found if r["k"] == k) > most_bits:
            return found
        k = min(2 * k, codec.most)


def at_budget(
    found: Sequence[Mapping[str, Any]], bits: int | float
) -> dict[str, Any] | None:
    """The lowest mean FVU with at most so many bits per token, and that of each layer.

    Any k and q may be chosen. Between two k, log FVU is interpolated linearly over log
    bits at each q. None if each k takes more bits.
    """
    choices = [row for row in found if row["bits"] <= bits]
    for q in sorted({row["q"] for row in found}):
        line = [row for row in found if row["q"] == q]
        x = np.log([row["bits"] for row in line])
        if x[0] <= np.log(bits) <= x[-1]:
            y = np.log(np.clip([row["fvu"] for row in line], 1e-12, None))
            at = np.log(bits)
            fvu = [float(np.exp(np.interp(at, x, column))) for column in y.T]
            choices.append({"q": q, "fvu": fvu})
    if not choices:
        return None
    best = min(choices, key=lambda row: float(np.mean(row["fvu"])))
    return {"q": best["q"], "fvu": best["fvu"]}


class AllLayers:
    """Replaces every layer in one run by its reconstruction, hook after hook.

    At layer l the codec receives the vectors of this run at the layers up to l, each
    before its own replacement, and those of the clean run at the later layers, which
    the run has not reached. A codec that reads one layer only, such as the MLSAE,
    reconstructs the vectors that the earlier replacements led to.
    """

    def __init__(
        self,
        codec: Codec,
        k: int,
        clean: Float[Tensor, "prompt pos layer d_in"],
        counted: Bool[Tensor, "prompt pos"],
    ) -> None:
        """Start with the clean vectors; other positions than `counted` stay."""
        self._codec, self._k = codec, k
        self._x, self._counted = clean.clone(), counted

    def __call__(
        self, layer: int, x: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        self._x[:, :, layer] = x.to(self._x)
        x_hat = self._codec.reconstruct(self._x[self._counted], self._k)[:, layer]
        return put(x_hat, self._counted, x)


def put(
    x_hat: Float[Tensor, "token d_in"],
    counted: Bool[Tensor, "prompt pos"],
    x: Float[Tensor, "prompt pos d_in"],
) -> Float[Tensor, "prompt pos d_in"]:
    """Replace the counted vectors."""
    after = x.clone()
    after[counted.to(x.device)] = x_hat.to(x)
    return after


def _added(before: list[LayerSums] | None, sums: list[LayerSums]) -> list[LayerSums]:
    return sums if before is None else list(map(add, before, sums))


class Measures:
    """Sums over held-out tokens of the metrics of a codec at one k."""

    def __init__(
        self, codec: Codec, k: int, n_layers: int, bits_per_value: int
    ) -> None:
        """Start with no tokens."""
        self.codec, self.k, self._q = codec, k, bits_per_value
        self._layers: list[LayerSums] | None = None
        self._chosen: list[LayerSums] | None = None
        self._bits = self._n_distinct = 0.0
        self.clean = RunSums()
        self.spliced = [RunSums(is_compared=True) for _ in range(n_layers + 1)]
        """With each layer replaced, and with all of them."""

    def edits(
        self,
        x: Float[Tensor, "prompt pos layer d_in"],
        counted: Bool[Tensor, "prompt pos"],
    ) -> list[Edit]:
        """Add a batch of vectors; the runs of `spliced` on it."""
        tokens = x[counted]
        code = self.codec.encode(tokens, self.k)
        x_hat = self.codec.decode(code)
        self._layers = _added(self._layers, _sums(tokens, x_hat))
        if isinstance(code, RoutedActs):
            sums = _chosen_sums(tokens, x_hat, code.layer)
            self._chosen = _added(self._chosen, sums)
        self._bits += float(self.codec.bits(code, self._q).sum())
        if isinstance(self.codec, SharedCodec):
            self._n_distinct += float(n_distinct(code.indices, code.values > 0).sum())
        layers = range(x.shape[2])
        alone: list[Edit] = [{i: partial(put, x_hat[:, i], counted)} for i in layers]
        together = AllLayers(self.codec, self.k, x, counted)
        return [*alone, {i: partial(together, i) for i in layers}]

    def compute(self) -> dict[str, Any]:
        """The means over tokens; those of layers are lists."""
        assert self._layers is not None
        n_tokens, clean = self._layers[0].n_tokens, self.clean.ce_loss()
        delta_ce = [one.ce_loss() - clean for one in self.spliced]
        kl_div = [one.kl_div() for one in self.spliced]
        shared = isinstance(self.codec, SharedCodec)
        return {
            **({"n_distinct": self._n_distinct / n_tokens} if shared else {}),
            **({} if self._chosen is None else chosen_numbers(self._chosen)),
            "n_tokens": n_tokens,
            "bits": self._bits / n_tokens,
            "fvu": [float(layer.fvu) for layer in self._layers],
            "fvu_scalar": [float(layer.fvu_scalar) for layer in self._layers],
            "ce_loss_clean": clean,
            "delta_ce": delta_ce[:-1],
            "kl_div": kl_div[:-1],
            "delta_ce_all": delta_ce[-1],
            "kl_div_all": kl_div[-1],
        }


@torch.no_grad()
def measure(
    codec: Codec,
    k: int,
    model: Any,
    hook_names: Sequence[str],
    prompts: Prompts,
    *,
    bits_per_value: int,
    batch_size_prompts: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Bits per token, FVU, and delta CE and KL in nats, on held-out prompts.

    A layer by itself is replaced by its reconstruction of the clean run; for all at
    once see `AllLayers`. Definitions of FVU and of the scores: `SpliceMetrics`.

    Args:
        device: Of the codec.
    """
    model = as_model(model)
    splicer = make_splicer(model, hook_names, _PROMPTS_PER_BLOCK, None)
    measures = Measures(codec, k, len(hook_names), bits_per_value)
    batches = prompts.split(batch_size_prompts)
    for batch in tqdm(batches, desc="Splicing", unit="batch", leave=False):
        x = torch.stack(model.vectors(batch.ids, hook_names), 2).float().to(device)
        edits = measures.edits(x, batch.counted.to(device))
        clean: RunSums | None = measures.clean
        for logits, runs in splicer.runs(batch.ids.to(model.device), edits):
            sums = {i: measures.spliced[i] for i in runs}
            add_scores(sums, clean, logits, runs, batch.ids, batch.counted)
            clean = None
    return measures.compute()
