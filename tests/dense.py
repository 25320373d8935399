"""Analyses of given activations, to compare with brute force."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from sae_lens.saes.sae import SAEMetadata
from saes import random_sae

from sae_lens_multilayer.analysis.active import ActiveLatents
from sae_lens_multilayer.analysis.batch import TokenBatch


def sae_of(acts: torch.Tensor) -> Any:
    """An SAE with the number of layers and latents of these activations."""
    _, n_layers, d_sae = acts.shape
    hook_names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    metadata = SAEMetadata(hook_names=hook_names, model_name="tiny")
    return random_sae(d_sae=d_sae, k=1, metadata=metadata)


def random_sparse(seed: int, *shape: int) -> torch.Tensor:
    """Sparse activations; whole numbers, so that some are equal."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randint(-12, 5, shape, generator=generator)
    return acts.clamp(min=0).double()


def active_of(acts: torch.Tensor) -> ActiveLatents:
    """The nonzero activations of a dense tensor [token, layer, d_sae]."""
    token, layer, latent = acts.nonzero(as_tuple=True)
    value = acts[token, layer, latent].double()
    n_tokens, n_layers, d_sae = acts.shape
    return ActiveLatents(n_tokens, n_layers, d_sae, token, layer, latent, value)


def batch_of(
    acts: torch.Tensor,
    prompts: torch.Tensor | None = None,
    first_prompt: int = 0,
    kept: torch.Tensor | None = None,
) -> TokenBatch:
    """A batch of prompts; by default one prompt whose tokens all count."""
    if prompts is None:
        prompts = torch.arange(len(acts)).unsqueeze(0)
    if kept is None:
        kept = torch.ones_like(prompts, dtype=torch.bool)
    prompt, position = kept.nonzero(as_tuple=True)
    batch = TokenBatch(prompts, first_prompt, prompt, position, acts, None)
    batch.active = active_of(acts)
    return batch


def accumulate(accumulator: Any, batches: Iterable[TokenBatch]) -> Any:
    """Run an accumulator over batches and return its result."""
    for batch in batches:
        accumulator.update(batch)
    return accumulator.compute()


def split(acts: torch.Tensor, cuts: Sequence[int]) -> list[TokenBatch]:
    """Split the tokens into batches that end at these indices."""
    parts = acts.tensor_split(sorted(cuts))
    return [batch_of(part) for part in parts if len(part)]


cuts_of_twelve = st.lists(st.integers(0, 12), max_size=4)
seeds = st.integers(0, 2**32)
