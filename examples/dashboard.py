"""Write SAEDashboard's page for some latents of one view.

SAEDashboard pins older libraries, so `make neighbours` installs it separately. Run
`python -m examples.dashboard FOLDER` with the demo's SAE; the page is
FOLDER/dashboard.html.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.smollm2 import held_out_prompts, load_smollm2


def main(folder: str) -> None:
    """Write the page of five latents that are active at the middle layer."""
    if find_spec("sae_dashboard") is None:
        sys.exit("SAEDashboard is not installed: `make neighbours` installs it.")
    sae: Any = SAE.load_from_disk(folder)
    model: Any = load_smollm2(HookedSAETransformer)
    tokens = held_out_prompts(model, n_prompts=16)
    views = sae.views()
    view = views[len(views) // 2]
    latents = most_active_latents(model, view, tokens[:4], n_latents=5)
    page = write_dashboard(
        view, model, tokens, latents, Path(folder) / "dashboard.html"
    )
    print(f"{page}: latents {latents}, {page.stat().st_size / 1e6:.1f} MB")


def most_active_latents(
    model: Any, view: SAE[Any], tokens: Int[Tensor, "prompt pos"], n_latents: int
) -> list[int]:
    """The latents that are active for the most tokens."""
    hook_name = view.cfg.metadata.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=hook_name)
    counts = (view.encode(cache[hook_name]) > 0).flatten(0, -2).sum(0)
    return counts.topk(n_latents).indices.tolist()


def write_dashboard(
    view: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    latents: Sequence[int],
    path: Path,
) -> Path:
    """Write a page with the activations of these latents on these prompts."""
    # Installed separately.
    from sae_dashboard import (  # pyright: ignore[reportMissingImports]
        data_writing_fns,
        sae_vis_data,
        sae_vis_runner,
    )

    config = sae_vis_data.SaeVisConfig(
        hook_point=view.cfg.metadata.hook_name,
        features=list(latents),
        minibatch_size_features=len(latents),
        minibatch_size_tokens=16,
        device=str(view.device),
    )
    runner = sae_vis_runner.SaeVisRunner(config)
    data = runner.run(encoder=view, model=model, tokens=tokens)
    data.model = model  # Its tokenizer gives the texts of tokens on the page.
    data_writing_fns.save_feature_centric_vis(data, path)
    return path


if __name__ == "__main__":
    main(sys.argv[1])
