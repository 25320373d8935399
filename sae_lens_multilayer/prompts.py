"""The prompts that an SAE is measured on."""

from typing import Any

import torch
from jaxtyping import Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_multilayer import hooks
from sae_lens_multilayer.codec import Codec


def take_prompts(
    codec: Codec,
    model: Any,
    tokens: object,
    n_prompts: int | None,
    batch_size_prompts: int,
) -> Int[Tensor, "prompt pos"]:
    """The prompts to measure on, once they and their numbers are known to be good.

    Args:
        codec: The SAEs, for the name of their model in messages.
        model: The model that will run them.
        tokens: Prompts, or a store to take them from.
        n_prompts: Prompts to take from a store; None: one model batch of it.
        batch_size_prompts: Checked only.

    Raises:
        ValueError: If the prompts are not what the model can run, or too few.
    """
    for name, number in [
        ("n_prompts", n_prompts),
        ("batch_size_prompts", batch_size_prompts),
    ]:
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1; got {number}.")
    if isinstance(tokens, ActivationsStore):
        tokens = _take_from_store(tokens, n_prompts)
    elif n_prompts is not None:
        raise ValueError(
            "`n_prompts` says how many prompts to take from a store; the tokens were "
            "given. Leave it out, or give a store."
        )
    prompts = _check_tokens(tokens)
    hooks.check_token_ids(model, prompts)
    model_name = str(codec.saes[0].cfg.metadata.model_name)
    shape = hooks.shape_of_model(model)
    hooks.check_context_size(prompts.shape[1], shape, model_name)
    return prompts


def _take_from_store(
    store: ActivationsStore, n_prompts: int | None
) -> Int[Tensor, "prompt pos"]:
    n_wanted = store.store_batch_size_prompts if n_prompts is None else n_prompts
    prompts: list[Tensor] = []
    try:
        while len(prompts) < n_wanted:
            # A larger batch that the epoch cuts short would be lost, and its size too.
            prompts.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
    except StopIteration:
        raise ValueError(
            f"`n_prompts` must be at most {len(prompts)}, the prompts left in the "
            f"store before its dataset repeats; got {n_wanted}. The store is at the "
            "start of its dataset again."
        ) from None
    return torch.cat(prompts)


def _check_tokens(tokens: object) -> Int[Tensor, "prompt pos"]:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not _has_integers(tokens):
        found = type(tokens).__name__
        if isinstance(tokens, Tensor):
            found = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise ValueError(
            "`tokens` must be a tensor of token ids, integers of shape [prompt, pos]; "
            f"got {found}."
        )
    if tokens.numel() == 0:
        raise ValueError(
            "`tokens` must hold at least one prompt of at least one token; got shape "
            f"{tuple(tokens.shape)}."
        )
    return tokens.long()


def _has_integers(tokens: Tensor) -> bool:
    return tokens.dtype != torch.bool and not (
        tokens.is_floating_point() or tokens.is_complex()
    )
