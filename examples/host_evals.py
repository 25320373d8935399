"""Run SAELens' own evaluations on the views of three layers.

Each view has an ActivationsStore of its hook and is evaluated by `run_evals`. For a
published MLSAE the same is one command: `sae-lens-multilayer evals
mlsae-pythia-70m-deduped 'x64-k32/.*'`. Run `python -m examples.host_evals FOLDER` with
the demo's SAE.
"""

import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

import sae_lens_multilayer  # noqa: F401  (registers the architecture)
from examples.smollm2 import english_text, load_smollm2

_COLUMNS = {
    "reconstruction_quality": ["explained_variance"],
    "model_performance_preservation": ["ce_loss_score"],
    "model_behavior_preservation": ["kl_div_with_sae"],
    "sparsity": ["l0"],
}


def main(folder: str) -> None:
    """Print SAELens' metrics for the first, middle and last layer."""
    sae: Any = SAE.load_from_disk(folder)
    hook_names = sae.cfg.metadata.hook_names
    chosen = (hook_names[0], hook_names[len(hook_names) // 2], hook_names[-1])
    table = evaluate_views(
        [sae.view(name) for name in chosen], load_smollm2(), english_text("test")
    )
    print(table.to_string(float_format="%.4f"))


def evaluate_views(
    views: Sequence[SAE[Any]],
    model: Any,
    dataset: Dataset,
    context_size: int | None = None,
) -> pd.DataFrame:
    """Some of SAELens' metrics, one row per view.

    `context_size` of None is that of the SAE.
    """
    config = get_eval_everything_config(
        batch_size_prompts=4,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
    )
    rows: dict[str, dict[str, float]] = {}
    for view in views:
        store = ActivationsStore.from_sae(
            model,
            view,
            dataset,
            context_size=context_size,
            streaming=False,
            store_batch_size_prompts=4,
        )
        metrics, _ = run_evals(view, store, model, ActivationScaler(), config)
        rows[store.hook_name] = {
            name: metrics[group][name]
            for group, names in _COLUMNS.items()
            for name in names
        }
    return pd.DataFrame.from_dict(rows, orient="index")


if __name__ == "__main__":
    main(sys.argv[1])
