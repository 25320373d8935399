# %% [markdown]
# # Train an MLSAE and look at it
#
# One SAE for all 30 blocks of SmolLM2-135M, on text that comes with Python. No GPU and
# no model hub are needed. Run it from a copy of the repository, after `make setup`.

# %%
# %matplotlib inline
import os

from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig

from examples.smollm2 import english_text, held_out_prompts, load_smollm2
from sae_lens_multilayer import (
    MultiLayerConfig,
    MultiLayerTrainingSAEConfig,
    evaluate,
)
from sae_lens_multilayer.analysis import Suite, layer_distributions
from sae_lens_multilayer.pictures import draw

N_TOKENS = int(os.environ.get("TUTORIAL_TOKENS", 8_000))
FOLDER = os.environ.get("TUTORIAL_FOLDER", "outputs/tutorials")
model = load_smollm2()
model.cfg.n_layers, model.cfg.d_model

# %% [markdown]
# ## Train
#
# The paper's recipe with 8 x 576 = 4,608 latents, of which 32 are active for each
# vector. As the run is short, the learning rate is higher than the default, and a
# latent counts as dead after a quarter of the run. Each token gives 30 vectors.

# %%
d_in = model.cfg.d_model
cfg = MultiLayerConfig(
    sae=MultiLayerTrainingSAEConfig(
        d_in=d_in, d_sae=8 * d_in, k=32, dead_after_tokens=N_TOKENS // 4
    ),
    model_name="SmolLM2-135M-Instruct",
    model_from_pretrained_kwargs={},
    context_size=128,
    training_tokens=N_TOKENS,
    train_batch_size_tokens=128,
    store_batch_size_prompts=8,
    n_batches_in_buffer=min(32, N_TOKENS // 256),
    exclude_special_tokens=True,
    lr=1e-3,
    lr_decay_steps=N_TOKENS // 128 // 5,
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path=f"{FOLDER}/sae",
    verbose=False,
)
sae = LanguageModelSAETrainingRunner(
    cfg, override_dataset=english_text("train"), override_model=model
).run()

# %% [markdown]
# ## Evaluate on held-out text
#
# The vectors of one layer at a time are replaced by their reconstructions. The first
# position is left out: its vectors are many times longer than the others and would
# dominate the averages.

# %%
tokens = held_out_prompts(model, n_prompts=max(4, N_TOKENS // 500))
metrics = evaluate(
    sae, model, tokens[: max(1, N_TOKENS // 2_000)], exclude_positions=[0]
)
table = metrics.to_dataframe()[["fvu", "l0", "delta_ce", "kl_div", "silent_fraction"]]
table.set_axis(range(30)).rename_axis("layer").round(3).iloc[::5]

# %%
draw(metrics)

# %% [markdown]
# `fvu` is the fraction of variance that the SAE leaves unexplained; `delta_ce` is the
# increase of the model's loss, in nats. [The concepts](../concepts.md) define them.
# Both fall with more tokens of training: 8,000 are enough to look around, not for
# research.
#
# ## At which layers are latents active?

# %%
dists = layer_distributions(sae, model, tokens, exclude_positions=[0])
draw(dists)

# %% [markdown]
# A column is a latent, sorted by mean layer: above, the share of its activation at each
# layer; below, the share of tokens at which it is active there. Latents right of the
# dashed line have two modes, often because they were active at few tokens.
#
# How much of the spread over layers is within a single latent, and how much within a
# single token? See [the concepts](../concepts.md#the-variance-over-layers).

# %%
suite = Suite(sae, model, tokens, exclude_positions=[0])
results = suite.run(["variances", "max_activating_examples"])
results["variances"].summary[["latent_ratio", "token_ratio"]].round(2)

# %% [markdown]
# ## Look at a latent
#
# Of the ten most active latents that are active at less than 5% of the tokens of every
# layer, the one that is active at the most layers, with the ends of the texts at which
# it is most active:

# %%
is_sparse = dists.frequency.amax(0) < 0.05
n_layers = (dists.counts > 0).sum(0)
active = dists.most_active(sae.cfg.d_sae)
latent = max(active[is_sparse[active]][:10].tolist(), key=lambda j: n_layers[j])
examples = results["max_activating_examples"].of(latent).to_dataframe(model.tokenizer)
best = examples.sort_values("act", ascending=False)
best = best.drop_duplicates(["prompt", "position"]).head(8)
best["text"] = [
    "".join(text[: i + 1])[-45:]
    for text, i in zip(best.context_tokens, best.context_index, strict=True)
]
best[["layer", "act", "text"]].round(2)

# %% [markdown]
# The SAE is saved: `SAE.load_from_disk` loads it, and the [command line](../cli.md)
# evaluates and reports on it. [The next tutorial](steer.md) steers with its latents.
