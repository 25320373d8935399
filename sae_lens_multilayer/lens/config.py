"""What a tuned lens is for, and which of its translators belongs to which hook."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer import hooks
from sae_lens_multilayer.models.shape import ModelShape
from sae_lens_multilayer.sae.config import check_size

Alignment = Literal["tuned_lens", "reference"]


def translator_of(
    hook_name: str, n_layers: int, alignment: Alignment = "tuned_lens"
) -> int | None:
    """Which of tuned-lens' translators belongs to a hook; None: the identity.

    Translator i was trained on the input of block i, so the output of block l uses
    l + 1, and the output of the last block none.

    Args:
        hook_name: The residual stream before or after a block, in TransformerLens'
            or Hugging Face's words (a block of a Hugging Face model is its output).
        n_layers: Number of blocks of the model.
        alignment: "reference" uses translator l for the output of block l, as the
            paper's code did; only for the published `-lens` checkpoints.

    Raises:
        ValueError: If the hook cannot have a lens, or is not in the model.

    Example:
        >>> translator_of("blocks.0.hook_resid_pre", 6)
        0
        >>> translator_of("blocks.0.hook_resid_post", 6)
        1
        >>> translator_of("model.layers.5", 6) is None
        True
    """
    end = hooks.block_end(hook_name)
    if end is None:
        raise ValueError(
            f"{hook_name!r} cannot have a tuned lens: hooks that can are "
            "'blocks.{layer}.hook_resid_pre', 'blocks.{layer}.hook_resid_post', and "
            "a Hugging Face model's blocks, as 'model.layers.{layer}'. Choose those, "
            "or leave out the lens."
        )
    layer, is_output = end
    if layer >= n_layers:
        raise ValueError(
            f"The lens is for a model of {n_layers} blocks; {hook_name!r} is not one "
            "of them. Use the lens of this model."
        )
    if not is_output or alignment == "reference":
        return layer
    return layer + 1 if layer + 1 < n_layers else None


@dataclass(frozen=True)
class LensConfig:
    """What a lens is, apart from its tensors."""

    hook_names: list[str]
    """The hooks, in the order of the layer axis."""
    n_layers: int
    """Number of blocks of the model, which is tuned-lens' number of translators."""
    d_in: int
    """Width of the residual stream."""
    alignment: Alignment = "tuned_lens"
    """Which translator a block's output uses; see `translator_of`."""
    base_model_name: str | None = None
    """The model that the lens was trained for, as tuned-lens names it."""
    base_model_revision: str | None = None
    """Its revision."""
    unembed_hash: str | None = None
    """tuned-lens' hash of that model's unembedding."""

    def __post_init__(self) -> None:
        """Check what cannot be right for any model."""
        check_size("n_layers", self.n_layers)
        check_size("d_in", self.d_in)
        hooks.check_hook_choice("", self.hook_names, None)
        if self.alignment not in get_args(Alignment):
            raise ValueError(
                f"`alignment` must be one of {get_args(Alignment)}; got "
                f"{self.alignment!r}."
            )
        for name in self.hook_names:
            translator_of(name, self.n_layers, self.alignment)

    @classmethod
    def from_tuned_lens(
        cls,
        stated: TunedLensConfig,
        hook_names: Sequence[str],
        alignment: Alignment = "tuned_lens",
    ) -> "LensConfig":
        """The part of a lens of tuned-lens that is used at these hooks.

        Raises:
            ValueError: If a hook cannot have a lens.
        """
        return cls(
            hook_names=list(hook_names),
            n_layers=stated.num_hidden_layers,
            d_in=stated.d_model,
            alignment=alignment,
            base_model_name=stated.base_model_name_or_path,
            base_model_revision=stated.base_model_revision,
            unembed_hash=stated.unembed_hash,
        )

    def check_shape(self, shape: ModelShape, model_name: str) -> None:
        """Raise ValueError if the lens is of another width or depth than the model."""
        if (self.n_layers, self.d_in) != (shape.n_layers, shape.d_model):
            raise ValueError(
                f"The lens of {self.base_model_name!r} is for {self.n_layers} blocks "
                f"of width {self.d_in}; {model_name!r} has {shape.n_layers} of width "
                f"{shape.d_model}. Use the lens of this model or fit one with "
                "`fit_tuned_lens`."
            )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LensConfig":
        """Undo `to_dict`.

        Raises:
            ValueError: If a key is unknown or missing, or a value cannot be right.
        """
        known = [field.name for field in fields(cls)]
        required = {"hook_names", "n_layers", "d_in"}
        if not required <= set(values) <= set(known):
            raise ValueError(
                f"The settings of a lens must be among {known}, with "
                f"{sorted(required)}; got {sorted(values)}."
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The saved settings of the lens, `tuned_lens`, are wrong: {error}"
            ) from error
