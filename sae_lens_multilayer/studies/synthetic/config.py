"""The factors of a synthetic residual stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from jaxtyping import Float
from sae_lens.synthetic import zipfian_firing_probabilities
from torch import Tensor

from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.sae.config import check_sizes

Profile = Literal["box", "ramp", "single", "returning"]
Rotation = Literal["common", "feature"]

_MOST_PROBABLE = 0.9
"""Highest firing probability; a feature that is always active is a bias."""


@dataclass(frozen=True)
class StreamConfig:
    """The factors of a synthetic residual stream.

    Feature f of token t has a magnitude m[t,f] >= 0 and an onset, in layers,

        o[t,f] = mu_f + a_t + beta c_t + e[t,f],    a_t ~ N(0, s_a^2), e ~ N(0, s_e^2)

    with c_t 0 or 1, each half of the time. It is active at the layers
    `o <= l < o + s_f`, where its profile g[t,l,f] is above 0. The vector at layer l is

        x[t,l] = gamma^l (sum_f g[t,l,f] m[t,f] d_f(l) + b_l + noise)

    plus outlier dimensions, and an attention sink at position 0. All directions d_f(l)
    have length 1. The layers mu_f + 0.5 to mu_f + 0.5 + s_f - 1 of a feature without
    jitter are uniform over the stream, and may be cut off at its ends.
    """

    n_layers: int = 6
    d_in: int = 64
    n_features: int = 256
    l0: float = 8.0
    """Mean number of features with m > 0 at a token; fewer are active in a vector."""
    min_span: int = 1
    """Fewest layers s_f at which a feature is active."""
    max_span: int = 6
    """Most layers; s_f is uniform between the two."""
    profile: Profile = "box"
    """Shape of g over a feature's layers: "box", 1 at all; "ramp", rising to 1;
    "single", 1 at the first only; "returning", 0 in the middle third."""
    rotation: Rotation = "common"
    """"common": one rotation turns the directions of all features from layer to layer,
    d_f(l) = R^l d_f, which a lens can undo; "feature": each turns in a random plane of
    its own, which no lens can undo."""
    theta: float = 0.0
    """Angle of the rotation, degrees per layer."""
    shift_std: float = 0.0
    """s_a: of the shift of onsets that all features of a token share, layers."""
    covariate_shift: float = 0.0
    """beta: shift of onsets at tokens with c_t = 1, layers."""
    jitter_std: float = 0.0
    """s_e: of the shift of each feature by itself, layers."""
    frequency_ratio: float = 10.0
    """Firing probability of the most frequent over the least frequent feature."""
    zipf_exponent: float = 1.0
    """Exponent of SAELens' Zipfian firing probabilities."""
    correlation: float = 0.0
    """Scale of random correlations between features, of rank 8 (SAELens')."""
    hierarchical: bool = False
    """Three of four features are children, which are active only if their parent is."""
    magnitude_std: float = 0.2
    """Standard deviation of magnitudes around 1."""
    growth: float = 1.2
    """gamma: growth of vectors from layer to layer."""
    bias_norm: float = 0.0
    """Length of b_l, which is random at each layer."""
    noise_std: float = 0.02
    """Of each dimension."""
    n_outlier_dims: int = 0
    """Dimensions with an additional constant, the same at all layers."""
    outlier_value: float = 20.0
    """That constant."""
    sink_norm: float = 0.0
    """Length of the vector that is added at position 0 of each prompt."""
    context_size: int = 256
    """Tokens in a prompt."""
    seed: int = 0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "StreamConfig":
        """The factors of a file, which may omit some."""
        check_known(list(settings), [field.name for field in fields(cls)])
        values: dict[str, Any] = {
            # A file may have 20 for 20.0.
            name: float(v) if isinstance(getattr(cls, name), float) else v
            for name, v in settings.items()
        }
        return cls(**values)

    def __post_init__(self) -> None:
        check_sizes(self, ["n_layers", "d_in", "n_features", "min_span", "max_span"])
        check_sizes(self, ["context_size"])
        for name, choices in (("profile", Profile), ("rotation", Rotation)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"`{name}` must be in {get_args(choices)}; got "
                    f"{getattr(self, name)!r}."
                )
        if self.d_in % 2:
            raise ValueError(
                f"`d_in` must be even, as rotations turn planes; got {self.d_in}."
            )
        if not self.min_span <= self.max_span <= self.n_layers:
            raise ValueError(
                "`min_span` and `max_span` must be in order and at most `n_layers` = "
                f"{self.n_layers}; got {self.min_span} and {self.max_span}."
            )
        if self.hierarchical and self.n_features % 4:
            raise ValueError(
                "`n_features` must be a multiple of 4 with `hierarchical`; got "
                f"{self.n_features}."
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite; got {value}.")

        highest = float(self.firing_probabilities[0])
        if highest > _MOST_PROBABLE:
            raise ValueError(
                f"`n_features` must be large enough for `l0` = {self.l0} features "
                f"active at a token: of {self.n_features}, the most frequent would be "
                f"active with probability {highest:.2f}. Give more features, a smaller "
                "`l0` or a smaller `frequency_ratio`."
            )

    @property
    def firing_probabilities(self) -> Float[Tensor, " feature"]:
        """How often features are active at a token, the most frequent first."""
        relative = zipfian_firing_probabilities(
            self.n_features, self.zipf_exponent, 1.0, 1 / self.frequency_ratio
        )
        return relative * (self.l0 / relative.sum())

    @property
    def hook_names(self) -> list[str]:
        """Names of the layers, as of the outputs of a transformer's blocks."""
        return [f"blocks.{layer}.hook_resid_post" for layer in range(self.n_layers)]
