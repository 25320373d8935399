"""Lenses in closed form and Jacobian lenses: their numbers, files and training.

References: NumPy and SciPy on all vectors at once; `torch.autograd.functional.jacobian`
of whole models; the same run on vectors that were mapped beforehand.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, N_CTX, N_LAYERS, PAPER_DATA, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.load_model import load_model
from saes import HOOK_NAMES, random_acts, random_lens, random_sae
from scipy.linalg import orthogonal_procrustes
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_multilayer import LayerLens, cli, evaluate, fit_jacobian_lens, fit_lens
from sae_lens_multilayer.analysis import output_tokens
from sae_lens_multilayer.lens import jacobian, progress
from sae_lens_multilayer.lens.closed_form import (
    CLOSED_FORMS,
    Moments,
    fit_closed_form,
    least_squares,
    procrustes,
    rotation,
    whitening,
)
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.jacobian import read_jacobians, save_jacobians
from sae_lens_multilayer.lens.read import read_lens
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.store.source import ModelSource
from sae_lens_multilayer.training.lens_of_run import lens_of_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")
float64 = torch.float64
PRE = [name.replace("post", "pre") for name in HOOK_NAMES]


def vectors(n_tokens: int = 300, n_layers: int = 3, d: int = 5) -> torch.Tensor:
    """Layers with means, scales and directions of their own: [token, layer, d]."""
    common = torch.randn(n_tokens, d, dtype=float64)
    mix = torch.randn(n_layers, d, d, dtype=float64)
    noise = torch.randn(n_tokens, n_layers, d, dtype=float64)
    scale = 10.0 ** torch.arange(n_layers)[:, None]
    x = torch.einsum("td,lde->tle", common, mix) + 0.3 * noise
    return (x + 100) * scale


def closed_form(kind: Any, x: torch.Tensor, shrinkage: float = 0.0) -> LayerLens:
    names = [f"blocks.{i}.hook_mlp_out" for i in range(x.shape[1])]
    config = LensConfig(names, x.shape[1], x.shape[2], kind=kind)
    return fit_closed_form([x], config, shrinkage)


# Closed forms


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_moments_of_batches_are_those_of_all_vectors(sizes, seed):
    torch.manual_seed(seed)
    x = vectors(sum(sizes) + 2)
    moments = Moments(3, 5)
    for part in x.split([*sizes, 2]):
        moments.update(part)
    for layer in range(3):
        both = torch.cat([x[:, layer], x[:, -1]], 1).numpy()
        expected = np.cov(both, rowvar=False, bias=True)[:5]
        found = np.concatenate(moments.covariances(layer), 1)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.mean, x.mean(0))


def test_rotation_is_scipys_and_recovers_a_known_one():
    x = torch.randn(200, 7, dtype=float64)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=float64)).Q
    y = 3 * x @ turn
    assert (rotation(x.T @ y) - turn).abs().max() < 1e-10
    assert (procrustes(x.T @ x, x.T @ y) - 3 * turn).abs().max() < 1e-10
    y += torch.randn_like(y)
    expected, total = orthogonal_procrustes(x.numpy(), y.numpy())
    found = procrustes(x.T @ x, x.T @ y)
    scale = total / x.square().sum().item()
    np.testing.assert_allclose(found, scale * expected, atol=1e-10)


def test_least_squares_is_numpys():
    x, y = torch.randn(2, 200, 7, dtype=float64)
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(least_squares(x.T @ x, x.T @ y), expected, atol=1e-10)


def test_whitening_is_the_symmetric_inverse_root():
    own = torch.cov(vectors()[:, 0].T)
    a = whitening(own, own)
    torch.testing.assert_close(a, a.T, atol=1e-12, rtol=0)
    eye = torch.eye(5, dtype=float64)
    torch.testing.assert_close(a @ own @ a, eye, atol=1e-10, rtol=0)


def test_whitened_layers_have_mean_0_and_the_identity_as_covariance():
    x = vectors()
    z = closed_form("whitening", x).to(float64).transform(x)
    for layer in z.movedim(1, 0):
        cov = torch.cov(layer.T, correction=0)
        torch.testing.assert_close(cov, torch.eye(5, dtype=float64), atol=1e-4, rtol=0)
        assert layer.mean(0).abs().max() < 1e-3  # weights are float32


@pytest.mark.parametrize("kind", ["procrustes", "least_squares"])
def test_maps_to_the_last_layer_fit_it_with_its_mean(kind):
    x = vectors()
    lens = closed_form(kind, x).to(float64)
    z = lens.transform(x)
    assert torch.equal(z[:, -1], x[:, -1])
    for layer in range(2):
        torch.testing.assert_close(
            z[:, layer].mean(0), x[:, -1].mean(0), rtol=1e-5, atol=0
        )
        # No scaled version of the map is nearer.
        error = (z[:, layer] - x[:, -1]).square().sum()
        mean = x[:, -1].mean(0)
        for factor in (0.99, 1.01):
            other = (z[:, layer] - mean) * factor + mean
            assert (other - x[:, -1]).square().sum() > error


@given(
    kind=st.sampled_from([*CLOSED_FORMS]),
    d=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_the_inverse_undoes_every_form(kind, d, seed):
    torch.manual_seed(seed)
    x = vectors(d=d)
    lens = closed_form(kind, x).to(float64)
    torch.testing.assert_close(lens.invert(lens.transform(x)), x, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("kind", ["whitening", "least_squares"])
def test_vectors_without_all_dimensions_need_shrinkage(kind):
    x = vectors(d=6)
    x[..., 5] = x[..., 0]
    message = r"'blocks\.0\.hook_mlp_out' must vary in all 6 dimensions.*`shrinkage`"
    with pytest.raises(ValueError, match=message):
        closed_form(kind, x)
    if kind == "whitening":
        lens = closed_form(kind, x, shrinkage=1e-4).to(float64)
        torch.testing.assert_close(lens.invert(lens.transform(x)), x)


def test_a_map_that_is_not_invertible_is_refused():
    x = vectors()
    x[:, -1, 0] = 7  # constant at the last layer only
    with pytest.raises(ValueError, match=r"blocks\.0.* cannot be inverted accurately"):
        closed_form("least_squares", x)


@pytest.mark.parametrize("kind", [*CLOSED_FORMS])
def test_too_few_tokens_or_nan_are_an_error(kind):
    for n_tokens in (0, 5):
        with pytest.raises(
            ValueError, match=f"more tokens than d_in = 5; got {n_tokens}"
        ):
            closed_form(kind, vectors(n_tokens), shrinkage=0.1)
    for value in (torch.nan, torch.inf):
        x = vectors()
        x[7, 1, 2] = value
        message = r"\['blocks\.1\.hook_mlp_out'\] must not hold NaN"
        with pytest.raises(ValueError, match=message):
            closed_form(kind, x)


@pytest.mark.parametrize(
    ("kind", "shrinkage", "message"),
    [
        ("jacobian", 0.0, "in closed form must be in .*'procrustes'.*got 'jacobian'"),
        ("whitening", 1.0, r"`shrinkage` must be in \[0, 1\); got 1.0"),
    ],
)
def test_wrong_settings_are_errors(kind, shrinkage, message):
    config = LensConfig(HOOK_NAMES, N_LAYERS, 5, kind=kind)
    with pytest.raises(ValueError, match=message):
        fit_closed_form([vectors(n_layers=N_LAYERS)], config, shrinkage)


# Jacobian lenses


def brute_force(model: Any, tokens: torch.Tensor, layer: int, skip: int = 0):
    """As defined, from the derivative of all positions by all positions."""
    n_pos = tokens.shape[1]
    total, n = torch.zeros(D_MODEL, D_MODEL, dtype=float64), 0
    for prompt in tokens.split(1):
        start = model(prompt, stop_at_layer=layer + 1)

        def final(h):
            return model(h, start_at_layer=layer + 1, stop_at_layer=N_LAYERS)

        whole: Any = torch.autograd.functional.jacobian(final, start)
        whole = whole[0, :, :, 0]  # [to, d_in, from, d_in]
        counted = slice(skip, n_pos - 1)
        total += whole[counted, :, counted].sum((0, 2))
        n += n_pos - 1 - skip
    return total / n


@pytest.mark.parametrize("rows_per_pass", [1, 7, 16])
@pytest.mark.parametrize("batch_size_prompts", [1, 2])
def test_jacobians_equal_brute_force(model, rows_per_pass, batch_size_prompts):
    wide = HookedTransformer(model.cfg).to(float64)
    tokens = torch.randint(1, 512, (3, 6))
    lens = fit_jacobian_lens(
        wide,
        tokens,
        skip_first_positions=2,
        batch_size_prompts=batch_size_prompts,
        rows_per_pass=rows_per_pass,
    )
    expected = brute_force(wide, tokens, 0, skip=2)
    found = lens.get_buffer("0.weight") + torch.eye(D_MODEL)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    x = torch.randn(4, D_MODEL)
    torch.testing.assert_close(lens.transform(x, 0), x @ found.T, atol=1e-5, rtol=0)
    assert torch.equal(lens.transform(x, N_LAYERS - 1), x)


def test_a_model_without_blocks_of_its_own_is_the_identity(tokenizer):
    """A linear toy: no attention and an MLP of slope 0 add nothing to the stream."""
    model: Any = tiny_model(tokenizer, n_layers=3)
    for block in model.blocks:
        block.attn.W_O.data.zero_()
        block.mlp.W_out.data.zero_()
        block.mlp.b_out.data.normal_()
    lens = fit_jacobian_lens(model, torch.ones(1, 4).long(), skip_first_positions=0)
    for tensor in lens.buffers():
        assert tensor.abs().max() == 0


def test_a_linear_toy_has_the_product_of_its_blocks(tokenizer, monkeypatch):
    model: Any = tiny_model(tokenizer, n_layers=3)
    maps = torch.randn(3, D_MODEL, D_MODEL) / 4

    class Linear(torch.nn.Module):
        def __init__(self, a):
            super().__init__()
            self.a = a

        def forward(self, resid_pre, **_):
            return resid_pre @ self.a.T

    for i in range(3):
        model.blocks[i] = Linear(maps[i])
    # The check of the blocks would compare them with a whole pass.
    monkeypatch.setattr(type(as_model(model)), "walk_obstacle", None)
    tokens = torch.ones(2, 4).long()
    lens = fit_jacobian_lens(model, tokens, skip_first_positions=0)
    for i, expected in enumerate([maps[2] @ maps[1], maps[2]]):
        found = lens.get_buffer(f"{i}.weight") + torch.eye(D_MODEL)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_hugging_face_models_have_the_same_one():
    folder = str(PAPER_DATA / "model")
    models = {
        "gpt_neox.layers.{}": load_model("AutoModelForCausalLM", folder, "cpu", {}),
        "blocks.{}.hook_out": TransformerBridge.boot_transformers(folder, device="cpu"),
    }
    tokens = torch.randint(1, 512, (1, 5))
    first, second = (
        fit_jacobian_lens(
            model,
            tokens,
            [name.format(i) for i in range(5)],
            skip_first_positions=1,
            rows_per_pass=32,
        ).state_dict()
        for name, model in models.items()
    )
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-4)


def test_prompts_that_are_too_short_are_an_error(model):
    tokens = torch.ones(1, N_CTX).long()
    with pytest.raises(ValueError, match="`skip_first_positions` = 16 and before"):
        fit_jacobian_lens(model, tokens)


def test_a_model_of_one_block_has_no_jacobian_lens(tokenizer):
    model = tiny_model(tokenizer, n_layers=1)
    with pytest.raises(ValueError, match=r"must have at least 2 blocks; .* has 1"):
        fit_jacobian_lens(model, torch.ones(1, 4).long(), skip_first_positions=0)


def test_inference_mode_changes_nothing(model):
    tokens = torch.randint(1, 512, (1, 6))
    expected = fit_jacobian_lens(model, tokens, skip_first_positions=0).state_dict()
    with torch.inference_mode():
        lens = fit_jacobian_lens(model, tokens.clone(), skip_first_positions=0)
    for name, tensor in lens.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_jacobian_file_needs_a_new_path(model, tmp_path, monkeypatch):
    """An empty folder, refused before the fit; or one that appears during it."""
    tokens = torch.randint(1, 512, (1, 6))
    with pytest.raises(FileExistsError, match="`output_path` must be a new file"):
        fit_jacobian_lens(model, tokens, output_path=tmp_path)
    path = tmp_path / "lens.pt"
    mean_jacobians = jacobian._mean_jacobians

    def slow(*args):
        path.mkdir()
        (path / "file").touch()
        return mean_jacobians(*args)

    monkeypatch.setattr(jacobian, "_mean_jacobians", slow)
    fit_jacobian_lens(model, tokens, skip_first_positions=0, output_path=path)
    (saved,) = tmp_path.glob("lens-*.pt")
    assert sorted(read_jacobians(saved)) == [*range(N_LAYERS - 1)]


def test_a_jacobian_fit_continues_after_an_error(model, tmp_path, monkeypatch):
    tokens = torch.randint(1, 512, (3, 6))
    expected = fit_jacobian_lens(model, tokens, skip_first_positions=0).state_dict()
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SAVES", 0)
    streams, path = jacobian._streams, tmp_path / "lens.pt"
    n_batches = 0

    def fit(fails_at: int, tokens: torch.Tensor = tokens) -> Any:
        def count(*args):
            nonlocal n_batches
            n_batches += 1
            if n_batches == fails_at:
                raise MemoryError
            return streams(*args)

        monkeypatch.setattr(jacobian, "_streams", count)
        return fit_jacobian_lens(
            model, tokens, skip_first_positions=0, output_path=path
        )

    with pytest.raises(MemoryError):
        fit(fails_at=1)
    assert not any(tmp_path.iterdir())  # nothing was done
    with pytest.raises(MemoryError):
        fit(fails_at=4)  # the third batch of three
    with pytest.raises(ValueError, match=r"(?s)`prompts`.*Delete .*lens.pt.partial"):
        fit(0, tokens.flip(0))
    lens = fit(0)
    assert n_batches == 5
    for name, tensor in lens.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert [one.name for one in tmp_path.iterdir()] == ["lens.pt"]


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
@pytest.mark.parametrize(
    "killed_in", ["_remove", "remove_folder", "remove_leftovers", "rmdir"]
)
def test_a_fit_killed_while_it_cleans_up_leaves_nothing(
    kind, killed_in, offline, tmp_path, monkeypatch
):
    """The next run is refused, as the lens is there, and removes the rest."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SAVES", 0)
    few = ["--n_tokens", "128", "--n_steps", "2", "--skip_first_positions", "1"]
    command = ["lens", "run.yaml", "--kind", kind, "--output_path", "new", *few]
    before = {path.name for path in tmp_path.iterdir()}
    owner = Path if killed_in == "rmdir" else progress
    original = getattr(owner, killed_in)

    def kill(*args):
        if (tmp_path / "new").exists():
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, killed_in, kill)
        with pytest.raises(SystemExit, match="130"):
            cli.main(command)
    assert (tmp_path / "new.partial").exists()
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        cli.main(command)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "new"}


def test_the_state_of_a_fit_stays_if_another_file_has_its_name(
    model, tmp_path, monkeypatch
):
    """Its fit had not begun to save, so that file is not its lens."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SAVES", 0)
    tokens = torch.randint(1, 512, (3, 6))
    settings = {"skip_first_positions": 0, "output_path": tmp_path / "lens.pt"}
    monkeypatch.setattr(progress.FitProgress, "save_output", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_jacobian_lens(model, tokens, **settings)
    (tmp_path / "lens.pt").touch()
    with pytest.raises(FileExistsError):
        fit_jacobian_lens(model, tokens, **settings)
    assert [*tmp_path.glob("lens.pt.partial/batches-*")]


def test_a_jacobian_file_is_read_again(model, tmp_path):
    tokens = torch.randint(1, 512, (2, 6))
    path = tmp_path / "new" / "lens.pt"
    lens = fit_jacobian_lens(model, tokens, skip_first_positions=0, output_path=path)
    contents = torch.load(path, weights_only=True)
    assert contents["n_prompts"] == 2
    assert contents["source_layers"] == [*range(N_LAYERS - 1)]
    assert contents["d_model"] == D_MODEL
    again = read_lens(path, HOOK_NAMES, N_LAYERS)
    for name, tensor in lens.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    # The input of block 1 is the output of block 0.
    pre = read_lens(path, PRE[1:], N_LAYERS)
    x = torch.randn(3, D_MODEL)
    assert torch.equal(pre.transform(x, 0), lens.transform(x, 0))
    with pytest.raises(ValueError, match=r"\[.*0.hook_resid_pre'\]; it has .*\[0\]"):
        read_lens(path, PRE, N_LAYERS)
    with pytest.raises(FileExistsError):
        save_jacobians(path, {0: torch.eye(2)}, 1)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "KeyError"),
        ({"J": {}}, r"shapes \[\]"),
        ({"J": [torch.eye(2)]}, "AttributeError"),
        ({"J": {"a": torch.eye(2)}}, "ValueError: invalid literal"),
        ({"J": {0: torch.eye(2)[:1]}}, r"\[\(1, 2\)\]"),
        ({"J": {0: torch.eye(2), 1: torch.eye(3)}}, r"\[\(2, 2\), \(3, 3\)\]"),
        ({"J": {0: torch.eye(2)}, "d_model": 3}, r"matrices \[3, 3\]"),
        ({"J": {0: torch.eye(2), 3: torch.eye(2) / 0}}, r"not finite: \[3\]"),
        ({"J": {-1: torch.eye(2)}}, "blocks from 0"),
        ({"J": {0: torch.eye(2)}, "more": Evil()}, "UnpicklingError"),
    ],
)
def test_a_damaged_jacobian_file_is_an_error(contents, message, tmp_path):
    path = tmp_path / "lens.pt"
    torch.save(contents, path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_jacobians(path)


def test_an_ill_conditioned_jacobian_is_refused(tmp_path):
    save_jacobians(tmp_path / "lens.pt", {0: torch.diag(torch.tensor([1, 1e-7]))}, 1)
    with pytest.raises(ValueError, match=r"cond\(I \+ W\) = 8\.39e\+06"):
        read_lens(tmp_path / "lens.pt", HOOK_NAMES, N_LAYERS)


# Runs


@pytest.fixture
def start(model, token_dataset):
    def start(config, **overrides) -> Any:
        settings = {"override_model": model, "override_dataset": token_dataset}
        return LanguageModelSAETrainingRunner(config, **{**settings, **overrides})

    return start


@pytest.fixture
def lens_of_kind(model, token_dataset, make_config):
    def fit(kind: Any, **changes: Any) -> LayerLens:
        if kind == "jacobian":
            tokens = torch.tensor(token_dataset["input_ids"][:2])
            return fit_jacobian_lens(model, tokens, skip_first_positions=0)
        given = {"override_model": model, "override_dataset": token_dataset}
        return fit_lens(make_config(**changes), kind, 400, **given)

    return fit


KINDS = [*CLOSED_FORMS, "jacobian"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_on_vectors_mapped_beforehand(
    kind, start, make_config, lens_of_kind, model, tmp_path, monkeypatch, token_dataset
):
    """And the lens is saved with the SAE, loaded, and used by evaluation and views."""
    lens = lens_of_kind(kind)
    lens.save(tmp_path / "lens")
    config = make_config(lens=str(tmp_path / "lens"))
    with_lens = start(config).run()
    assert with_lens.cfg.metadata.lens["kind"] == kind
    loaded: Any = SAE.load_from_disk(config.output_path)
    assert loaded.lens.is_same(lens)
    tokens = torch.tensor(token_dataset["input_ids"][:8])
    tables = [evaluate(s, model, tokens) for s in (with_lens, loaded, loaded.views())]
    for table in tables[1:]:
        torch.testing.assert_close(table.fvu, tables[0].fvu, atol=1e-5, rtol=1e-4)
    activations = ModelSource.activations

    def mapped(source, tokens):
        acts = activations(source, tokens)
        return {name: lens.transform(x, name) for name, x in acts.items()}

    monkeypatch.setattr(ModelSource, "activations", mapped)
    beforehand = start(make_config(output_path=None)).run()
    with_lens.lens = None
    for name, tensor in beforehand.state_dict().items():
        torch.testing.assert_close(with_lens.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_fitted_lens_is_saved(kind, start, make_config, lens_of_kind):
    """The object itself, which no file of a lens has made contiguous."""
    lens = lens_of_kind(kind)
    config = make_config(lens=lens, training_tokens=128)
    trained = start(config).run()
    loaded: Any = SAE.load_from_disk(config.output_path)
    assert loaded.lens.is_same(lens)
    x = random_acts(3, N_LAYERS)
    torch.testing.assert_close(loaded(x), trained(x))


def test_a_lens_of_other_strides_is_saved_with_its_sae(tmp_path):
    sae = random_sae()
    lens = random_lens()
    tensors = {
        n: t.T.contiguous().T if t.ndim == 2 else t
        for n, t in lens.state_dict().items()
    }
    sae.lens = LayerLens.from_tensors(lens.config, tensors)
    assert not sae.state_dict()["lens.0.weight"].is_contiguous()
    sae.save_model(tmp_path)
    loaded: Any = SAE.load_from_disk(tmp_path)
    assert loaded.lens.is_same(lens)


@pytest.mark.parametrize("kind", [*CLOSED_FORMS])
def test_a_run_on_a_cache_fits_the_same_lens(
    kind, cache_config, harvest, model, token_dataset
):
    harvest(cache_config())
    live = fit_lens(
        cache_config(),
        kind,
        10**9,
        override_model=model,
        override_dataset=token_dataset,
    )
    cached = fit_lens(cache_config(use_cached_activations=True), kind, 10**9)
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(
            cached.state_dict()[name], tensor, atol=1e-4, rtol=1e-4
        )


def test_a_run_on_some_layers_uses_a_part_of_a_saved_lens(
    lens_of_kind, make_config, tmp_path, model
):
    lens = lens_of_kind("whitening")
    lens.save(tmp_path / "lens")
    shape = as_model(model).shape
    cfg = make_config(lens=tmp_path / "lens", layers=[1])
    part: Any = lens_of_run(cfg, [HOOK_NAMES[1]], shape)
    x = torch.randn(3, D_MODEL)
    assert torch.equal(part.transform(x, 0), lens.transform(x, 1))
    with pytest.raises(ValueError, match="hooks in the same order"):
        lens_of_run(cfg, [PRE[1]], shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unembedding_reads_no_whitened_space(kind, lens_of_kind, model):
    sae = random_sae()
    sae.lens = lens_of_kind(kind)
    found = output_tokens(sae, model, n_top=2)
    expected = ["decoder"] * (kind != "whitening") + ["layer_0", "layer_1"]
    assert found.rows == expected


@pytest.mark.parametrize("kind", ["tuned", "whitening", "jacobian"])
def test_the_command_fits_each_kind_and_training_reads_it(kind, offline, tmp_path):
    few = ["--n_tokens", "128", "--n_steps", "2", "--skip_first_positions", "1"]
    cli.main(["lens", "run.yaml", "--kind", kind, "--output_path", "new", *few])
    cli.main(["train", "--config", "run.yaml", "--lens", "new", "--output_path", "out"])
    sae: Any = SAE.load_from_disk("out")
    assert sae.lens.config.kind == kind


def test_the_command_needs_no_inverse_of_layers_left_out(
    offline, tmp_path, monkeypatch
):
    """The first block's map is singular; the last block's is the identity."""
    singular = {0: torch.zeros(D_MODEL, D_MODEL)}
    monkeypatch.setattr(jacobian, "_mean_jacobians", lambda *_: singular)
    few = ["--kind", "jacobian", "--n_tokens", "128", "--skip_first_positions", "1"]
    with pytest.raises(SystemExit, match=r"blocks\.0\..* cannot be inverted"):
        cli.main(["lens", "run.yaml", "--output_path", "all.pt", *few])
    settings = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(settings[:-1] + ", layers: [1]}")
    cli.main(["lens", "run.yaml", "--output_path", "last.pt", *few])
    for name in ("all.pt", "last.pt"):
        assert list(read_jacobians(tmp_path / name)) == [0]
