"""Interventions. References: explicit hooks on whole passes, autograd, brute force."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, tiny_model
from sae_lens.saes.sae import SAEMetadata
from saes import random_lens, random_sae
from test_walk import block_names, bridge_of, random_model
from torch import Tensor

from sae_lens_multilayer.studies.interventions import (
    LatentEdit,
    ablate,
    run_edits,
    scale,
    steer,
)

N_LAYERS, N_POS = 4, 8
KINDS = ["HookedTransformer", "Hugging Face", "bridge"]


@pytest.fixture
def make_case(tokenizer, tmp_path):
    """A float64 model with four layers and its SAE, whose names of hooks differ."""

    def make(kind: str, lens: bool = False) -> tuple[Any, Any]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
        if kind == "HookedTransformer":
            model: Any = tiny_model(tokenizer, n_layers=N_LAYERS, d_model=32)
        elif kind == "bridge":
            model = bridge_of("Llama", tokenizer, tmp_path)
        else:
            model = random_model("GPTNeoX")
            names = block_names(model.model)
        metadata = SAEMetadata(hook_names=names)
        sae = random_sae(d_in=32, d_sae=48, k=6, metadata=metadata, dtype="float64")
        if lens:
            changes = {"n_layers": N_LAYERS, "d_in": 32, "dtype": torch.float64}
            sae.lens = random_lens(names, alignment="reference", **changes)
        return sae, model.double()

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, D_VOCAB, (2, N_POS))


def by_dense_decoding(
    sae: Any, edit: LatentEdit, layer: int, mask: Tensor, x: Tensor
) -> Tensor:
    """The difference of two reconstructions, added where `mask` is true."""
    acts = sae.encode(x, hook=layer)
    same = sae.decode(acts, hook=layer)
    acts = sae.encode(x, hook=layer)
    own = acts[..., list(edit.latents)]
    after = {"scale": own * edit.value, "add": own + edit.value}[edit.kind]
    acts[..., list(edit.latents)] = after
    changed = x + sae.decode(acts, hook=layer) - same
    return torch.where(mask.unsqueeze(-1), changed, x)


@torch.no_grad()
def with_hooks(sae: Any, model: Any, tokens: Tensor, edit: LatentEdit, mask: Tensor):
    """Logits, and vectors after each layer, with the hooks of the host."""
    found: dict[str, Tensor] = {}

    def replace(layer: int, name: str, x: Tensor) -> Tensor:
        if layer in edit.layers:
            x = by_dense_decoding(sae, edit, layer, mask, x)
        found[name] = x
        return x

    def hook(layer: int, name: str, _: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (replace(layer, name, output[0]), *output[1:])
        return replace(layer, name, output)

    names = sae.cfg.metadata.hook_names
    if hasattr(model, "run_with_hooks") and names[0].startswith("blocks"):
        own = [name.replace("resid_post", "out") for name in names]
        own = names if names[0] in model.hook_dict else own
        hooks = [
            (point, lambda x, hook, i=i: replace(i, names[i], x))
            for i, point in enumerate(own)
        ]
        return model.run_with_hooks(tokens, fwd_hooks=hooks), found
    modules = dict(model.model.named_modules())
    with ExitStack() as stack:
        for i, name in enumerate(names):
            handle = modules[name].register_forward_hook(partial(hook, i, name))
            stack.callback(handle.remove)
        return model.model(tokens).logits, found


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_equal_explicit_hooks(kind, lens, make_case, tokens):
    sae, model = make_case(kind, lens)
    nothing = LatentEdit("scale", [], [])
    clean, vectors = with_hooks(sae, model, tokens, nothing, tokens < 0)
    names = sae.cfg.metadata.hook_names
    usual = sae.encode(vectors[names[1]], hook=1).sum((0, 1)).topk(3).indices.tolist()
    edits = [
        LatentEdit("scale", [1], usual),
        LatentEdit("scale", [1, 2], usual, 2.5, slice(1, None)),
        LatentEdit("scale", [1], usual[:1], -1.0, tokens % 2 == 0),
        LatentEdit("add", [0, 3], [1, 4], 3.0, [-1]),
    ]
    runs = run_edits(sae, model, tokens, edits)
    for run, edit in zip(runs, edits, strict=True):
        mask = edit.mask(tokens.shape)
        logits, vectors = with_hooks(sae, model, tokens, edit, mask)
        torch.testing.assert_close(run.clean_logits, clean, rtol=0, atol=1e-6)
        torch.testing.assert_close(run.logits, logits, rtol=0, atol=1e-6)
        assert list(run.vectors) == names[edit.layers[0] :]
        for name, x in run.vectors.items():
            torch.testing.assert_close(x, vectors[name], rtol=0, atol=1e-6)
        assert (run.logits - clean).abs().max() > 1e-2
        first = run.clean_vectors[names[edit.layers[0]]]
        hits = sae.encode(first, hook=edit.layers[0])[..., list(edit.latents)] > 0
        if len(edit.layers) == 1:
            rate = hits[mask].double().mean(0)
            torch.testing.assert_close(run.hit_rate.double(), rate)


@torch.no_grad()
def test_ablate_scale_and_steer_are_one_edit_each(make_case, tokens):
    sae, model = make_case("HookedTransformer")
    x = run_edits(sae, model, tokens, [LatentEdit("add", [2], [0])])[0].clean_vectors
    latent = int(sae.encode(x["blocks.2.hook_resid_post"], 2).sum((0, 1)).argmax())
    where = [latent], ["blocks.2.hook_resid_post"]
    none = ablate(sae, model, tokens, *where)
    torch.testing.assert_close(
        none.logits, scale(sae, model, tokens, 0.0, *where).logits
    )
    same = scale(sae, model, tokens, 1.0, *where)
    assert same.kl_div().abs().max() < 1e-6 < none.kl_div().max()
    before = none.clean_vectors["blocks.2.hook_resid_post"]
    steered = steer(sae, model, tokens, 2.0, *where).vectors
    std = before.std(-1, keepdim=True)
    torch.testing.assert_close(
        steered["blocks.2.hook_resid_post"] - before,
        2 * std * sae.W_dec[latent],
        rtol=1e-4,
        atol=1e-6,
    )


def test_bad_input(make_case, tokens):
    sae, model = make_case("HookedTransformer")
    with torch.no_grad():
        sae.W_enc[:, 7] = 0
        sae.W_dec[9] = sae.W_dec[7]
        sae.W_enc[:, 9] = 3 * sae.W_dec[9]
    call = sae, model, tokens
    with pytest.raises(ValueError, match=r"\[7\] never are.*nearest to 7 that is: 9"):
        ablate(*call, [7], [1])
    steer(*call, 1.0, [7], [1])
    with pytest.raises(ValueError, match="finite; got nan"):
        scale(*call, float("nan"), [9], [1])
    with pytest.raises(ValueError, match="5 is not a hook"):
        ablate(*call, [9], [5])
    with pytest.raises(ValueError, match=r"d_sae = 48.*got \[48\]"):
        steer(*call, 1.0, [48], [1])
    with pytest.raises(ValueError, match=r"positions.*tokens; got"):
        ablate(*call, [9], [1], [N_POS])
