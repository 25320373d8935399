"""Steer with one latent at a layer; ablate it at one layer and at all layers.

Uses the latent that is most active at the prompt's last token in the middle layer.
Steering adds its decoder direction to the residual stream there. Ablating sets its
activation to zero in views with the error term, so only the latent's own contribution
is removed. Run `python -m examples.steer FOLDER` with the demo's SAE.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.smollm2 import load_smollm2
from examples.splice_views import PROMPT, continuation


def main(folder: str) -> None:
    """Print continuations with steering, and the effect of ablation on predictions."""
    sae: Any = SAE.load_from_disk(folder)
    model: Any = load_smollm2(HookedSAETransformer)
    views = sae.views()
    view = views[len(views) // 2]
    tokens = model.to_tokens(PROMPT)
    latent, activation = strongest_latent(model, view, tokens)
    hook_name = view.cfg.metadata.hook_name
    print(f"latent {latent} at {hook_name}, activation {activation:.2f}")
    print(f"  untouched: {continuation(model)}")
    for scale in (2.0, -2.0):
        direction = scale * activation * input_scale(view) * view.W_dec[latent]
        with model.hooks(fwd_hooks=[(hook_name, partial(add, direction=direction))]):
            print(f"  {scale:+.0f} times:  {continuation(model)}")
    clean = model(tokens)
    for name, ablated in (("this layer", [view]), ("all layers", views)):
        logits = ablate(model, ablated, latent, tokens)
        print(f"  ablated at {name}: KL {last_token_kl(clean, logits):.4f} nats")


@torch.no_grad()
def strongest_latent(
    model: Any, view: SAE[Any], tokens: Int[Tensor, "prompt pos"]
) -> tuple[int, float]:
    """The most active latent at the last token, and its activation.

    The view then has the statistics of this vector, see `input_scale`.
    """
    hook_name = view.cfg.metadata.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=hook_name)
    activation, latent = view.encode(cache[hook_name][0, -1]).max(dim=-1)
    return int(latent), float(activation)


def input_scale(view: SAE[Any]) -> float:
    """Standard deviation of the last encoded vector, the unit of its activations."""
    return float(getattr(view, "ln_std", 1.0))


def add(
    x: Float[Tensor, "prompt pos d_in"], hook: Any, direction: Float[Tensor, " d_in"]
) -> Float[Tensor, "prompt pos d_in"]:
    """A hook function that adds a direction at every position."""
    del hook  # TransformerLens passes the hook point by this name
    return x + direction


@torch.no_grad()
def ablate(
    model: Any,
    views: Sequence[SAE[Any]],
    latent: int,
    tokens: Int[Tensor, "prompt pos"],
) -> Float[Tensor, "prompt pos d_vocab"]:
    """Logits with a latent set to zero in these views, all else unchanged."""

    def set_to_zero(acts: Tensor, hook: Any) -> Tensor:
        del hook  # TransformerLens passes the hook point by this name
        acts[..., latent] = 0
        return acts

    hooks = [
        (f"{view.cfg.metadata.hook_name}.hook_sae_acts_post", set_to_zero)
        for view in views
    ]
    with model.saes(saes=list(views), use_error_term=True):
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def last_token_kl(clean: Tensor, other: Tensor) -> float:
    """KL(clean || other) of the predictions after the last token, in nats."""
    p, q = (logits[0, -1].log_softmax(-1) for logits in (clean, other))
    return float((p.exp() * (p - q)).sum())


if __name__ == "__main__":
    main(sys.argv[1])
