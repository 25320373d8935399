# %% [markdown]
# # Find, inspect and steer a multi-layer latent
#
# This tutorial uses the SAE of [Train and look](train_and_look.md), so run that first.

# %%
# %matplotlib inline
import os

import pandas as pd
import torch
from sae_lens import SAE, HookedSAETransformer

from examples.smollm2 import held_out_prompts, load_smollm2
from examples.splice_views import continuation
from examples.steer import steered_continuation
from sae_lens_multilayer.analysis import Suite, prompt_acts
from sae_lens_multilayer.pictures import draw
from sae_lens_multilayer.studies.interventions import (
    EditedRun,
    LatentEdit,
    ablate,
    run_edits,
)

FOLDER = os.environ.get("TUTORIAL_FOLDER", "outputs/tutorials")
N_TOKENS = int(os.environ.get("TUTORIAL_TOKENS", 8_000))
sae = SAE.load_from_disk(f"{FOLDER}/sae")
model = load_smollm2(HookedSAETransformer)
tokens = held_out_prompts(model, max(2, N_TOKENS // 2_000))

# %% [markdown]
# ## Find
#
# Latents that are active at many layers but at few tokens are candidates for a concept
# that the model carries through its layers. The effective number of layers is the
# exponential of the entropy of `P(layer | latent)`: 1 if a latent is active at one
# layer, 30 if equally at all. The table has latents that are active in less than 2% of
# all vectors, with the largest products of this number and the mean activation, and the
# ends of the texts at which they are most active.

# %%
suite = Suite(sae, model, tokens, exclude_positions=[0])
results = suite.run(["layer_distributions", "max_activating_examples"])
dists, examples = results["layer_distributions"], results["max_activating_examples"]


def best_examples(latent: int) -> pd.DataFrame:
    """The tokens at which a latent is most active, at the layer of its maximum."""
    table = examples.of(latent).to_dataframe(model.tokenizer)
    table = table.sort_values("act", ascending=False)
    table = table.drop_duplicates(["prompt", "position"])
    pairs = zip(table.context_tokens, table.context_index, strict=True)
    table["text"] = ["".join(text[: i + 1])[-45:] for text, i in pairs]
    return table[["prompt", "position", "layer", "act", "text"]]


table = dists.to_dataframe()
table["layers"] = torch.special.entr(dists.probs).sum(0).exp().numpy()
n_vectors = dists.n_tokens * len(dists.hook_names)
rare = table[table["count"].between(20, 0.02 * n_vectors)]
rare = rare.iloc[(-rare.layers * rare.mean_act).argsort()].head(8)
rare["text"] = [best_examples(j).text.iloc[0] for j in rare.index]
rare[["layers", "count", "mean_act", "mean_layer", "text"]].round(2)

# %% [markdown]
# ## Inspect
#
# Take the one of them that is active at the most layers. Where is it most active?

# %%
latent = int(rare.layers.idxmax())
best = best_examples(latent)
best.head(8).round(2)

# %% [markdown]
# At each layer and token of the end of its best prompt, run after a BOS token:

# %%
prompt, position = int(best.prompt.iloc[0]), int(best.position.iloc[0])
part = tokens[[prompt], max(1, position - 40) : position + 8]
acts = prompt_acts(sae, model, torch.cat([tokens[:1, :1], part], dim=1))
draw(acts.pictures(latent=latent, text_of=lambda i: model.tokenizer.decode([i]))[""])

# %% [markdown]
# ## Steer
#
# Add twice the latent's largest activation at one layer, at every token of a prompt
# that has nothing to do with it, and read the model's next prediction: how far it moved
# (KL in nats), and which tokens gain the most log probability. Another latent of the
# table, with the same addition, is a control: what any large change does, both do.

# %%
PROMPT = "The function returns"
PEAK = float(best.act.iloc[0])
control = next(j for j in rare.index if j != latent)


def gaining_tokens(run: EditedRun) -> str:
    """The tokens whose log probability rises the most in the last prediction."""
    logits = torch.stack([run.logits, run.clean_logits])[:, 0, -1]
    after, before = logits.log_softmax(-1)
    ids = (after - before).topk(6).indices.tolist()
    return " ".join(repr(model.tokenizer.decode([i])) for i in ids)


edits = [
    LatentEdit("add", [layer], [j], 2 * PEAK)
    for j in (latent, control)
    for layer in (4, 9, 15, 22)
]
runs = run_edits(sae, model, model.to_tokens(PROMPT), edits)
rows = [
    (
        *run.edit.latents,
        *run.edit.layers,
        float(run.kl_div()[0, -1]),
        gaining_tokens(run),
    )
    for run in runs
]
pd.options.display.max_colwidth = 100
table = pd.DataFrame(rows, columns=["latent", "layer", "KL", "tokens that gain"])
table.set_index(["latent", "layer"]).round(2)

# %% [markdown]
# The latent of an open brace makes closing brackets and quotes more likely at all four
# layers; the control does not. Other latents of the table are less clear than this one.
#
# In the continuation, stronger steering ends in text that is no longer English:

# %%
lines = [f"untouched: {continuation(model, PROMPT)}"]
for factor in (1, 2, 4):
    edit = LatentEdit("add", [9], [latent], factor * PEAK)
    steered = steered_continuation(model, sae, edit, PROMPT)
    lines.append(f"{factor} x peak:  {steered}")
print("\n".join(lines))

# %% [markdown]
# ## Ablate, at one layer and at all
#
# Set the latent to zero at its best token, at the layer of its maximum or at all
# layers, and read the prediction there. The error of the reconstruction is kept, so
# nothing else changes.

# %%
text = tokens[prompt : prompt + 1, : position + 1]
layers = {"its best": [int(best.layer.iloc[0])], "all": [*range(30)]}
runs = {k: ablate(sae, model, text, [latent], v, [position]) for k, v in layers.items()}
pd.Series({name: float(run.kl_div()[0, -1]) for name, run in runs.items()}, name="KL")

# %% [markdown]
# A vector has 32 active latents, of which this is one, and this SAE has seen 8,000
# tokens. For effects of many latents with controls, see
# [Interventions](../how-to/analyse.md#interventions).
