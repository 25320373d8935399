"""Prompts to measure on, made of text as a training run's store makes its own."""

from typing import Any

from jaxtyping import Int
from sae_lens.config import HfDataset
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.store.store import MultiLayerActivationsStore
from sae_lens_multilayer.text.prompts import next_rows, take_prompts


def check_n_tokens(n_tokens: int) -> None:
    """Raise ValueError unless there is a token to measure on."""
    if n_tokens < 1:
        raise ValueError(f"`n_tokens` must be at least 1; got {n_tokens}.")


def prompts_of_text(
    model: Any,
    cfg: MultiLayerConfig[Any],
    n_tokens: int,
    batch_size_prompts: int,
    dataset: HfDataset | None = None,
) -> Int[Tensor, "prompt pos"]:
    """The first prompts of a text, on the CPU.

    Args:
        model: The loaded model of the run.
        cfg: A run on this text: its `dataset_path`, `context_size`, `prepend_bos` and
            so on, and an SAE that fits the model.
        n_tokens: Tokens of text; the last prompt is a whole one too.
        batch_size_prompts: Checked only.
        dataset: The text, instead of `dataset_path`.

    Raises:
        ValueError: If the text is too short, or as the store.
    """
    check_n_tokens(n_tokens)
    store = MultiLayerActivationsStore.from_config(model, cfg, dataset)
    n_prompts = -(-n_tokens // cfg.context_size)
    rows, ended = next_rows(store, n_prompts)
    if rows is None or ended:
        n_there = 0 if rows is None else len(rows)
        raise ValueError(
            f"`n_tokens` must be at most {n_there * cfg.context_size}, as the text has "
            f"{n_there} whole prompts of {cfg.context_size} tokens; got {n_tokens}. "
            "Give more text, or shorter prompts with `context_size`."
        )
    prompts = take_prompts(model, cfg.model_name, rows, None, batch_size_prompts)
    return prompts.cpu()


def excluded_token_ids(
    exclude_special_tokens: bool | list[int] | None, tokenizer: Any
) -> list[int]:
    """The token ids that a run's setting of this name leaves out."""
    if exclude_special_tokens is True:
        return get_special_token_ids(tokenizer)
    return list(exclude_special_tokens or [])
