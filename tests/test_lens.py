"""Reference: tuned-lens' own objects and files, and the numbers of the paper's code.

Fitting is checked against what it promises: KL to the model's output on held-out text.
"""

import copy
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import PAPER_DATA, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.load_model import load_model
from saes import random_sae
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from tuned_lens import TunedLens
from tuned_lens.nn.unembed import Unembed

from sae_lens_multilayer.lens import fit as lens_fit
from sae_lens_multilayer.lens import progress
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.fit import fit_tuned_lens, lens_kl, new_tuned_lens
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import ModelShape

FOLDER = str(PAPER_DATA / "model")
BLOCKS, D_IN = 5, 64
PRE = [f"blocks.{layer}.hook_resid_pre" for layer in range(BLOCKS)]
POST = [f"blocks.{layer}.hook_resid_post" for layer in range(BLOCKS)]
# Of the folder `lens/` of the reference data.
STATED_HASH = "88890cb754effdbe364438af673de4c1b1c9733754fc76259dee9b386d63a562"
float64 = torch.float64


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return load_model("AutoModelForCausalLM", FOLDER, "cpu", {})


@pytest.fixture(scope="module")
def bridge() -> Any:
    return TransformerBridge.boot_transformers(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def paper() -> dict[str, Tensor]:
    return load_file(PAPER_DATA / "lens.safetensors")


@pytest.fixture(scope="module")
def resid_post() -> Tensor:
    """The residual stream that the paper's lens was applied to: [layer, pos, d_in]."""
    return load_file(PAPER_DATA / "activations.safetensors")["resid_post"][:, 0, :32]


@pytest.fixture
def tuned_lens(hf_model, paper) -> TunedLens:
    lens = new_tuned_lens(hf_model)
    lens.layer_translators.load_state_dict(
        {k: v for k, v in paper.items() if not k.endswith("_head")}
    )
    return lens


@pytest.fixture
def folder(tuned_lens, tmp_path) -> Path:
    tuned_lens.save(tmp_path / "lens")
    return tmp_path / "lens"


def layer_lens(source, hook_names=POST, **kwargs) -> LayerLens:
    return LayerLens.from_tuned_lens(source, hook_names, **kwargs)


def random_lens(d_in: int, scale: float, hook_names=POST, dtype=float64) -> LayerLens:
    lens = LayerLens(LensConfig(list(hook_names), BLOCKS, d_in), dtype=dtype)
    for tensor in lens.buffers():
        tensor.copy_(torch.randn(tensor.shape, dtype=dtype) * scale)
    return lens


# Which translator belongs to which hook


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.4.hook_resid_pre", 4),
        ("blocks.0.hook_resid_post", 1),
        ("blocks.3.hook_resid_post", 4),
        ("blocks.4.hook_resid_post", None),
        ("blocks.2.hook_in", 2),
        ("blocks.2.hook_out", 3),
        ("gpt_neox.layers.2", 3),
        ("model.layers.2", 3),
        ("transformer.h.0", 1),
        ("model.language_model.layers.4", None),
    ],
)
def test_a_hook_uses_the_translator_of_the_block_that_reads_it(name, expected):
    assert LensConfig([name], BLOCKS, D_IN).translator(name) == expected


def test_reference_alignment_uses_a_blocks_own_translator_for_its_output():
    config = LensConfig(POST, BLOCKS, D_IN, "reference")
    assert [config.translator(n) for n in POST] == [0, 1, 2, 3, 4]
    assert [config.translator(n) for n in PRE] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.hook_mlp_out", "cannot have a lens"),
        ("blocks.0.hook_resid_mid", "cannot have a lens"),
        ("hook_embed", "cannot have a lens"),
        ("lm_head", "cannot have a lens"),
        ("model.layers.5", "5 blocks"),
    ],
)
def test_other_hooks_cannot_have_a_lens(name, message):
    with pytest.raises(ValueError, match=message) as error:
        LensConfig([name], BLOCKS, D_IN).translator(name)
    assert repr(name) in str(error.value)


def test_a_worked_case():
    lens = LayerLens(LensConfig(POST[:1], BLOCKS, 2))
    lens.load_state_dict(
        {
            "0.weight": torch.tensor([[1.0, 3.0], [0.0, 0.0]]),
            "0.bias": torch.tensor([10.0, 0.0]),
        }
    )
    z = lens.transform(torch.tensor([1.0, 2.0]), 0)
    assert z.tolist() == [1 + 1 * 1 + 3 * 2 + 10, 2]
    assert lens.invert(z, 0).tolist() == [1.0, 2.0]


# Parity


@pytest.mark.parametrize("names", [PRE, POST], ids=["pre", "post"])
def test_equals_tuned_lens_at_every_layer(names, tuned_lens, resid_post):
    lens = layer_lens(tuned_lens, names)
    offset = 0 if names == PRE else 1
    for layer in range(BLOCKS):
        x = resid_post[layer]
        expected = x
        if layer + offset < BLOCKS:
            expected = tuned_lens.transform_hidden(x, layer + offset)
        assert torch.equal(lens.transform(x, layer), expected)


def test_equals_the_papers_lens_in_its_own_alignment(tuned_lens, paper, resid_post):
    lens = layer_lens(tuned_lens, alignment="reference")
    found = lens.transform(resid_post.movedim(0, -2)).movedim(-2, 0)
    torch.testing.assert_close(found, paper["inputs_head"], atol=1e-5, rtol=0)


def test_inverts_the_papers_lens_exactly(tuned_lens, paper):
    lens = layer_lens(tuned_lens, alignment="reference")
    found = lens.invert(paper["recons_head"].movedim(0, -2)).movedim(-2, 0)
    expected = paper["recons_true_inverse_head"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


def test_the_models_own_hidden_states_meet_their_translators(tuned_lens, hf_model):
    """`hidden_states[i]`, which tuned-lens trains on, is `resid_pre` of block i."""
    tokens = torch.randint(1, 512, (2, 8))
    states = hf_model.model(tokens, output_hidden_states=True).hidden_states
    names = [f"gpt_neox.layers.{layer}" for layer in range(BLOCKS - 1)]
    _, cache = hf_model.run_with_cache(tokens, names_filter=names)
    lens = layer_lens(tuned_lens, names)
    for i in range(1, BLOCKS):
        expected = tuned_lens.transform_hidden(states[i], i)
        assert torch.equal(lens.transform(cache[names[i - 1]], i - 1), expected)


# The inverse


@given(
    d_in=st.integers(1, 24),
    shape=st.lists(st.integers(0, 3), max_size=3),
    scale=st.floats(0, 0.1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_the_inverse_undoes_the_lens(d_in, shape, scale, seed):
    torch.manual_seed(seed)
    lens = random_lens(d_in, scale)
    x = torch.randn(*shape, d_in, dtype=float64)
    for i in range(BLOCKS):
        there_and_back = lens.invert(lens.transform(x, i), i)
        back_and_there = lens.transform(lens.invert(x, i), i)
        assert (there_and_back - x).abs().le(1e-9).all()
        assert (back_and_there - x).abs().le(1e-9).all()


def test_the_inverse_undoes_the_papers_lens(tuned_lens, resid_post):
    lens = layer_lens(tuned_lens, alignment="reference").to(float64)
    x = resid_post.double().movedim(0, -2)
    error = lens.invert(lens.transform(x)) - x
    assert error.abs().max() < 1e-9


def test_a_badly_conditioned_lens_that_is_allowed_is_inverted_to_1e_9():
    lens = LayerLens(LensConfig(POST[:1], BLOCKS, 2), dtype=float64)
    lens.load_state_dict(
        {
            "0.weight": torch.tensor([[0.0, 0.0], [0.0, 2e-6 - 1]]),
            "0.bias": torch.ones(2),
        }
    )
    x = torch.randn(100, 2, dtype=float64)
    assert (lens.invert(lens.transform(x, 0), 0) - x).abs().max() < 1e-9


def test_the_residual_after_the_last_block_is_untouched(tuned_lens, resid_post):
    lens = layer_lens(tuned_lens)
    x = resid_post[4]
    assert lens.transform(x, 4) is x
    assert lens.invert(x, POST[4]) is x


def test_gradients_pass_both_ways():
    lens = random_lens(4, 0.1)
    x = torch.randn(3, 4, dtype=float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lens.transform(x, 0), x)
    with torch.inference_mode():
        lens.invert(x, 0)  # what this keeps must serve autograd too
    assert torch.autograd.gradcheck(lambda x: lens.invert(x, 0), x)


def test_the_lens_has_no_trainable_parameters(tuned_lens):
    lens = layer_lens(tuned_lens)
    assert list(lens.parameters()) == []
    assert not any(buffer.requires_grad for buffer in lens.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_vectors_is_kept(dtype):
    lens = random_lens(8, 0.1, dtype=torch.float32)
    x = torch.randn(3, 8, dtype=dtype)
    z = lens.transform(x, 0)
    back = lens.invert(z, 0)
    assert z.dtype == back.dtype == dtype
    torch.testing.assert_close(back, x, atol=8 * torch.finfo(dtype).eps, rtol=0.02)


def test_autocast_does_not_coarsen_it():
    lens = random_lens(8, 0.1)
    x = torch.randn(3, 8, dtype=float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = lens.transform(x, 0)
        assert torch.equal(lens.invert(z, 0), lens.invert(lens.transform(x, 0), 0))
    assert torch.equal(z, lens.transform(x, 0))


def test_the_inverse_is_updated_with_the_tensors():
    lens, other = random_lens(8, 0.1), random_lens(8, 0.1)
    x = torch.randn(3, 8, dtype=float64)
    lens.invert(x, 0)
    lens.load_state_dict(other.state_dict())
    assert torch.equal(lens.invert(x, 0), other.invert(x, 0))
    narrow = copy.deepcopy(lens).to(torch.bfloat16)
    z = narrow.transform(x, 0)
    assert (narrow.invert(z, 0) - x).abs().max() < 1e-9
    assert not torch.equal(z, lens.transform(x, 0))


@pytest.mark.parametrize(
    ("value", "dtype", "number"),
    [
        (-1.0, torch.float32, "inf in torch.float32"),
        (torch.nan, torch.float32, "nan in torch.float32"),
        (1e-7 - 1, float64, r"1e\+07 in torch.float64"),
    ],
)
def test_a_lens_that_cannot_be_inverted_is_an_error(value, dtype, number):
    lens = LayerLens(LensConfig(POST[:1], BLOCKS, 2), dtype=float64)
    weight = torch.tensor([[value, 0.0], [0.0, 0.0]], dtype=float64)
    lens.load_state_dict({"0.weight": weight, "0.bias": torch.zeros(2)})
    message = rf"'{POST[0]}' cannot .*cond\(I \+ W\) = {number}"
    with pytest.raises(ValueError, match=message):
        lens.to(dtype).invert(torch.ones(2), 0)


# Layers, indices and parts


def test_all_layers_at_once_are_each_layer_by_itself():
    lens = random_lens(8, 0.1)
    x = torch.randn(2, 3, BLOCKS, 8, dtype=float64)
    z = lens.transform(x)
    for i in range(BLOCKS):
        assert torch.equal(z[..., i, :], lens.transform(x[..., i, :], POST[i]))
    torch.testing.assert_close(lens.invert(z), x)
    with pytest.raises(ValueError, match=r"layer = 5, .*shape \(2, 3, 4, 8\)"):
        lens.transform(x[..., 1:, :])


def test_indices_are_on_the_layer_axis_and_checked(tuned_lens):
    lens = layer_lens(tuned_lens, [POST[3], POST[0]])
    x = torch.randn(2, D_IN)
    expected = tuned_lens.transform_hidden(x, 4)
    assert torch.equal(lens.transform(x, 0), expected)
    assert torch.equal(lens.transform(x, POST[3]), expected)
    for bad in (2, -1):
        with pytest.raises(ValueError, match=f"2 hooks; {bad} is not an index"):
            lens.transform(x, bad)
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_post' is not a hook"):
        lens.hook(POST[1])


def test_a_part_shares_memory_until_it_is_converted_or_loaded_into():
    lens = random_lens(8, 0.1)
    converted, loaded = lens.select([POST[2]]), lens.select([POST[2]])
    x = torch.randn(3, 8, dtype=float64)
    whole, own = lens.state_dict(), converted.state_dict()
    assert own["0.weight"].data_ptr() == whole["2.weight"].data_ptr()
    assert converted.hook_names == [POST[2]]
    assert torch.equal(converted.transform(x, 0), lens.transform(x, 2))
    before = lens.invert(x, 2)
    converted.to(torch.float32)
    loaded.load_state_dict(random_lens(8, 0.1, [POST[2]]).state_dict())
    assert torch.equal(lens.invert(x, 2), before)
    assert all(tensor.dtype == float64 for tensor in lens.buffers())
    for part in (converted, loaded):
        back = part.invert(part.transform(x, 0), 0)
        torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


# Travelling in a checkpoint


def test_hooks_with_the_same_translator_share_no_memory(tuned_lens, tmp_path):
    # safetensors refuses shared memory.
    lens = layer_lens(tuned_lens, [POST[0], PRE[1], POST[4]])
    assert sorted(lens.state_dict()) == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
    ]
    save_file(lens.state_dict(), tmp_path / "lens.safetensors")
    config = json.loads(json.dumps(lens.config.to_dict()))
    loaded = LayerLens(LensConfig(**config), device="meta")
    loaded.load_state_dict(load_file(tmp_path / "lens.safetensors"), assign=True)
    assert loaded.config == lens.config
    for name, tensor in lens.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.bias": None}, r'Missing .*"0.bias"'),
        ({"1.bias": torch.ones(4)}, r'Unexpected .*"1.bias"'),
        ({"0.bias": torch.ones(4, 4)}, r"size mismatch for 0.bias"),
        ({"0.bias": torch.full((4,), torch.nan)}, r"0\.bias.* NaN"),
    ],
)
def test_a_state_dict_of_another_lens_is_an_error(changes, message):
    lens = random_lens(4, 0.1, POST[:1])
    changed = {**lens.state_dict(), **changes}
    tensors = {k: v for k, v in changed.items() if v is not None}
    with pytest.raises((RuntimeError, ValueError), match=message):
        LayerLens.from_tensors(lens.config, tensors)


# Where a lens comes from


def test_a_folder_that_tuned_lens_saved_is_loaded(folder, tuned_lens, resid_post):
    lens = layer_lens(folder)
    x = resid_post[0]
    assert torch.equal(lens.transform(x, 0), tuned_lens.transform_hidden(x, 1))
    assert lens.config.base_model_name == FOLDER
    assert lens.config.unembed_hash == tuned_lens.config.unembed_hash


def test_a_name_in_the_hub_space_is_loaded_from_the_cache(folder, tmp_path):
    commit = "0" * 40
    space = tmp_path / "hub" / "spaces--AlignmentResearch--tuned-lens"
    place = space / "snapshots" / commit / "lens" / "someone" / "model"
    shutil.copytree(folder, place)
    (space / "refs").mkdir()
    (space / "refs" / "main").write_text(commit)
    lens = layer_lens("someone/model", cache_dir=str(tmp_path / "hub"))
    for name, tensor in layer_lens(folder).state_dict().items():
        assert torch.equal(lens.state_dict()[name], tensor)


def test_a_missing_lens_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There is no tuned lens 'someone/else'"):
        layer_lens("someone/else", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"no tuned lens.*config\.json and params\.pt"):
        layer_lens(tmp_path)


def test_a_folder_path_may_start_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert layer_lens("~/lens").config == layer_lens(folder).config


def test_a_lens_without_biases_is_loaded(folder, resid_post):
    """tuned-lens itself fails to make one."""
    rewrite(folder, bias=False)
    tensors = torch.load(folder / "params.pt", weights_only=True)
    weights = {k: v for k, v in tensors.items() if k.endswith("weight")}
    torch.save(weights, folder / "params.pt")
    x = resid_post[0]
    expected = x + x @ weights["1.weight"].T
    torch.testing.assert_close(layer_lens(folder).transform(x, 0), expected)


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    if tensors is not None:
        held = torch.load(folder / "params.pt", weights_only=True)
        torch.save({**held, **tensors}, folder / "params.pt")


@pytest.mark.parametrize(
    ("weight", "number"),
    [
        (torch.tensor([2.0**-23 - 1] + [0.0] * (D_IN - 1)).diag(), "8.39e\\+06"),
        (torch.tensor([-1.0] + [0.0] * (D_IN - 1)).diag(), "inf|\\de\\+\\d\\d"),
        (-torch.eye(D_IN), "inf"),
    ],
    ids=["ill-conditioned", "singular", "zero"],
)
def test_an_ill_conditioned_translator_is_an_error(folder, weight, number):
    rewrite(folder, {"2.weight": weight})
    message = rf"{re.escape(POST[1])}.*cond\(I \+ W\) = ({number})"
    with pytest.raises(ValueError, match=message):
        layer_lens(folder)
    layer_lens(folder, [POST[0]])  # which does not use it


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_of_anything_else_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"0.weight": Harmful()}, folder / "params.pt")
    with pytest.raises(ValueError, match=r"tensors only.*load failed\)\.$"):
        layer_lens(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("params.pt", b"PK\x03\x04"),
        ("config.json", b"{"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(folder)):
        layer_lens(folder)


# Which model it is for


def test_a_lens_of_another_width_or_depth_is_an_error(tuned_lens, tokenizer):
    model = tiny_model(tokenizer, n_layers=BLOCKS)
    message = "for 5 blocks of width 64; 'custom' has 5 of width 16"
    with pytest.raises(ValueError, match=message):
        layer_lens(tuned_lens, model=model)
    lens = layer_lens(tuned_lens)
    with pytest.raises(ValueError, match=r"5 blocks .*; 'm' has 6 of width 64"):
        lens.config.check_shape(ModelShape(6, 64), "m")


def test_another_unembedding_is_a_warning_that_names_both(folder, hf_model):
    rewrite(folder, unembed_hash="a1b2", base_model_name_or_path="theirs")
    own = as_model(hf_model).unembedding_hash()
    message = f"'theirs' with unembedding hash a1b2, and '{FOLDER}' has {own}"
    with pytest.warns(UserWarning, match=re.escape(message)):
        layer_lens(folder, model=hf_model)


@pytest.mark.filterwarnings("error:The lens may be")
def test_the_same_unembedding_gives_no_warning(folder, hf_model, bridge):
    layer_lens(folder, model=hf_model)
    layer_lens(folder, model=bridge)
    rewrite(folder, unembed_hash=None)
    layer_lens(folder, model=hf_model)


def test_hashes_are_those_of_tuned_lens(hf_model, model):
    assert (
        as_model(hf_model).unembedding_hash()
        == Unembed(hf_model.model).unembedding_hash()
    )
    assert as_model(hf_model).unembedding_hash() == STATED_HASH
    assert as_model(model).unembedding_hash() == Unembed(model).unembedding_hash()


# As hooks of a model


def test_both_directions_in_sequence_restore_the_model(tokenizer):
    model = tiny_model(tokenizer, n_layers=3).to(float64)
    names = [
        f"blocks.{i}.hook_resid_{end}" for i in range(3) for end in ("pre", "post")
    ]
    lens = LayerLens(LensConfig(names, 3, 16), dtype=float64)
    for tensor in lens.buffers():
        tensor.normal_(std=0.05)
    tokens = torch.randint(1, 512, (2, 8))
    clean = model(tokens)
    there = [lens.hook(i) for i in range(len(names))]
    pairs = [lens.hook(n, inverse=v) for n in names for v in (False, True)]
    assert [name for name, _ in there] == names
    restored = model.run_with_hooks(tokens, fwd_hooks=pairs)
    torch.testing.assert_close(restored, clean, atol=1e-10, rtol=0)
    changed = model.run_with_hooks(tokens, fwd_hooks=there)
    assert (changed - clean).abs().max() > 1e-2


def test_a_hook_gives_what_the_transform_gives(tuned_lens, hf_model):
    names = [f"gpt_neox.layers.{layer}" for layer in range(BLOCKS)]
    lens = layer_lens(tuned_lens, names)
    tokens = torch.randint(1, 512, (2, 8))
    _, clean = hf_model.run_with_cache(tokens, names_filter=names[:2])
    seen = []
    with hf_model.hooks(
        fwd_hooks=[lens.hook(1), (names[1], lambda x, hook: seen.append(x))]
    ):
        hf_model(tokens)
    assert torch.equal(seen[0], lens.transform(clean[names[1]], 1))


def test_hooks_reach_a_bridge_that_has_other_names(tuned_lens):
    bridge: Any = SAETransformerBridge.boot_transformers(FOLDER, device="cpu")
    lens = layer_lens(tuned_lens, as_model(bridge).own_hook_names(POST))
    tokens = torch.randint(1, 512, (1, 8))
    clean = bridge(tokens)
    assert not torch.equal(
        bridge.run_with_hooks(tokens, fwd_hooks=[lens.hook(1)]), clean
    )
    pair = [lens.hook(1), lens.hook(1, inverse=True)]
    restored = bridge.run_with_hooks(tokens, fwd_hooks=pair)
    torch.testing.assert_close(restored, clean, atol=2e-3, rtol=0)


# Fitting


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return load_file(PAPER_DATA / "activations.safetensors")["tokens"]


@pytest.fixture(scope="module")
def text(hf_model) -> Tensor:
    """Text sampled from the model itself, like its training text."""
    torch.manual_seed(0)
    start = torch.randint(1, 512, (64, 1))
    return hf_model.model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=63,
        min_new_tokens=63,
    )


@pytest.fixture(scope="module")
def fitted(hf_model, text, tmp_path_factory) -> tuple[TunedLens, Path]:
    path = tmp_path_factory.mktemp("fit") / "lens"
    lens = fit_tuned_lens(
        hf_model,
        text,
        n_steps=40,
        batch_size_prompts=16,
        output_path=path,
    )
    return lens, path


def test_kl_falls_at_every_layer_below_the_logit_lens(fitted, hf_model, held_out):
    logit_lens = lens_kl(hf_model, held_out)
    tuned = lens_kl(hf_model, held_out, fitted[0])
    assert (tuned < 0.5 * logit_lens).all()
    # Later layers predict the output better; the logit lens predicts it worse.
    assert (tuned.diff() < 0).all()


def test_the_right_alignment_is_the_one_it_was_trained_in(fitted, hf_model, held_out):
    """Block outputs through the other translator predict the model's output worse."""
    names = [f"gpt_neox.layers.{layer}" for layer in range(BLOCKS)]
    logits, cache = hf_model.run_with_cache(held_out, names_filter=names)
    unembed = fitted[0].unembed
    kl = {}
    for alignment in ("tuned_lens", "reference"):
        lens = layer_lens(fitted[0], names, alignment=alignment)
        kl[alignment] = [
            kl_div(logits, unembed(lens.transform(cache[n], n))) for n in names
        ]
    assert torch.tensor(kl["tuned_lens"]).lt(torch.tensor(kl["reference"])).all()
    # `lens_kl`, computed in another way.
    expected = lens_kl(hf_model, held_out, fitted[0])[1:]
    found = torch.tensor(kl["tuned_lens"][:-1], dtype=float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def kl_div(logits: Tensor, other: Tensor) -> float:
    p = logits.double().softmax(-1)
    difference = logits.double().log_softmax(-1) - other.double().log_softmax(-1)
    return (p * difference).sum(-1).mean().item()


def test_tuned_lens_loads_what_was_fitted(fitted, hf_model, held_out):
    lens, path = fitted
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "params.pt"]
    loaded = TunedLens.from_model_and_pretrained(hf_model.model, str(path))
    h = torch.randn(3, D_IN)
    for i in range(BLOCKS):
        torch.testing.assert_close(loaded(h, i), lens(h, i))
    # And so do we, without a warning about the model.
    layer_lens(path, model=hf_model)


def test_fitting_does_not_change_the_model(hf_model, text):
    before = copy.deepcopy(hf_model.model.state_dict())
    fit_tuned_lens(
        hf_model,
        text,
        n_steps=2,
        batch_size_prompts=4,
        optimizer="adam",
    )
    for name, tensor in hf_model.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.requires_grad and p.grad is None for p in hf_model.model.parameters())


def test_a_bridge_is_fitted_like_the_model_inside(bridge, hf_model, text):
    settings: dict[str, Any] = {"n_steps": 3, "batch_size_prompts": 4}
    ours = fit_tuned_lens(bridge, text, **settings)
    theirs = fit_tuned_lens(hf_model, text, **settings)
    for name, tensor in theirs.layer_translators.state_dict().items():
        found = ours.layer_translators.state_dict()[name]
        torch.testing.assert_close(found, tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_logits_soft_cap": 2.0},
        {"normalization_type": None},
        {"normalization_type": "LNPre", "n_layers": 3},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_any_hooked_transformer_is_fitted(tokenizer, changes):
    model = tiny_model(tokenizer, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that there is something to predict
    tokens = torch.randint(1, 512, (8, 16))
    lens = fit_tuned_lens(model, tokens, n_steps=30)
    assert {p.dtype for p in lens.layer_translators.parameters()} == {model.cfg.dtype}
    assert (lens_kl(model, tokens, lens) < lens_kl(model, tokens)).all()
    assert lens.config.num_hidden_layers == model.cfg.n_layers


def test_steps_do_not_depend_on_how_a_batch_is_split(tokenizer):
    model = tiny_model(tokenizer).to(float64)
    tokens = torch.randint(1, 512, (7, 16))
    lenses = [
        fit_tuned_lens(model, tokens, n_steps=3, forward_batch_size_prompts=n)
        for n in (2, 7)
    ]
    a, b = (lens.layer_translators.state_dict() for lens in lenses)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-12, rtol=0)


def test_a_step_is_tuned_lens_own_recipe(tokenizer):
    """One step by hand: SGD with Nesterov momentum on the clipped gradient."""
    model = tiny_model(tokenizer).to(float64)
    tokens = torch.randint(1, 512, (4, 16))
    lens = TunedLens(Unembed(model), new_tuned_lens(model).config)
    params = list(lens.layer_translators.parameters())
    logits, cache = model.run_with_cache(tokens)
    labels = logits.detach().log_softmax(-1)
    for i in range(2):
        found = lens(cache[f"blocks.{i}.hook_resid_pre"].detach(), i).log_softmax(-1)
        (labels.exp() * (labels - found)).sum(-1).mean().backward()
    torch.nn.utils.clip_grad_norm_(params, 0.01)
    # (1 - 0.9) * lr times the gradient plus 0.9 times the momentum, which is the same.
    expected = [-0.1 * 1.9 * p.grad for p in params if p.grad is not None]
    fitted = fit_tuned_lens(model, tokens, n_steps=1, max_grad_norm=0.01)
    for p, value in zip(fitted.layer_translators.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("fails_at", [1, 2, 5, 9])
def test_a_fit_continues_after_an_error(
    tokenizer, tmp_path, monkeypatch, optimizer, fails_at, dtype
):
    """Bit for bit as without one, in steps that no longer begin with a pass."""
    model, tokens = tiny_model(tokenizer, dtype=dtype), torch.randint(1, 512, (5, 8))
    settings = {"n_steps": 9, "batch_size_prompts": 3, "optimizer": optimizer}
    expected = fit_tuned_lens(model, tokens, **settings).layer_translators.state_dict()
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SAVES", 0)
    backward, path, calls = lens_fit._backward, tmp_path / "lens", []

    def count(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise MemoryError
        return backward(*args)

    monkeypatch.setattr(lens_fit, "_backward", count)
    with pytest.raises(MemoryError):
        fit_tuned_lens(model, tokens, **settings, output_path=path)
    if fails_at == 1:
        assert not any(tmp_path.iterdir())  # nothing was done
    else:
        for name, value in {"n_steps": 10, "lr": 0.5, "seed": 1}.items():
            changed = {**settings, name: value}
            with pytest.raises(
                ValueError, match=f"(?s)`{name}`.*Delete .*lens.partial"
            ):
                fit_tuned_lens(model, tokens, **changed, output_path=path)
        with pytest.raises(ValueError, match="`prompts`"):
            fit_tuned_lens(model, tokens.flip(0), **settings, output_path=path)
    lens = fit_tuned_lens(model, tokens, **settings, output_path=path)
    assert len(calls) == 10
    for name, tensor in lens.layer_translators.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert [one.name for one in tmp_path.iterdir()] == ["lens"]


def test_a_fit_whose_values_are_not_finite_is_not_resumed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SAVES", 0)
    tokens, path = torch.randint(1, 512, (2, 8)), tmp_path / "lens"
    with pytest.raises(FloatingPointError, match="Use a lower `lr`"):
        fit_tuned_lens(model, tokens, n_steps=40, lr=1e30, output_path=path)
    fit_tuned_lens(model, tokens, n_steps=1, output_path=path)


def test_an_unembed_is_the_end_of_the_model(model, hf_model, bridge):
    h = torch.randn(2, 3, D_IN)
    expected = Unembed(hf_model.model)(h)
    torch.testing.assert_close(as_model(hf_model).unembed()(h), expected)
    torch.testing.assert_close(
        as_model(bridge).unembed()(h), expected, atol=1e-4, rtol=1e-4
    )
    h = torch.randn(2, 3, 16)
    torch.testing.assert_close(as_model(model).unembed()(h), Unembed(model)(h))
    assert new_tuned_lens(model).config.num_hidden_layers == 2


def test_an_unembed_does_not_call_the_models_hooks(hf_model):
    seen = []
    with hf_model.hooks(
        fwd_hooks=[("gpt_neox.final_layer_norm", lambda x, hook: seen.append(x))]
    ):
        as_model(hf_model).unembed()(torch.randn(2, D_IN))
    assert seen == []


def test_an_unknown_optimizer_is_an_error(model):
    fit = inspect.unwrap(fit_tuned_lens)  # the tests' type checks would stop a call
    with pytest.raises(ValueError, match=r"`optimizer` .*got 'SGD'"):
        fit(model, torch.randint(1, 512, (2, 8)), optimizer="SGD")


@pytest.mark.parametrize("function", [fit_tuned_lens, lens_kl])
def test_tokens_are_those_that_the_model_can_run(model, function):
    with pytest.raises(ValueError, match=r"in \[0, 512\).*from 1 to 512"):
        function(model, torch.tensor([[1, 512]]))


@pytest.mark.parametrize("function", [fit_tuned_lens, lens_kl])
def test_a_model_with_saes_attached_is_an_error(tokenizer, function):
    model: Any = tiny_model(tokenizer, HookedSAETransformer)
    model.add_sae(random_sae().view(0))
    with pytest.raises(ValueError, match="must have no SAEs attached"):
        function(model, torch.randint(1, 512, (2, 8)))


def test_inference_mode_changes_nothing(model):
    tokens = torch.randint(1, 512, (2, 8))
    expected = fit_tuned_lens(model, tokens, n_steps=2)
    with torch.inference_mode():
        lens = fit_tuned_lens(model, tokens.clone(), n_steps=2)
    for a, b in zip(lens.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_lens_that_is_not_finite_is_not_saved(tokenizer, tmp_path):
    """The loss, taken before each step, does not see the last one."""
    model = tiny_model(tokenizer, dtype=torch.float16)
    message = r"fitted lens is not finite in torch\.float16"
    with pytest.raises(FloatingPointError, match=message):
        fit_tuned_lens(
            model,
            torch.randint(1, 512, (2, 8)),
            n_steps=1,
            lr=1e12,
            output_path=tmp_path / "lens",
        )
    assert not (tmp_path / "lens").exists()


def test_a_path_that_cannot_be_written_is_an_error_before_fitting(
    model, tmp_path, monkeypatch
):
    def train(*args):
        raise AssertionError("It was trained.")

    monkeypatch.setattr(lens_fit, "_backward", train)
    (tmp_path / "file").touch()
    tokens = torch.randint(1, 512, (2, 8))
    for path in (tmp_path / "file" / "lens", "/proc/1/lens"):
        with pytest.raises(OSError, match="`output_path` must be a path that can be"):
            fit_tuned_lens(model, tokens, output_path=path)


def test_a_folder_created_during_the_fit_is_not_overwritten(
    model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("HOME", str(tmp_path))
    step = lens_fit._backward

    def appear(*args):
        (tmp_path / "lens" / "notes").mkdir(parents=True)
        return step(*args)

    monkeypatch.setattr(lens_fit, "_backward", appear)
    tokens = torch.randint(1, 512, (2, 8))
    fit_tuned_lens(model, tokens, n_steps=1, output_path="~/lens")
    assert "has appeared at" in caplog.text
    (saved,) = tmp_path.glob("lens-*/params.pt")
    assert f"saving to {saved.parent}" in caplog.text
    assert [path.name for path in (tmp_path / "lens").iterdir()] == ["notes"]


def test_bad_input_to_a_fit_is_an_error(model, tmp_path):
    tokens = torch.randint(1, 512, (2, 8))
    (tmp_path / "notes").touch()
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
        fit_tuned_lens(model, tokens, output_path=tmp_path)
    with pytest.raises(ValueError, match="must be a HookedTransformer"):
        fit_tuned_lens(torch.nn.Linear(1, 1), tokens)


def test_a_loss_that_is_not_finite_is_an_error(model):
    model.blocks[0].mlp.b_out.data.fill_(torch.nan)
    with pytest.raises((FloatingPointError, ValueError), match=r"KL .*(nan|finite)"):
        fit_tuned_lens(model, torch.randint(1, 512, (2, 8)), n_steps=1)
