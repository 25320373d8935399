"""Continuing a text from cached keys and values, with activations replaced."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.models.model import Model, Replace
from sae_lens_multilayer.models.walk import agree

Step = Callable[
    [Int[Tensor, "1 pos"], Mapping[str, Replace]], Float[Tensor, "1 pos d_vocab"]
]
"""The logits of the next tokens of a text, with activations of hooks replaced."""


@contextmanager
def steps(model: Model) -> Generator[Step]:
    """A function for passes over one text, each over its next tokens only.

    Keys and values of the tokens before are those of the passes before, with their
    replacements. Hooks see the vectors of the next tokens only. Padding is not masked.
    See `steps_obstacle` for models that cannot do this.
    """
    with model.caching() as arguments:
        yield lambda tokens, replacements: model.hooked_logits(
            tokens, replacements, **arguments(tokens)
        )


@torch.no_grad()
def steps_obstacle(model: Model) -> str | None:
    """Why `steps` cannot be used; None: it can.

    Found by comparing steps on a small text with a whole pass, as in
    `walk.walk_differs`.
    """
    tokens = model.tokens_of_check()[:1]
    n_first = -(-tokens.shape[1] // 2)
    parts = [tokens[:, :n_first], *tokens[:, n_first:].split(1, dim=1)]
    try:
        with steps(model) as step:
            found = torch.cat([step(part, {}) for part in parts if part.numel()], dim=1)
        if agree(found, model.logits(tokens)):
            return None
    # Whatever happens in a model unlike the others, whole passes remain.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "the logits differ from those of a whole pass"
