# %% [markdown]
# # Compare settings with a sweep
#
# How do the sparsity and the number of latents change the errors, and the share of the
# variance over layers that lies within a token? Four SAEs of four layers of SmolLM2,
# each trained, evaluated and analysed. Run the last cell again after an interruption:
# finished SAEs are kept.

# %%
# %matplotlib inline
import os

from examples.smollm2 import english_text, load_smollm2
from sae_lens_multilayer import SweepEvaluation, grid, sweep
from sae_lens_multilayer.pictures import describe_sweep, draw

N_TOKENS = int(os.environ.get("TUTORIAL_TOKENS", 8_000)) // 2
FOLDER = os.environ.get("TUTORIAL_FOLDER", "outputs/tutorials")
model = load_smollm2()
base = {
    "model_name": "SmolLM2-135M-Instruct",
    "context_size": 128,
    "training_tokens": N_TOKENS,
    "train_batch_size_tokens": 128,
    "store_batch_size_prompts": 8,
    "n_batches_in_buffer": min(32, max(1, N_TOKENS // 256)),
    "layers": [0, 5, 10, 15],
    "lr": 1e-3,
    "exclude_special_tokens": True,
    "sae": {"dead_after_tokens": N_TOKENS // 4},
    "logger": {"log_to_wandb": False},
    "verbose": False,
}

# %%
table = sweep(
    base,
    grid(expansion_factor=[2, 8], k=[16, 32]),
    f"{FOLDER}/sweep",
    evaluation=SweepEvaluation(n_tokens=max(256, N_TOKENS // 8)),
    override_model=model,
    override_dataset=english_text("train"),
    override_evaluation_dataset=english_text("test"),
)
table[["fvu", "delta_ce", "token_ratio", "training_seconds"]].round(3)

# %%
draw(describe_sweep(table, ["expansion_factor", "k"]))

# %% [markdown]
# Each SAE is in its own folder, with its results. On the command line the same is a
# file with `base`, `evaluation` and `grid`: see [Sweep settings](../how-to/sweep.md).
