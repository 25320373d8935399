"""Codecs: the vectors of all layers of a token as few values, and back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.analysis import functional_layers
from sae_lens_multilayer.studies.comparison.bits import (
    bits_of_separate_latents,
    bits_of_shared_latents,
)
from sae_lens_multilayer.studies.comparison.residuals import Prediction
from sae_lens_multilayer.text.prompts import Prompts
from sae_lens_multilayer.topk.reference import STANDARDIZE_EPS, standardize
from sae_lens_multilayer.topk.sparse import TopKActs


class Codec(ABC):
    """Codes and reconstructs the vectors of all layers.

    Codes are `TopKActs` with values [token, group, k]; a group is a layer, or all of
    them for a crosscoder. The mean and the standard deviation of each vector are in the
    code but not counted in its bits, for all contestants alike.
    """

    most: int
    """Largest k."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "token layer d_in"], k: int) -> TopKActs:
        """The k largest activations of each group."""

    @abstractmethod
    def decode(self, code: TopKActs) -> Float[Tensor, "token layer d_in"]:
        """Reconstruct raw vectors."""

    @abstractmethod
    def bits(self, code: TopKActs, bits_per_value: int) -> Float[Tensor, " token"]:
        """Bits of each token's code if each value takes `bits_per_value`."""

    def numbers(self, model: Any, prompts: Prompts) -> dict[str, float]:
        """Numbers that only this kind of codec has."""
        return {}

    def reconstruct(
        self, x: Float[Tensor, "token layer d_in"], k: int
    ) -> Float[Tensor, "token layer d_in"]:
        """Encode and decode."""
        return self.decode(self.encode(x, k))


class SharedCodec(Codec):
    """One SAE for all layers."""

    def __init__(self, sae: SAE[Any]) -> None:
        """Use a multi-layer SAE at all of its hooks."""
        self._sae, self.most = sae, sae.cfg.d_sae

    @override
    def encode(self, x: Float[Tensor, "token layer d_in"], k: int) -> TopKActs:
        return with_k(self._sae, k).encode_topk(x)

    @override
    def decode(self, code: TopKActs) -> Float[Tensor, "token layer d_in"]:
        sae: Any = self._sae
        return sae.decode_topk(code)

    @override
    def bits(self, code: TopKActs, bits_per_value: int) -> Float[Tensor, " token"]:
        active = code.values > 0
        return bits_of_shared_latents(code.indices, active, self.most, bits_per_value)


class LayersCodec(Codec):
    """One SAE for each layer."""

    def __init__(self, saes: Sequence[Any]) -> None:
        """Use multi-layer SAEs of one hook each, in the order of the layers."""
        self._saes = list(saes)
        self.most = self._saes[0].cfg.d_sae

    @override
    def encode(self, x: Float[Tensor, "token layer d_in"], k: int) -> TopKActs:
        parts = [
            with_k(sae, k).encode_topk(x[:, layer], 0)
            for layer, sae in enumerate(self._saes)
        ]
        return stacked(parts)

    @override
    def decode(self, code: TopKActs) -> Float[Tensor, "token layer d_in"]:
        parts = zip(self._saes, by_layer(code), strict=True)
        return torch.stack([sae.decode_topk(part, 0) for sae, part in parts], 1)

    @override
    def bits(self, code: TopKActs, bits_per_value: int) -> Float[Tensor, " token"]:
        return bits_of_separate_latents(code.values > 0, self.most, bits_per_value)


class ResidualCodec(LayersCodec):
    """One SAE for each layer, of what the layer before does not predict.

    The prediction is made from the reconstruction of the layer before, which is all
    that a decoder has. So the encoder codes `x_l - P(x_hat_{l-1})`, with the errors of
    the layers before, though the SAEs were trained on `x_l - P(x_{l-1})`.
    """

    def __init__(self, saes: Sequence[Any], predictions: Sequence[Prediction]) -> None:
        """Use a prediction for each SAE but the first."""
        super().__init__(saes)
        self._predictions = predictions

    @override
    def encode(self, x: Float[Tensor, "token layer d_in"], k: int) -> TopKActs:
        parts: list[TopKActs] = []
        predicted = torch.zeros_like(x[:, 0])
        for layer, sae in enumerate(self._saes):
            parts.append(with_k(sae, k).encode_topk(x[:, layer] - predicted, 0))
            x_hat = predicted + sae.decode_topk(parts[-1], 0)
            if layer < len(self._predictions):
                predicted = self._predictions[layer](x_hat)
        return stacked(parts)

    @override
    def decode(self, code: TopKActs) -> Float[Tensor, "token layer d_in"]:
        residuals = super().decode(code).unbind(1)
        x_hat = [residuals[0]]
        for predict, residual in zip(self._predictions, residuals[1:], strict=True):
            x_hat.append(predict(x_hat[-1]) + residual)
        return torch.stack(x_hat, 1)


class TokenCodec(Codec):
    """One latent vector for all layers of a token."""

    def __init__(self, sae: SAE[Any]) -> None:
        """Use a crosscoder or a routed SAE at all of its hooks."""
        self._sae: Any = sae
        self.most = sae.cfg.d_sae

    @override
    def encode(self, x: Float[Tensor, "token layer d_in"], k: int) -> TopKActs:
        return with_k(self._sae, k).encode_topk(x)

    @override
    def decode(self, code: TopKActs) -> Float[Tensor, "token layer d_in"]:
        return self._sae.decode_topk(code)

    @override
    def bits(self, code: TopKActs, bits_per_value: int) -> Float[Tensor, " token"]:
        active = code.values.unsqueeze(1) > 0
        return bits_of_separate_latents(active, self.most, bits_per_value)


class RoutedCodec(TokenCodec):
    """The latents of the layer that a router has chosen, which is named too."""

    @override
    def bits(self, code: TopKActs, bits_per_value: int) -> Float[Tensor, " token"]:
        n_layers = self._sae.cfg.n_layers
        return super().bits(code, bits_per_value) + math.log2(n_layers)


class CrosscoderCodec(TokenCodec):
    """One latent vector, with an encoder and a decoder for each layer."""

    @override
    def numbers(self, model: Any, prompts: Prompts) -> dict[str, float]:
        """Means over latents of `exp H` of the layers' contributions, and of the
        largest fall of the activation if one layer is left out."""
        found: Any = functional_layers(self._sae, model, prompts)
        largest = found.fall[:, found.counts > 0].amax(0)
        return {**found.numbers(), "largest_fall": float(largest.mean())}


class PCACodec(Codec):
    """The first k principal components of each layer's standardised vectors.

    Values are divided by the standard deviation of their component, so that one
    quantiser fits all of them.
    """

    def __init__(self, x: Float[Tensor, "token layer d_in"]) -> None:
        """Fit the components of each layer."""
        u = standardize(x.double())[0].transpose(0, 1)  # [layer, token, d_in]
        self._mean = u.mean(1, keepdim=True)
        centred = u - self._mean
        variances, vectors = torch.linalg.eigh(centred.mT @ centred / u.shape[1])
        # In descending order; standardised vectors have d_in - 1 dimensions.
        self._components = vectors.flip(2)  # [layer, d_in, component]
        self._stds = variances.flip(1).clamp(min=1e-12).sqrt().unsqueeze(1)
        self.most = x.shape[2]

    @override
    def encode(self, x: Float[Tensor, "token layer d_in"], k: int) -> TopKActs:
        u, mean, std = standardize(x)
        values = (u.double().transpose(0, 1) - self._mean) @ self._components[..., :k]
        values = (values / self._stds[..., :k]).transpose(0, 1).to(x)
        indices = torch.arange(values.shape[2]).expand(values.shape)
        return TopKActs(values, indices, mean, std + STANDARDIZE_EPS)

    @override
    def decode(self, code: TopKActs) -> Float[Tensor, "token layer d_in"]:
        k = code.values.shape[2]
        values = code.values.double().transpose(0, 1) * self._stds[..., :k]
        u = values @ self._components[..., :k].mT + self._mean
        return u.transpose(0, 1).to(code.values) * code.std + code.mean

    @override
    def bits(self, code: TopKActs, bits_per_value: int) -> Float[Tensor, " token"]:
        n_tokens, n_layers, k = code.values.shape
        return torch.full((n_tokens,), float(n_layers * k * bits_per_value))


def with_k(sae: Any, k: int) -> Any:
    """An SAE that shares the weights and keeps another number of latents."""
    other: Any = copy(sae)
    other.cfg = replace(sae.cfg, k=k)
    return other


def stacked(parts: Sequence[TopKActs]) -> TopKActs:
    """The codes of single layers as one with a layer axis."""
    names = ("values", "indices", "mean", "std")
    columns = ([getattr(part, name) for part in parts] for name in names)
    return TopKActs(*(torch.stack(column, 1) for column in columns))


def by_layer(code: TopKActs) -> list[TopKActs]:
    """The codes of single layers."""
    columns = (code.values, code.indices, code.mean, code.std)
    layers = zip(*(column.unbind(1) for column in columns), strict=True)
    return [TopKActs(*layer) for layer in layers]
