"""Reference: the lens' own transform and inverse around an SAE without a lens.

What happens to the lens on the way is the design's section 5: it travels inside the
checkpoint, and nothing is left of one that was taken off.
"""

import copy
import json
from typing import Any

import pytest
import torch
from conftest import D_MODEL, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, HookedSAETransformer, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepInput
from saes import HOOK_NAMES, random_acts, random_lens, random_sae, run_fresh
from safetensors.torch import load_file, save_file

from sae_lens_multilayer import MultiLayerSAE, MultiLayerTrainingSAE
from sae_lens_multilayer.lens.carrier import saved_lens
from sae_lens_multilayer.lens.closed_form import fit_closed_form
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.topk import reference

N = len(HOOK_NAMES)


def sae_with_lens(training: bool = False, **changes: Any) -> Any:
    sae = random_sae(training, **changes)
    sae.lens = random_lens(dtype=sae.dtype)
    return sae


def without_lens(sae: Any) -> Any:
    plain = copy.deepcopy(sae)
    plain.lens = None
    return plain


def expected(sae: Any, x: torch.Tensor, hook: int) -> torch.Tensor:
    """`T^-1(SAE(T(x)))`, by an SAE without a lens."""
    z_hat = without_lens(sae)(sae.lens.transform(x, hook))
    return sae.lens.invert(z_hat, hook)


# What it computes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalize_activations", ["layer_norm", "none"])
def test_it_reconstructs_in_the_space_of_the_lens(training, normalize_activations):
    sae = sae_with_lens(
        training, normalize_activations=normalize_activations, dtype="float64"
    )
    x = random_acts(5, N, dtype=torch.float64)
    want = torch.stack([expected(sae, x[:, i], i) for i in range(N)], dim=1)
    torch.testing.assert_close(sae.decode(sae.encode(x)), want)
    torch.testing.assert_close(sae(x), want)
    torch.testing.assert_close(sae.decode_topk(sae.encode_topk(x)), want)


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    hook=st.integers(0, N - 1),
    by_name=st.booleans(),
)
@settings(max_examples=20)
def test_vectors_of_one_hook_are_those_of_the_layer_axis(batch, hook, by_name):
    sae = sae_with_lens(dtype="float64")
    x = random_acts(*batch, N, dtype=torch.float64)
    key = HOOK_NAMES[hook] if by_name else hook
    one = x[..., hook, :]
    torch.testing.assert_close(sae.encode(one, hook=key), sae.encode(x)[..., hook, :])
    torch.testing.assert_close(
        sae.decode_topk(sae.encode_topk(one, hook=key), hook=key),
        sae.decode_topk(sae.encode_topk(x))[..., hook, :],
    )
    torch.testing.assert_close(
        sae.decode(sae.encode(one, hook=key), hook=key), expected(sae, one, hook)
    )


def test_without_a_lens_the_hook_changes_nothing():
    sae = random_sae()
    x = random_acts(3, N)
    assert torch.equal(sae.encode(x[:, 1], hook=1), sae.encode(x[:, 1]))
    acts = sae.encode_topk(x[:, 1], hook=HOOK_NAMES[1])
    assert torch.equal(sae.decode_topk(acts, hook=1), sae.decode_topk(acts))


@pytest.mark.parametrize("shape", [(3, D_MODEL), (N, 3, D_MODEL), (D_MODEL,)])
@pytest.mark.parametrize("encode", ["encode", "encode_topk"])
def test_vectors_of_unknown_hooks_are_an_error(shape, encode):
    sae = sae_with_lens()
    message = r"\[\*batch, layer = 2, d_in\]; got shape .*For one hook"
    with pytest.raises(ValueError, match=message):
        getattr(sae, encode)(torch.randn(shape))
    with pytest.raises(ValueError, match="2 hooks; 2 is not an index"):
        getattr(sae, encode)(torch.randn(shape), hook=2)


def test_the_only_hook_needs_no_name():
    sae = random_sae()
    sae.cfg.metadata.hook_names = HOOK_NAMES[1:]
    sae.lens = random_lens(HOOK_NAMES[1:])
    x = random_acts(3, 4)
    assert torch.equal(sae(x), expected(sae, x, 0))


def test_hooks_of_the_sae_receive_raw_vectors():
    sae, seen = sae_with_lens(), []
    sae.hook_sae_input.add_hook(lambda x, hook: seen.append(x))
    x = random_acts(3, N)
    sae.encode(x)
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_moves_with_the_sae(dtype):
    sae = sae_with_lens().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in sae.lens.buffers()} == {wide}
    x = random_acts(3, N, dtype=dtype)
    assert sae(x).dtype == dtype
    sae.lens = random_lens()
    assert {tensor.dtype for tensor in sae.lens.buffers()} == {wide}


@pytest.mark.parametrize("way", ["set", "to", "load", "saved_lens", "view"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_sae_keeps_a_whitening_lens_in_float32(dtype, way, tmp_path):
    """x of a scale of 500 is whitened by A near 0, so that W = A - I is near -I."""
    x = torch.randn(400, N, D_MODEL) @ torch.randn(D_MODEL, D_MODEL) * 500
    config = LensConfig(HOOK_NAMES, N, D_MODEL, kind="whitening")
    lens = fit_closed_form([x], config)
    wide: Any = random_sae()
    wide.lens = lens
    narrow: Any = copy.deepcopy(wide).to(dtype)
    if way == "set":
        narrow.lens = None
        narrow.lens = lens
    elif way in ("load", "saved_lens"):
        narrow.save_model(tmp_path)
        narrow = SAE.load_from_disk(tmp_path)
        assert narrow.dtype == dtype
    if way == "saved_lens":
        narrow.lens = saved_lens(tmp_path)
        assert narrow.lens is not None
    elif way == "view":
        narrow = narrow.view(0)
        wide, x = wide.view(0), x[:, 0]
        assert narrow.lens.is_same(wide.lens)
    else:
        assert narrow.lens.is_same(lens)
    assert {tensor.dtype for tensor in narrow.lens.buffers()} == {torch.float32}
    x = x.to(dtype).float()
    # The transform, then the inverse; TopK may select others for a rounded z.
    z, expected = narrow.into_lens(x.to(dtype)), wide.into_lens(x)
    torch.testing.assert_close(z.float(), expected, rtol=2**-7, atol=2**-7)
    x_hat, expected = narrow.out_of_lens(z), wide.out_of_lens(z.float())
    torch.testing.assert_close(x_hat.float(), expected, rtol=2**-8, atol=1e-3)
    error = [
        (sae(v) - v).float().norm() / v.float().norm()
        for sae, v in ((narrow, x.to(dtype)), (wide, x))
    ]
    torch.testing.assert_close(error[0], error[1], rtol=0.05, atol=0)


@pytest.mark.parametrize("saved", [torch.float32, torch.float64])
@pytest.mark.parametrize("loaded", ["bfloat16", "float16", "float32", "float64"])
def test_loading_in_another_dtype_does_not_round_the_lens(saved, loaded, tmp_path):
    sae = random_sae().to(saved)
    sae.lens = random_lens().to(saved)
    # Values that float32 holds and bfloat16 does not.
    assert all((t != t.bfloat16()).any() for t in sae.lens.buffers())
    sae.save_model(tmp_path)
    found: Any = SAE.load_from_disk(tmp_path, dtype=loaded)
    assert str(found.dtype) == f"torch.{loaded}"
    wide = torch.promote_types(found.dtype, torch.float32)
    for name, tensor in sae.lens.state_dict().items():
        assert torch.equal(found.lens.state_dict()[name], tensor.to(wide))
    kept = saved_lens(tmp_path)
    assert kept is not None
    assert {tensor.dtype for tensor in kept.buffers()} == {saved}
    assert kept.is_same(sae.lens)


# Putting it on and taking it off


def test_a_removed_lens_leaves_nothing(tmp_path):
    plain = random_sae()
    sae = copy.deepcopy(plain)
    sae.lens = random_lens()
    assert sae.cfg.metadata.lens == sae.lens.config.to_dict()
    assert "lens.0.weight" in sae.state_dict()
    sae.lens = None
    assert sae.cfg.to_dict() == plain.cfg.to_dict()
    assert "lens" not in sae.cfg.to_dict()["metadata"]
    assert sorted(sae.state_dict()) == sorted(plain.state_dict())
    x = random_acts(3)
    assert torch.equal(sae(x), plain(x))
    sae.save_model(tmp_path)
    assert '"lens"' not in (tmp_path / SAE_CFG_FILENAME).read_text()
    assert sorted(load_file(tmp_path / SAE_WEIGHTS_FILENAME)) == [
        "W_dec",
        "W_enc",
        "b_dec",
    ]


@pytest.mark.parametrize("training", [False, True])
def test_another_sae_with_the_same_settings_keeps_its_own(training, tmp_path):
    plain = random_sae(training)
    other = type(plain)(plain.cfg)
    other.lens = random_lens()
    third = type(plain)(other.cfg)
    third.lens = None
    for i, (sae, has_lens) in enumerate([(plain, 0), (other, 1), (third, 0)]):
        assert ("lens" in sae.cfg.metadata) == has_lens
        (sae.save_inference_model if training else sae.save_model)(tmp_path / str(i))
        loaded: Any = SAE.load_from_disk(tmp_path / str(i))
        assert (loaded.lens is not None) == has_lens


def test_the_lens_given_is_not_changed():
    sae, lens = random_sae(), random_lens(dtype=torch.float64)
    before = copy.deepcopy(lens.state_dict())
    sae.lens = lens
    sae.to(torch.bfloat16)
    for name, tensor in lens.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float64


def test_a_copy_has_a_lens_of_its_own():
    sae = sae_with_lens()
    other = copy.deepcopy(sae)
    x = random_acts(3, N)
    want = sae(x)
    other.lens.get_submodule("0").weight.zero_()
    other.lens = None
    assert torch.equal(sae(x), want)
    assert sae.cfg.metadata.lens is not None


def test_a_lens_of_another_width_or_other_hooks_is_an_error():
    sae = random_sae()
    with pytest.raises(ValueError, match=r"width, d_in = 16.*; got 8"):
        sae.lens = random_lens(d_in=8)
    with pytest.raises(
        ValueError, match=r"hooks in the same order.*got 16 and \['blocks\.1"
    ):
        sae.lens = random_lens(HOOK_NAMES[::-1])
    assert sae.lens is None
    assert "lens" not in sae.cfg.metadata


# On disk


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_saved_in_the_checkpoint(training, dtype, tmp_path):
    sae = sae_with_lens(training, dtype=dtype)
    sae.save_model(tmp_path)
    loaded = (TrainingSAE if training else SAE).load_from_disk(tmp_path)
    assert isinstance(loaded, MultiLayerTrainingSAE if training else MultiLayerSAE)
    assert isinstance(loaded.lens, LayerLens)
    assert loaded.lens.config == sae.lens.config
    for name, tensor in sae.lens.state_dict().items():
        found = loaded.lens.state_dict()[name]
        assert found.dtype == torch.promote_types(sae.dtype, torch.float32)
        assert torch.equal(found, tensor)
    x = random_acts(3, N, dtype=sae.dtype)
    assert torch.equal(loaded(x), sae(x))


def test_it_is_loaded_for_inference_and_in_another_dtype(tmp_path):
    sae = sae_with_lens(training=True)
    sae.save_inference_model(tmp_path)
    loaded: Any = SAE.load_from_disk(tmp_path, dtype="float64")
    x = random_acts(3, N)
    # The inverse of the lens multiplies float32's rounding.
    torch.testing.assert_close(loaded(x.double()).float(), sae(x), rtol=1e-5, atol=1e-5)
    weight = sae.lens.state_dict()["1.weight"]
    assert torch.equal(loaded.lens.state_dict()["1.weight"], weight.double())


def test_a_fresh_process_loads_it(tmp_path):
    sae = sae_with_lens()
    sae.save_model(tmp_path / "sae")
    x = random_acts(3, N)
    save_file({"x": x, "x_hat": sae(x).detach()}, tmp_path / "x.safetensors")
    script = """
import sys, torch
from safetensors.torch import load_file
from sae_lens import SAE
import sae_lens_multilayer
sae = SAE.load_from_disk(sys.argv[1])
vectors = load_file(sys.argv[2])
torch.testing.assert_close(sae(vectors["x"]).detach(), vectors["x_hat"])
print(sae.lens.config.alignment)
"""
    printed = run_fresh(script, tmp_path / "sae", tmp_path / "x.safetensors")
    assert printed.split() == ["reference"]


def test_a_checkpoint_without_a_tensor_of_its_lens_is_an_error(tmp_path):
    sae_with_lens().save_model(tmp_path)
    tensors = load_file(tmp_path / SAE_WEIGHTS_FILENAME)
    del tensors["lens.1.bias.float32_bytes"]
    save_file(tensors, tmp_path / SAE_WEIGHTS_FILENAME)
    with pytest.raises(RuntimeError, match=r'Missing .*"lens\.1\.bias"'):
        SAE.load_from_disk(tmp_path)


# Views


def test_a_view_applies_the_lens_of_its_hook(tokenizer):
    sae = sae_with_lens()
    x = random_acts(4, 3)
    for i, view in enumerate(sae.views()):
        assert view.cfg.metadata.hook_name == HOOK_NAMES[i]
        torch.testing.assert_close(view(x), expected(sae, x, i))
    model: Any = tiny_model(tokenizer, HookedSAETransformer)
    tokens = torch.randint(1, 512, (2, 8))
    _, clean = model.run_with_cache(tokens)
    view = sae.view(0)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[view])
    torch.testing.assert_close(
        cache[f"{HOOK_NAMES[0]}.hook_sae_output"],
        expected(sae, clean[HOOK_NAMES[0]], 0),
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_view_shares_memory_until_it_is_converted(training):
    sae = sae_with_lens(training)
    view, other = sae.views()
    for name in ("W_enc", "lens.0.weight"):
        whole = sae.state_dict()[name]
        assert view.state_dict()[name].data_ptr() == whole.data_ptr()
    x = random_acts(3)
    want = sae(x.unsqueeze(1).expand(-1, N, -1))[:, 1]
    view.to(torch.float64)
    copy.deepcopy(other).lens = None
    torch.testing.assert_close(other(x), want)
    torch.testing.assert_close(view(x.double()).float(), expected(sae, x, 0))
    assert {tensor.dtype for tensor in sae.lens.buffers()} == {torch.float32}


def test_a_copy_of_a_view_does_not_share_memory():
    sae = sae_with_lens()
    other = copy.deepcopy(sae.view(0))
    x = random_acts(3)
    want = sae.view(0)(x)
    assert torch.equal(other(x), want)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.mul_(2)
    assert torch.equal(sae.view(0)(x), want)
    assert not torch.equal(other(x), want)


def test_loading_into_a_view_does_not_change_the_multi_layer_sae():
    sae = sae_with_lens()
    x = random_acts(3, N)
    before = sae(x)
    view = sae.view(0)
    tensors = {name: t + 1 for name, t in view.state_dict().items()}
    view.load_state_dict(tensors)
    assert torch.equal(view.state_dict()["lens.0.weight"], tensors["lens.0.weight"])
    assert torch.equal(sae(x), before)


def test_a_saved_view_is_an_sae_of_one_hook_with_its_lens(tmp_path, tokenizer):
    sae = sae_with_lens()
    view = sae.view(HOOK_NAMES[1])
    view.save_model(tmp_path)
    loaded: Any = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, MultiLayerSAE)
    assert loaded.lens is not None
    assert loaded.lens.hook_names == [HOOK_NAMES[1]]
    assert loaded.cfg.metadata.hook_name == HOOK_NAMES[1]
    x = random_acts(3)
    assert torch.equal(loaded(x), view(x))
    assert torch.equal(loaded.view(1)(x), view(x))
    model: Any = tiny_model(tokenizer, HookedSAETransformer)
    tokens = torch.randint(1, 512, (2, 8))
    torch.testing.assert_close(
        model.run_with_saes(tokens, saes=[loaded]),
        model.run_with_saes(tokens, saes=[view]),
    )


def test_stock_saelens_refuses_a_saved_view_with_a_lens(tmp_path):
    sae_with_lens().view(0).save_model(tmp_path)
    script = """
import sys
from sae_lens import SAE
try:
    SAE.load_from_disk(sys.argv[1])
except Exception as error:
    print("refused", error)
"""
    assert run_fresh(script, tmp_path).startswith("refused")


def test_dashboards_may_fold_the_norms_of_a_view_with_a_lens():
    sae = sae_with_lens()
    view = sae.view(0)
    view.fold_W_dec_norm()
    assert view.W_dec.data_ptr() == sae.W_dec.data_ptr()


# Training


def test_the_loss_is_taken_in_the_space_of_the_lens():
    """Sparse step, dense step and the definition on transformed vectors agree."""
    sae = sae_with_lens(training=True, dtype="float64")
    x = random_acts(12, N, dtype=torch.float64)
    z = torch.stack([sae.lens.transform(x[:, i], i) for i in range(N)], dim=1)
    want = reference.training_loss(
        z,
        sae.W_enc,
        sae.W_dec,
        sae.b_dec,
        k=sae.cfg.k,
        dead_latents=None,
        k_aux=sae.cfg.k_aux,
        aux_coefficient=sae.cfg.aux_loss_coefficient,
        standardize_inputs=True,
    )
    want.loss.backward()
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    step = sae.accumulate_gradients(x, None, micro_batch_size=5)
    torch.testing.assert_close(step.loss, want.loss.detach())
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    torch.testing.assert_close(output.loss, want.loss)
    assert torch.equal(output.sae_in, x)
    torch.testing.assert_close(output.sae_out, sae(x))


def test_nothing_trains_the_lens():
    sae = sae_with_lens(training=True)
    assert {name for name, _ in sae.named_parameters()} == {"W_enc", "W_dec", "b_dec"}


def test_settings_are_what_json_gives_back(tmp_path):
    sae = sae_with_lens()
    sae.save_model(tmp_path)
    saved = json.loads((tmp_path / SAE_CFG_FILENAME).read_text())
    assert saved["metadata"]["lens"] == sae.lens.config.to_dict()
