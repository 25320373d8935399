"""Steer with one latent at a layer; ablate it at one layer and at all layers.

Uses the latent that is most active at the prompt's last token in the middle layer.
Steering adds to its activation there; ablating sets the activation to zero. Both keep
the error term, so only the latent's own contribution changes. Run
`python -m examples.steer FOLDER` with the demo's SAE.
"""

import sys
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor

from examples.smollm2 import load_smollm2
from examples.splice_views import PROMPT, continuation
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.studies.interventions import LatentEdit, ablate, steer


def main(folder: str) -> None:
    """Print continuations with steering, and the effect of edits on predictions."""
    sae: Any = SAE.load_from_disk(folder)
    model: Any = load_smollm2(HookedSAETransformer)
    hook_names = sae.cfg.metadata.hook_names
    hook_name = hook_names[len(hook_names) // 2]
    tokens = model.to_tokens(PROMPT)
    latent, activation = strongest_latent(sae, model, tokens, hook_name)
    print(f"latent {latent} at {hook_name}, activation {activation:.2f}")
    print(f"  untouched: {continuation(model)}")
    for factor in (2.0, -2.0):
        edit = LatentEdit("add", [hook_name], [latent], factor * activation)
        print(f"  {factor:+.0f} times:  {steered_continuation(model, sae, edit)}")
        run = steer(sae, model, tokens, edit.value, [latent], [hook_name])
        print(f"    KL {float(run.kl_div()[0, -1]):.4f} nats")
    for name, layers in (("this layer", [hook_name]), ("all layers", hook_names)):
        run = ablate(sae, model, tokens, [latent], layers)
        print(f"  ablated at {name}: KL {float(run.kl_div()[0, -1]):.4f} nats")


@torch.no_grad()
def strongest_latent(
    sae: Any, model: Any, tokens: Int[Tensor, "prompt pos"], hook_name: str
) -> tuple[int, float]:
    """The most active latent at the last token of the first prompt; its activation."""
    _, cache = model.run_with_cache(tokens, names_filter=hook_name)
    activation, latent = sae.encode(cache[hook_name][0, -1], hook_name).max(dim=-1)
    return int(latent), float(activation)


def steered_continuation(
    model: Any, sae: Any, edit: LatentEdit, prompt: str = PROMPT
) -> str:
    """The model's continuation with an edit of all positions, also of new ones."""
    encoder = LayerEncoder(sae)
    hooks = [
        (encoder.hook_names[i], lambda x, hook, replace=replace: replace(x))
        for i, replace in edit.replacements(encoder).items()
    ]
    with model.hooks(fwd_hooks=hooks):
        return continuation(model, prompt)


if __name__ == "__main__":
    main(sys.argv[1])
