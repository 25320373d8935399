"""Write the files of some latents that Neuronpedia takes, one folder for each view.

Neuronpedia imports SAEDashboard's output: for each SAE a folder with `batch-0.json`,
..., and `run_settings.json`, which a script of neuronpedia-utils converts for the
upload (`convert-saedashboard-to-neuronpedia-export.py`, option
`--saedashboard-output-dir`). All folders have the same latents and set name, so that a
latent has the same number at every layer. SAEDashboard pins older libraries, so `make
neighbours` installs it separately. Run `python -m examples.neuronpedia FOLDER` with the
demo's SAE; the folders are FOLDER/neuronpedia/LAYER-SET.
"""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import SAE, HookedSAETransformer
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.dashboard import most_active_latents
from examples.smollm2 import MODEL_NAME, held_out_prompts, load_smollm2


def main(folder: str) -> None:
    """Write the files of five latents at three layers."""
    if find_spec("sae_dashboard") is None:
        sys.exit("SAEDashboard is not installed: `make neighbours` installs it.")
    sae: Any = SAE.load_from_disk(folder)
    model: Any = load_smollm2(HookedSAETransformer)
    tokens = held_out_prompts(model, n_prompts=16)
    views = sae.views()
    latents = most_active_latents(model, views[len(views) // 2], tokens[:4], 5)
    for view in views[:: len(views) // 3 or 1][:3]:
        bundle = write_bundle(
            view, model, tokens, latents, Path(folder) / "neuronpedia", "res-mlsae"
        )
        size = sum(file.stat().st_size for file in bundle.iterdir())
        print(f"{bundle}: latents {latents}, {size / 1e3:.0f} kB")


def write_bundle(
    view: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    latents: Sequence[int],
    folder: Path,
    set_name: str,
    model_id: str = MODEL_NAME.lower(),
    dataset_path: str = "",
) -> Path:
    """Write SAEDashboard's Neuronpedia output for one view.

    Args:
        folder: Where the view's folder is made, named `LAYER-SET`.
        set_name: Neuronpedia's name of the set of SAEs, one for each layer.
        model_id: Neuronpedia's name of the model.
        dataset_path: The text's name on the hub, which Neuronpedia shows.
    """
    # Installed separately.
    from sae_dashboard import (  # pyright: ignore[reportMissingImports]
        sae_vis_data,
        sae_vis_runner,
    )
    from sae_dashboard.neuronpedia import (  # pyright: ignore[reportMissingImports]
        neuronpedia_converter,
        neuronpedia_runner_config,
    )

    hook_name = str(view.cfg.metadata.hook_name)
    layer = extract_layer_from_tlens_hook_name(hook_name)
    bundle = folder / f"{layer}-{set_name}"
    bundle.mkdir(parents=True)
    settings = neuronpedia_runner_config.NeuronpediaRunnerConfig(
        sae_set=set_name,
        sae_path=hook_name,
        outputs_dir=str(bundle),
        huggingface_dataset_path=dataset_path,
        n_prompts_total=tokens.shape[0],
        n_tokens_in_prompt=tokens.shape[1],
        model_id=model_id,
        layer=layer,
    )
    config = sae_vis_data.SaeVisConfig(
        hook_point=hook_name,
        features=list(latents),
        minibatch_size_features=len(latents),
        minibatch_size_tokens=16,
        device=str(view.device),
    )
    data = sae_vis_runner.SaeVisRunner(config).run(
        encoder=view, model=model, tokens=tokens
    )
    ids = range(model.cfg.d_vocab)
    texts = dict(enumerate(model.tokenizer.batch_decode([[i] for i in ids])))
    convert = neuronpedia_converter.NeuronpediaConverter.convert_to_np_json
    (bundle / "batch-0.json").write_text(convert(model, data, settings, texts))
    (bundle / "run_settings.json").write_text(json.dumps(vars(settings), indent=4))
    return bundle


if __name__ == "__main__":
    main(sys.argv[1])
