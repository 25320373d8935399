"""Generate text with three layers of the model replaced by reconstructions.

Run `python -m examples.splice_views FOLDER` with the folder of the demo's SAE.
"""

import sys
from typing import Any

import torch
from sae_lens import SAE, HookedSAETransformer

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.smollm2 import load_smollm2

PROMPT = "The capital of France is"
N_NEW_TOKENS = 16


def main(folder: str) -> None:
    """Print the model's continuation of a prompt with and without views."""
    sae: Any = SAE.load_from_disk(folder)
    model: Any = load_smollm2(HookedSAETransformer)
    hook_names = sae.cfg.metadata.hook_names
    middle = len(hook_names) // 2
    chosen = [hook_names[i] for i in (0, middle, len(hook_names) - 1)]
    print(f"SAE.load_from_disk: {type(sae).__name__}, k={sae.cfg.k}, {chosen}")
    print(f"  prompt:        {PROMPT}")
    print(f"  without views: {continuation(model)}")
    with model.saes(saes=[sae.view(name) for name in chosen]):
        print(f"  with views:    {continuation(model)}")


def continuation(model: Any, prompt: str = PROMPT) -> str:
    """The model's greedy continuation of a prompt, on one line."""
    tokens = model.to_tokens(prompt)
    with torch.no_grad():
        output = model.generate(
            tokens, max_new_tokens=N_NEW_TOKENS, do_sample=False, verbose=False
        )
    return repr(model.to_string(output[0, tokens.shape[1] :]))


if __name__ == "__main__":
    main(sys.argv[1])
