# %% [markdown]
# # Load a published checkpoint and draw the paper's figures
#
# `SAE.from_pretrained` loads the paper's checkpoints from the Hugging Face hub. To run
# offline, this tutorial puts a small checkpoint into a local folder that stands in for
# the hub: its files were written by the paper's code, for a language model of 5 blocks
# and width 64 that was trained on a Markov chain. With the real hub, leave out the
# first cell and name a real model.

# %%
# %matplotlib inline
import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save

from examples.local_hub import local_hub, put

PAPER = Path("tests/data/paper")
config = json.loads((PAPER / "published" / "mlsae.json").read_text())
tensors = load_file(PAPER / "plain.safetensors")
names = "encoder.weight", "decoder.weight", "pre_encoder_bias"
files = {
    "config.json": json.dumps(config).encode(),
    "model.safetensors": save({name: tensors[name] for name in names}),
}
hub = tempfile.TemporaryDirectory()
snapshot = put(Path(hub.name), "tim-lawson/mlsae-tiny-x8-k8", files)

# %% [markdown]
# ## Load
#
# With the real hub: `SAE.from_pretrained("mlsae-pythia-70m-deduped", "x64-k32")`.

# %%
from functools import partial

from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from sae_lens_multilayer import mlsae_huggingface_loader

MODEL = str(PAPER / "model")
with local_hub(Path(hub.name)):
    sae = SAE.from_pretrained(
        "tim-lawson/mlsae-tiny-x8-k8",
        "",
        converter=partial(mlsae_huggingface_loader, model_name=MODEL),
    )
type(sae).__name__, sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k, len(sae.views())

# %% [markdown]
# ## At which layers are the latents active, over many tokens?
#
# The model has a word-level tokenizer; its text here is four prompts of 64 tokens.

# %%
from sae_lens_multilayer.analysis import (
    layer_distributions,
    prompt_acts,
    variances,
)
from sae_lens_multilayer.pictures import draw

model = SAETransformerBridge.boot_transformers(MODEL)
tokens = load_file(PAPER / "activations.safetensors")["tokens"]
dists = layer_distributions(sae, model, tokens)
draw(dists)

# %% [markdown]
# ## And for one prompt?
#
# The paper shows single prompts too. Here is the latent with the largest sum of
# activations, at each token and layer of the first prompt:

# %%
acts = prompt_acts(sae, model, tokens[:1, :24])
draw(acts.pictures(text_of=lambda i: model.tokenizer.decode([i]))[""])

# %% [markdown]
# ## The decomposition of the variance
#
# See [the concepts](../concepts.md#the-variance-over-layers). Columns that begin with
# `reference_` are the estimates of the paper's code.

# %%
summary = variances(sae, model, tokens).summary
summary.round(3)
