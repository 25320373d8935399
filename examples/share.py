"""Share an SAE on the Hugging Face hub and load it again.

Uses SAELens' upload and `SAE.from_pretrained` for the whole SAE and for the view of one
hook, which loads with SAELens alone. Run `python -m examples.share FOLDER` with the
demo's SAE; a local folder replaces the hub (`examples.local_hub`).
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, upload_saes_to_huggingface

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.local_hub import local_hub

REPOSITORY = "you/your-mlsae"


def main(folder: str) -> None:
    """Print the uploaded SAEs and the largest difference of outputs after download."""
    sae: Any = SAE.load_from_disk(folder)
    with tempfile.TemporaryDirectory() as cache, local_hub(Path(cache)):
        for sae_id, loaded in share(sae, layer=0).items():
            x = torch.randn(64, sae.cfg.d_in)
            with torch.no_grad():
                difference = (loaded(x) - sae(x)).abs().max()
            print(f"{REPOSITORY} {sae_id}: {type(loaded).__name__}, {difference:.1e}")


def share(sae: Any, layer: int) -> dict[str, SAE[Any]]:
    """Upload an SAE and one of its views, and download both again."""
    view = sae.view(layer)
    saes = {"all": sae, f"all/{view.cfg.metadata.hook_name}": view}
    upload_saes_to_huggingface(saes, REPOSITORY, show_progress=False)
    return {sae_id: SAE.from_pretrained(REPOSITORY, sae_id) for sae_id in saes}


if __name__ == "__main__":
    main(sys.argv[1])
