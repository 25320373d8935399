"""Synthetic residual streams: directions over layers, and what each token contains."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyNode,
    generate_random_low_rank_correlation_matrix,
    hierarchy_modifier,
)
from sae_lens.util import temporary_seed
from torch import Tensor, nn

from sae_lens_multilayer.analysis.active import ActiveLatents
from sae_lens_multilayer.studies.synthetic.config import StreamConfig

_CORRELATION_RANK = 8
_ROTATION, _PROMPTS = 1, 2
"""Kinds of random draws with seeds of their own."""


@dataclass(frozen=True)
class SyntheticTokens:
    """Tokens of a synthetic stream, and what they contain."""

    x: Float[Tensor, "token layer d_in"]
    truth: ActiveLatents
    """The values g[t,l,f] m[t,f] above 0, in the form of an SAE's activations."""
    covariate: Float[Tensor, " token"]
    """c_t."""


class SyntheticStream(nn.Module):
    """A random residual stream with a layer axis, after `StreamConfig`.

    Magnitudes are those of SAELens' `ActivationGenerator`, and directions those of its
    `FeatureDictionary`. A prompt depends on the seed and on its index only.

    Attributes:
        directions: d_f(l), of length 1.
        biases: b_l.
        onset: mu_f, in layers.
        span: s_f, in layers.
    """

    directions: Float[Tensor, "layer feature d_in"]
    biases: Float[Tensor, "layer d_in"]
    onset: Float[Tensor, " feature"]
    span: Float[Tensor, " feature"]
    outliers: Float[Tensor, " d_in"]
    sink: Float[Tensor, " d_in"]

    def __init__(self, cfg: StreamConfig) -> None:
        """Draw all that does not depend on tokens."""
        super().__init__()
        self.cfg = cfg
        with temporary_seed(cfg.seed):
            first = FeatureDictionary(cfg.n_features, cfg.d_in).feature_vectors.detach()
            self._set("directions", _rotated(first, cfg))
            self._set("biases", _unit(torch.randn(cfg.n_layers, cfg.d_in)))
            self.biases *= cfg.bias_norm
            self._set("span", _spans(cfg))
            # The layers of a box are uniform: its first is in [1 - s_f, n_layers).
            n_first = cfg.n_layers + self.span - 1
            chosen = (torch.rand(cfg.n_features) * n_first).floor()
            self._set("onset", chosen + 1 - self.span - 0.5)
            self._set("outliers", _outliers(cfg))
            self._set("sink", cfg.sink_norm * _unit(torch.randn(1, cfg.d_in))[0])
            self._generator = self._make_generator()

    def _set(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def prompt(self, index: int) -> SyntheticTokens:
        """The tokens of one prompt; the same at each call."""
        cfg = self.cfg
        size = cfg.context_size, cfg.n_layers, cfg.n_features
        with temporary_seed(_mixed(cfg.seed, _PROMPTS, index)):
            magnitudes = self._generator.sample(cfg.context_size)
            covariate = (torch.rand(cfg.context_size) < 0.5).float()
            shift = cfg.shift_std * torch.randn(cfg.context_size)
            shift += cfg.covariate_shift * covariate
            token, feature = magnitudes.nonzero(as_tuple=True)
            jitter = cfg.jitter_std * torch.randn(len(token))
            onset = self.onset[feature] + shift[token] + jitter
            noise = cfg.noise_std * torch.randn(*size[:2], cfg.d_in)
        parts = self._profile(onset, self.span[feature])
        parts *= magnitudes[token, feature, None]
        pair, layer = parts.nonzero(as_tuple=True)
        token, feature, value = token[pair], feature[pair], parts[pair, layer]
        x = (self.biases + noise).flatten(0, 1)
        vectors = self.directions[layer, feature] * value[:, None]
        x.index_add_(0, token * cfg.n_layers + layer, vectors)
        x = x.view(noise.shape) * cfg.growth ** torch.arange(cfg.n_layers).view(-1, 1)
        x += self.outliers
        x[0] += self.sink
        truth = ActiveLatents(*size, token, layer, feature, value.double())
        return SyntheticTokens(x, truth, covariate)

    def _profile(
        self, onset: Float[Tensor, " pair"], span: Float[Tensor, " pair"]
    ) -> Float[Tensor, "pair layer"]:
        """g over the layers, of features with these onsets."""
        # Layers since the first active one, which is ceil(o).
        n_after = torch.arange(self.cfg.n_layers) - onset.ceil()[:, None]
        span = span[:, None]
        inside = (n_after >= 0) & (n_after < span)
        if self.cfg.profile == "ramp":
            return inside * (n_after + 1) / span
        if self.cfg.profile == "single":
            inside &= n_after == 0
        if self.cfg.profile == "returning":
            third = (span / 3).floor()
            inside &= (n_after < span - 2 * third) | (n_after >= span - third)
        return inside.float()

    def _make_generator(self) -> ActivationGenerator:
        cfg = self.cfg
        probabilities = cfg.firing_probabilities[torch.randperm(cfg.n_features)]
        modifier = None
        if cfg.hierarchical:
            modifier, probabilities = _hierarchy(probabilities)
        correlation = None
        if cfg.correlation:
            correlation = generate_random_low_rank_correlation_matrix(
                cfg.n_features, _CORRELATION_RANK, cfg.correlation, cfg.seed
            )
        return ActivationGenerator(
            cfg.n_features,
            probabilities,
            cfg.magnitude_std,
            modify_activations=modifier,
            correlation_matrix=correlation,
        )

    @cached_property
    def rotation(self) -> Float[Tensor, "d_in d_in"]:
        """R of the common rotation: a row vector d becomes d R."""
        with temporary_seed(self.cfg.seed + 1):
            return _common_rotation(self.cfg)


def _hierarchy(
    probabilities: Float[Tensor, " feature"],
) -> tuple[Callable[..., Tensor], Float[Tensor, " feature"]]:
    """Trees of a parent and three children; the features' own frequencies stay.

    Returns:
        The modifier, and the probability of each feature where its parent is active.
    """
    by_frequency = probabilities.argsort(descending=True)
    parents, children = by_frequency.tensor_split([len(probabilities) // 4])
    given = probabilities.clone()
    given[children] /= probabilities[parents.repeat_interleave(3)]
    roots = [
        HierarchyNode(int(parent), [HierarchyNode(int(child)) for child in of_parent])
        for parent, of_parent in zip(parents, children.view(-1, 3), strict=True)
    ]
    return hierarchy_modifier(roots), given


def _unit(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
    return rows / rows.norm(dim=1, keepdim=True)


def _spans(cfg: StreamConfig) -> Float[Tensor, " feature"]:
    n = cfg.n_features
    return torch.randint(cfg.min_span, cfg.max_span + 1, (n,)).float()


def _outliers(cfg: StreamConfig) -> Float[Tensor, " d_in"]:
    values = torch.zeros(cfg.d_in)
    values[torch.randperm(cfg.d_in)[: cfg.n_outlier_dims]] = cfg.outlier_value
    return values


def _common_rotation(cfg: StreamConfig) -> Float[Tensor, "d_in d_in"]:
    """A rotation that turns every vector by theta."""
    angle = math.radians(cfg.theta)
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    )
    turns = torch.block_diag(*[turn] * (cfg.d_in // 2))
    basis = torch.linalg.qr(torch.randn(cfg.d_in, cfg.d_in))[0]
    return basis @ turns @ basis.T


def _rotated(
    first: Float[Tensor, "feature d_in"], cfg: StreamConfig
) -> Float[Tensor, "layer feature d_in"]:
    """The directions at all layers, from those at the first."""
    if cfg.rotation == "common":
        with temporary_seed(_mixed(cfg.seed, _ROTATION)):
            rotation = _common_rotation(cfg)
        layers = [first]
        for _ in range(cfg.n_layers - 1):
            layers.append(layers[-1] @ rotation)
        return torch.stack(layers)
    with temporary_seed(_mixed(cfg.seed, _ROTATION)):
        other = torch.randn_like(first)
    other = _unit(other - (other * first).sum(1, keepdim=True) * first)
    angles = math.radians(cfg.theta) * torch.arange(cfg.n_layers).view(-1, 1, 1)
    return angles.cos() * first + angles.sin() * other


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits, all that torch's generator uses, of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
