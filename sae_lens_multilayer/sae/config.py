"""Configurations of the multi-layer SAE, for inference and for training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_lens import SAEConfig, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

ARCHITECTURE = "multilayer"
"""The name of this SAE in SAELens' registries."""
CROSSCODER = "multilayer_crosscoder"
"""The name of the crosscoder, likewise."""
ROUTED = "multilayer_routed"
"""The name of the routed SAE, likewise."""


@dataclass
class MultiLayerSAEConfig(SAEConfig):
    """Configuration of a multi-layer SAE for inference; its hooks are in `metadata`.

    Args:
        k: Number of latents kept for each activation vector.
        normalize_activations: "layer_norm" (the paper's): each vector is standardised
            to mean 0 and standard deviation 1 before the encoder, which is undone after
            the decoder; or "none".
    """

    k: int = 32
    normalize_activations: str = "layer_norm"  # type: ignore[assignment]
    # An SAEMetadata; SAELens' `from_dict` converts it only after this was created.
    metadata: Any = field(default_factory=SAEMetadata)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self, ["k"])


@dataclass
class MultiLayerTrainingSAEConfig(TrainingSAEConfig):
    """Configuration of a multi-layer SAE for training: the paper's recipe by default.

    Args:
        k: Number of latents kept for each activation vector.
        k_aux: Number of dead latents that reconstruct the error; None: the power of two
            nearest to `d_in` / 2, at most `d_sae`.
        aux_loss_coefficient: Weight of the auxiliary loss.
        dead_after_tokens: Tokens without firing, on any layer, after which a latent is
            dead.
        dead_latent_threshold: Activation above which a latent has fired.
        certified_topk: Select the latents from a bfloat16 product, prove that the
            selection equals that of float32, and recompute it where the proof fails;
            None: if that is faster. The result is the same.
    """

    k: int = 32
    k_aux: int | None = None
    aux_loss_coefficient: float = 1 / 32
    dead_after_tokens: int = 10_000_000
    dead_latent_threshold: float = 1e-3
    certified_topk: bool | None = None
    normalize_activations: str = "layer_norm"  # type: ignore[assignment]
    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        if self.k_aux is None:
            self.k_aux = min(_power_of_two_near(self.d_in / 2), self.d_sae)
        # SAELens copies the training settings, including `k_aux`, into the metadata.
        super().__post_init__()
        _check_config(self, ["k", "k_aux"])


@dataclass
class LayersConfig:
    """The layers of an SAE that encodes the vectors of all layers of a token.

    Args:
        n_layers: Number of layers of a token; None in training: that of the hooks of
            the run.
    """

    n_layers: int | None = None


@dataclass
class CrosscoderSAEConfig(LayersConfig, MultiLayerSAEConfig):
    """Configuration of a crosscoder for inference.

    Args:
        k: Number of latents kept for each token.
        n_layers: Number of layers, each of which has its own encoder and decoder.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return CROSSCODER


@dataclass
class CrosscoderTrainingSAEConfig(LayersConfig, MultiLayerTrainingSAEConfig):
    """Configuration of a crosscoder for training, with the recipe of the MLSAE.

    Args:
        k: Number of latents kept for each token.
        n_layers: Number of layers, each of which has its own encoder and decoder; None:
            that of the hooks of the run.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return CROSSCODER


@dataclass
class RoutedSAEConfig(LayersConfig, MultiLayerSAEConfig):
    """Configuration of a routed SAE for inference.

    Args:
        k: Number of latents kept for each token.
        n_layers: Number of layers from which the router chooses.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return ROUTED


@dataclass
class RoutedTrainingSAEConfig(LayersConfig, MultiLayerTrainingSAEConfig):
    """Configuration of a routed SAE for training, with the recipe of the MLSAE.

    Args:
        k: Number of latents kept for each token.
        n_layers: Number of layers from which the router chooses; None: that of the
            hooks of the run.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return ROUTED


def check_sizes(cfg: Any, names: Sequence[str], most: int | None = None) -> None:
    """Raise ValueError unless settings are ints from 1 to `most`."""
    for name in names:
        value = getattr(cfg, name)
        if type(value) is not int or not 0 < value <= (most or value):
            limit = "" if most is None else f", at most d_sae = {most}"
            raise ValueError(
                f"`{name}` must be a positive whole number{limit}; got {value!r}."
            )


def _check_config(cfg: SAEConfig, latents: Sequence[str]) -> None:
    check_sizes(cfg, ["d_in", "d_sae"])
    check_sizes(cfg, latents, cfg.d_sae)
    required = {
        "normalize_activations": ("layer_norm", "none"),
        "apply_b_dec_to_input": (True,),
        # Views can reshape: `turn_on_forward_pass_hook_z_reshaping()` for attn.hook_z.
        "reshape_activations": ("none",),
    }
    for name, allowed in required.items():
        value = getattr(cfg, name)
        if value not in allowed:
            raise ValueError(
                f"`{name}` of a multi-layer SAE must be in {allowed}; got {value!r}."
            )


def _power_of_two_near(x: float) -> int:
    power = 1
    while power * 2 - x <= x - power:
        power *= 2
    return power
