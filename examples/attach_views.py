"""How does the model's loss change if several layers are replaced by reconstructions?

Attaches views at several layers to a HookedSAETransformer and to a
SAETransformerBridge, with and without the error term (the difference between vectors
and reconstructions). Run `python -m examples.attach_views FOLDER` with the demo's SAE.
"""

import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.smollm2 import held_out_prompts, load_smollm2, smollm2_folder


def main(folder: str) -> None:
    """Print the cross-entropy of both models with zero to four views."""
    sae: Any = SAE.load_from_disk(folder)
    n_layers = len(sae.cfg.metadata.hook_names)
    hooked: Any = load_smollm2(HookedSAETransformer)
    bridge: Any = SAETransformerBridge.boot_transformers(str(smollm2_folder()))
    tokens = held_out_prompts(hooked, n_prompts=2)
    views = [sae.view(layer) for layer in range(0, n_layers, -(-n_layers // 4))]
    for model in (hooked, bridge):
        print(f"{type(model).__name__}: cross-entropy, nats per predicted token")
        print(loss_by_views(model, views, tokens).to_string(float_format="%.4f"))


def loss_by_views(
    model: Any, views: Sequence[SAE[Any]], tokens: Int[Tensor, "prompt pos"]
) -> pd.DataFrame:
    """Cross-entropy with the first n views attached, one row for each n."""
    rows: list[dict[str, float]] = []
    with torch.no_grad():
        for n in range(len(views) + 1):
            some = list(views[:n])
            spliced = model.run_with_saes(tokens, saes=some, return_type="loss")
            restored = model.run_with_saes(
                tokens, saes=some, use_error_term=True, return_type="loss"
            )
            rows.append({"spliced": float(spliced), "with error term": float(restored)})
    return pd.DataFrame(rows).rename_axis("views")


if __name__ == "__main__":
    main(sys.argv[1])
