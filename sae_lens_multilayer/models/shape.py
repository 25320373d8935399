"""The sizes of a language model, and checks against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_multilayer.hooks import is_residual


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; None where its configuration does not state one."""

    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    n_ctx: int | None = None
    """Longest context in tokens."""
    d_vocab: int | None = None
    """Number of token ids."""

    @classmethod
    def of_config(cls, cfg: Any) -> "ModelShape":
        """The shape in a configuration of TransformerLens."""
        # It has -1 for a vocabulary of unknown size.
        d_vocab = getattr(cfg, "d_vocab", None) or -1
        return cls(
            cfg.n_layers,
            cfg.d_model,
            getattr(cfg, "n_ctx", None),
            d_vocab if d_vocab > 0 else None,
        )

    @classmethod
    def of_hf_config(cls, config: Any) -> "ModelShape":
        """The shape in a configuration of Hugging Face."""
        text = config.get_text_config()
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            getattr(text, "max_position_embeddings", None),
            getattr(text, "vocab_size", None),
        )

    def check_context_size(self, context_size: int, model_name: str) -> None:
        """Raise ValueError if a context is longer than the model's."""
        if self.n_ctx is not None and context_size > self.n_ctx:
            raise ValueError(
                f"`context_size` must be at most {self.n_ctx} tokens, the context of "
                f"{model_name!r}; got {context_size}."
            )

    def check_width(self, hook_names: Sequence[str], d_in: int) -> None:
        """Raise ValueError if residual-stream hooks do not have the width `d_in`.

        The width of other hooks is measured when the model runs (`check_widths`).
        """
        residual = [name for name in hook_names if is_residual(name)]
        if residual:
            check_widths({residual[0]: self.d_model}, d_in)


def check_widths(widths: Mapping[str, int], d_in: int) -> None:
    """Raise ValueError unless all hooks have the width `d_in`.

    Args:
        widths: Width of each hook.
    """
    if len(set(widths.values())) > 1:
        raise ValueError(
            "All hooks of one SAE must have the same width; got "
            + ", ".join(f"{name}: {width}" for name, width in widths.items())
            + ". Choose hooks of one kind."
        )
    name, width = next(iter(widths.items()))
    if width != d_in:
        raise ValueError(
            f"`d_in` must be {width}, the width of the model at {name!r}; got {d_in}."
        )
