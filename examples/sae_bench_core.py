"""Run sae-bench's core evaluation on the view of the middle layer.

sae-bench pins older libraries, so `make neighbours` installs it separately. Run
`python -m examples.sae_bench_core FOLDER` with the demo's SAE.
"""

import sys
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from sae_lens import SAE, ActivationsStore

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.smollm2 import MODEL_NAME, english_text, load_smollm2


def main(folder: str) -> None:
    """Print sae-bench's core metrics of one view."""
    if find_spec("sae_bench") is None:
        sys.exit("sae-bench is not installed: `make neighbours` installs it.")
    sae: Any = SAE.load_from_disk(folder)
    views = sae.views()
    view = views[len(views) // 2]
    metrics = core_metrics(view, load_smollm2(), english_text("test"))
    print(f"sae-bench core, {MODEL_NAME}, {view.cfg.metadata.hook_name}")
    for name, value in metrics.items():
        print(f"  {name:32}{value:10.4f}")


def core_metrics(
    view: SAE[Any], model: Any, dataset: Dataset, context_size: int | None = None
) -> dict[str, float]:
    """sae-bench's core metrics; a context size of None is the SAE's own."""
    # Installed separately.
    from sae_bench.evals.core import (  # pyright: ignore[reportMissingImports]
        eval_config,
        main,
    )
    from sae_bench.sae_bench_utils import (  # pyright: ignore[reportMissingImports]
        general_utils,
    )

    # Adds to the config the fields that sae-bench reads.
    general_utils.load_and_format_sae("custom", view, str(view.device))
    store = ActivationsStore.from_sae(
        model,
        view,
        dataset,
        context_size=context_size,
        streaming=False,
        store_batch_size_prompts=4,
    )
    config = eval_config.CoreEvalConfig(
        model_name=str(view.cfg.metadata.model_name),
        batch_size_prompts=4,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, _ = main.run_evals(view, store, model, config)
    return {name: value for group in metrics.values() for name, value in group.items()}


if __name__ == "__main__":
    main(sys.argv[1])
