"""The contestants of a comparison: how each is trained, and what it costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.sae.config import CROSSCODER, ROUTED
from sae_lens_multilayer.studies.comparison.bits import k_of_bits
from sae_lens_multilayer.studies.comparison.codecs import (
    Codec,
    CrosscoderCodec,
    LayersCodec,
    PCACodec,
    ResidualCodec,
    RoutedCodec,
    SharedCodec,
)
from sae_lens_multilayer.studies.comparison.residuals import (
    Prediction,
    fit_predictions,
)

Matching = Literal["operations", "parameters", "bits"]
"""What is equal to the MLSAE's, see `Contestant.size`."""

MLSAE = "mlsae"


@dataclass(frozen=True)
class Size:
    """Sizes of an SAE, or of each of several."""

    d_sae: int
    """0 for PCA."""
    k: int
    """For each vector, or for each token if all layers have one code."""


@runtime_checkable
class Bench(Protocol):
    """The data that all contestants share, and the training of an SAE on it."""

    hook_names: list[str]

    @property
    def fitted_on(self) -> Float[Tensor, "token layer d_in"]:
        """Training vectors, for what is fitted in closed form."""
        ...

    def train(
        self,
        name: str,
        sae: Mapping[str, Any],
        hook_names: list[str] | None = None,
        prediction: Prediction | None = None,
    ) -> SAE[Any]:
        """Train an SAE, or load it.

        Args:
            name: Folder of the SAE.
            sae: Settings of the SAE that differ from the base.
            hook_names: The hooks; None: all.
            prediction: Subtract this prediction from the vectors of the second of two
                hooks, and train on the rest.
        """
        ...


@dataclass(frozen=True)
class Contestant:
    """A way to see all layers: its costs as multiples of d n, and its training."""

    description: str
    """In figures and tables."""
    make: Callable[[Bench, Size], Codec]
    has_dictionary_per_layer: bool = True
    """Whether there are an encoder and a decoder for each layer."""
    has_code_per_layer: bool = True
    """Whether each layer has its own k latents, not one code for all layers."""
    has_dictionary: bool = True
    """PCA has k components instead."""
    has_predictions: bool = False
    """Whether a map of each layer to the next one is added to the costs."""
    is_routed: bool = False
    """Whether a router, `d L` weights, chooses one layer of a token to encode."""

    def parameters(self, n_layers: int, d_in: int, size: Size) -> int:
        """Weights without biases: `2 d n` for each dictionary, `d k` for PCA."""
        if not self.has_dictionary:
            return n_layers * d_in * size.k
        dictionaries = n_layers if self.has_dictionary_per_layer else 1
        more = self._more_weights(n_layers, d_in)
        return 2 * d_in * size.d_sae * dictionaries + more

    def operations(self, n_layers: int, d_in: int, size: Size) -> int:
        """Operations of the encoder per token, a multiplication and an addition each:
        `2 L d n`, `2 L d k` for PCA."""
        rows = size.d_sae if self.has_dictionary else size.k
        n_encoded = 1 if self.is_routed else n_layers
        more = self._more_weights(n_layers, d_in)
        return 2 * n_encoded * d_in * rows + 2 * more

    def _more_weights(self, n_layers: int, d_in: int) -> int:
        """Weights of maps and routers, each of which is used once for a token."""
        maps = (n_layers - 1) * d_in**2 if self.has_predictions else 0
        return maps + (n_layers * d_in if self.is_routed else 0)

    def size(
        self, matching: str, n_layers: int, mlsae: Size, bits: float, q: int
    ) -> Size:
        """The sizes at which it is matched with the MLSAE.

        "operations": as many latents n at each layer and the same k, so encoder and
        decoder take as many operations. "parameters": as many parameters, n / L latents
        if each layer has its own dictionary; the same k. "bits": n as for operations,
        and the k at which a token takes as many bits. PCA has neither parameters nor
        operations to match: it has the k of each vector, or that of equal bits. A
        routed SAE, which encodes one layer, has L n latents for equal operations. Maps
        of residualised vectors and the router are not matched, but counted in the
        costs.

        Args:
            bits: Of the trained MLSAE, per token; read for "bits" only.
            q: Bits of each value.
        """
        d_sae, k = mlsae.d_sae, mlsae.k
        if matching == "parameters" and self.has_dictionary_per_layer:
            d_sae = max(1, round(d_sae / n_layers))
        if matching != "parameters" and self.is_routed:
            d_sae *= n_layers
        if matching == "bits" and self is not CONTESTANTS[MLSAE]:
            n_codes = n_layers if self.has_code_per_layer else 1
            k = self._k_of_bits(bits, d_sae, n_codes, q)
        return Size(d_sae, min(k, d_sae)) if self.has_dictionary else Size(0, k)

    def _k_of_bits(self, bits: float, d_sae: int, n_codes: int, q: int) -> int:
        if not self.has_dictionary:
            return max(1, round(bits / (n_codes * q)))
        return k_of_bits(bits, d_sae, n_codes, q)


def _sizes(size: Size) -> dict[str, Any]:
    return {"d_sae": size.d_sae, "k": size.k}


def _of_tokens(bench: Bench, size: Size, architecture: str) -> SAE[Any]:
    return bench.train("sae", {"architecture": architecture, **_sizes(size)})


def _mlsae(bench: Bench, size: Size) -> Codec:
    return SharedCodec(bench.train("sae", _sizes(size)))


def _single_layers(bench: Bench, size: Size) -> Codec:
    labels = layer_labels(bench.hook_names)
    return LayersCodec(
        [
            bench.train(label, _sizes(size), [name])
            for label, name in zip(labels, bench.hook_names, strict=True)
        ]
    )


def _residualised(bench: Bench, size: Size) -> Codec:
    labels, names = layer_labels(bench.hook_names), bench.hook_names
    predictions = fit_predictions(bench.fitted_on)
    saes = [bench.train(labels[0], _sizes(size), names[:1])]
    for i, prediction in enumerate(predictions):
        pair = names[i : i + 2]
        saes.append(bench.train(labels[i + 1], _sizes(size), pair, prediction))
    return ResidualCodec(saes, predictions)


CONTESTANTS: dict[str, Contestant] = {
    MLSAE: Contestant("MLSAE", _mlsae, has_dictionary_per_layer=False),
    "single_layers": Contestant("single-layer SAEs", _single_layers),
    "residualised": Contestant(
        "residualised SAEs", _residualised, has_predictions=True
    ),
    "crosscoder": Contestant(
        "crosscoder",
        lambda bench, size: CrosscoderCodec(_of_tokens(bench, size, CROSSCODER)),
        has_code_per_layer=False,
    ),
    "routed": Contestant(
        "routed SAE",
        lambda bench, size: RoutedCodec(_of_tokens(bench, size, ROUTED)),
        has_dictionary_per_layer=False,
        has_code_per_layer=False,
        is_routed=True,
    ),
    "pca": Contestant(
        "PCA",
        lambda bench, size: PCACodec(bench.fitted_on),
        has_dictionary=False,
    ),
}
"""All contestants by name; a new one is a row here."""
