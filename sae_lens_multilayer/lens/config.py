"""The settings of a lens, and which of its maps belongs to a hook."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer import hooks
from sae_lens_multilayer.models.model import ModelShape

Alignment = Literal["tuned_lens", "reference"]
LensKind = Literal["tuned", "procrustes", "least_squares", "whitening", "jacobian"]
"""How the maps of a lens are made: see `closed_form.py`, `jacobian.py`, `fit.py`."""


@dataclass(frozen=True)
class LensConfig:
    """The settings of a lens, saved in the metadata of an SAE that has it."""

    hook_names: list[str]
    """The hooks, in the order of the layer axis."""
    n_layers: int
    """Number of blocks of the model."""
    d_in: int
    """Width of the residual stream."""
    alignment: Alignment = "tuned_lens"
    """"reference" uses translator l for the output of block l, as the paper's code did;
    only for the published `-lens` checkpoints. See `translator`."""
    base_model_name: str | None = None
    """The model that the lens was made for, as tuned-lens names it."""
    base_model_revision: str | None = None
    """Its revision."""
    unembed_hash: str | None = None
    """tuned-lens' hash of that model's unembedding."""
    kind: LensKind = "tuned"
    """How the maps were made. Those in closed form may be of any hooks, the others only
    of the inputs and outputs of blocks."""

    def __post_init__(self) -> None:
        for name, choices in (("alignment", Alignment), ("kind", LensKind)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"`{name}` of a lens must be in {get_args(choices)}; got "
                    f"{getattr(self, name)!r}."
                )
        if self.kind in ("tuned", "jacobian"):
            for name in self.hook_names:
                self._block_end(name)

    @classmethod
    def from_tuned_lens(
        cls,
        config: TunedLensConfig,
        hook_names: Sequence[str],
        alignment: Alignment = "tuned_lens",
    ) -> "LensConfig":
        """The settings of the part of a tuned lens that these hooks use."""
        return cls(
            hook_names=list(hook_names),
            n_layers=config.num_hidden_layers,
            d_in=config.d_model,
            alignment=alignment,
            base_model_name=config.base_model_name_or_path,
            base_model_revision=config.base_model_revision,
            unembed_hash=config.unembed_hash,
        )

    def translator(self, hook_name: str) -> int | None:
        """Index of the tuned-lens translator of a hook; None: the identity.

        Translator i was trained on the input of block i, so the output of block l uses
        l + 1, and the output of the last block none.

        Example:
            >>> lens = LensConfig(["model.layers.5"], n_layers=6, d_in=512)
            >>> lens.translator("blocks.0.hook_resid_post")
            1
        """
        layer, is_output = self._block_end(hook_name)
        if not is_output or self.alignment == "reference":
            return layer
        return layer + 1 if layer + 1 < self.n_layers else None

    def has_map(self, hook_name: str) -> bool:
        """Whether a hook has a map; else it has the identity.

        In a tuned lens, the output of the last block has none.
        """
        return self.kind != "tuned" or self.translator(hook_name) is not None

    def last_block_before(self, hook_name: str) -> int:
        """The block whose output a hook is; -1: the input of the first block."""
        layer, is_output = self._block_end(hook_name)
        return layer if is_output else layer - 1

    @property
    def maps_to_last_layer(self) -> bool:
        """Whether all vectors are mapped to those of the last layer.

        So the unembedding can read them. Whitening keeps each layer in its own basis.
        """
        return self.kind != "whitening"

    def _block_end(self, hook_name: str) -> tuple[int, bool]:
        end = hooks.block_end(hook_name)
        if end is None or end[0] >= self.n_layers:
            raise ValueError(
                f"{hook_name!r} cannot have a lens: it must be the residual stream "
                f"before or after one of the {self.n_layers} blocks of "
                f"{self.base_model_name!r}, such as 'blocks.0.hook_resid_post'."
            )
        return end

    def check_shape(self, shape: ModelShape, model_name: str) -> None:
        """Raise ValueError if the model has another width or depth."""
        if (self.n_layers, self.d_in) != (shape.n_layers, shape.d_model):
            raise ValueError(
                f"The lens of {self.base_model_name!r} is for {self.n_layers} blocks "
                f"of width {self.d_in}; {model_name!r} has {shape.n_layers} of width "
                f"{shape.d_model}. Fit one to this model."
            )

    def check_sae(self, d_in: int, hook_names: Sequence[str]) -> None:
        """Raise ValueError if an SAE has another width or other hooks."""
        if (self.d_in, self.hook_names) != (d_in, list(hook_names)):
            raise ValueError(
                f"The lens must have the SAE's width, d_in = {d_in}, and hooks in the "
                f"same order, {list(hook_names)}; got {self.d_in} and "
                f"{self.hook_names}. Use `lens.select`."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as values that JSON can hold."""
        return asdict(self)
