"""Published checkpoints through SAELens' own loading, without a network.

Reference: the paper's own code, whose configs, tensors and reconstructions are in
tests/data/paper.
"""

import json
from functools import partial
from typing import Any

import pytest
import torch
from conftest import PAPER_DATA
from published_files import (
    lens_files,
    lens_transformer_files,
    paper_config,
    paper_tensors,
    plain_files,
    transformer_files,
    tuned_lens_files,
)
from sae_lens import SAE, TopKSAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from safetensors.torch import load, load_file, save

from examples.local_hub import put
from sae_lens_multilayer import (
    MultiLayerSAE,
    mlsae_disk_loader,
    mlsae_huggingface_loader,
)
from sae_lens_multilayer.published import format as mlsae_format

RELEASE, SAE_ID = "mlsae-pythia-70m-deduped", "x64-k32"
REPOSITORY = f"tim-lawson/{RELEASE}-{SAE_ID}"
HOOK_NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
# What a published single-layer SAE of block 3 is called, and its files.
SINGLE = "sae-pythia-70m-deduped", "x64-k32{}-layers-3"


@pytest.fixture(scope="module")
def paper() -> dict[str, torch.Tensor]:
    """The paper's reconstructions of the first prompt at its five layers."""
    x = load_file(PAPER_DATA / "activations.safetensors")["resid_post"][:, :1]
    return {"x": x, "x_hat": load_file(PAPER_DATA / "plain.safetensors")["recons"]}


@pytest.fixture
def published(offline_hub):
    """The published MLSAE in the cache."""
    return put(offline_hub, REPOSITORY, plain_files())


def assert_reconstructs(sae, x, x_hat):
    with torch.no_grad():
        torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)


# Every kind


@pytest.mark.parametrize(
    "place", [(RELEASE, SAE_ID), (REPOSITORY, SAE_ID)], ids=["release", "repository"]
)
def test_a_published_mlsae_reconstructs_as_the_papers_code(published, paper, place):
    sae = SAE.from_pretrained(*place)

    assert type(sae) is MultiLayerSAE
    assert sae.cfg.metadata.hook_names == HOOK_NAMES
    assert (sae.cfg.k, sae.cfg.d_in, sae.cfg.d_sae) == (8, 64, 512)
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-70m-deduped"
    assert_reconstructs(sae, paper["x"], paper["x_hat"])


@pytest.mark.parametrize("layer", range(5))
def test_one_hook_of_it_is_a_stock_sae(published, paper, layer):
    sae = SAE.from_pretrained(RELEASE, f"{SAE_ID}/{HOOK_NAMES[layer]}")
    by_repository = SAE.from_pretrained(REPOSITORY, f"{SAE_ID}/{HOOK_NAMES[layer]}")

    for each in (sae, by_repository):
        assert type(each) is TopKSAE
        assert each.cfg.metadata.hook_name == HOOK_NAMES[layer]
        assert each.cfg.metadata.hook_names is None
        assert_reconstructs(each, paper["x"][layer], paper["x_hat"][layer])


def test_the_views_of_it_are_its_hooks(published, paper):
    sae: Any = SAE.from_pretrained(RELEASE, SAE_ID)

    for layer, view in enumerate(sae.views()[:5]):
        assert_reconstructs(view, paper["x"][layer], paper["x_hat"][layer])


def test_extra_buffers_beside_the_weights_are_ignored(offline_hub, paper):
    put(
        offline_hub,
        REPOSITORY,
        plain_files(last_nonzero=torch.zeros(512, dtype=torch.long)),
    )

    sae = SAE.from_pretrained(RELEASE, SAE_ID)

    assert set(sae.state_dict()) == {"W_enc", "W_dec", "b_dec"}
    assert_reconstructs(sae, paper["x"], paper["x_hat"])


def test_a_checkpoint_with_the_transformer_has_the_hooks_of_that(
    offline_hub, paper, caplog
):
    put(offline_hub, f"{REPOSITORY}-tfm", transformer_files())

    sae = SAE.from_pretrained(RELEASE, f"{SAE_ID}-tfm")
    view = SAE.from_pretrained(RELEASE, f"{SAE_ID}-tfm/{HOOK_NAMES[2]}")

    assert sae.cfg.metadata.hook_names == HOOK_NAMES[:5]
    assert "its name or its model" in caplog.text
    assert sae.cfg.metadata.context_size == 64
    assert_reconstructs(sae, paper["x"], paper["x_hat"])
    assert_reconstructs(view, paper["x"][2], paper["x_hat"][2])


def test_of_a_file_with_the_transformer_only_the_autoencoder_is_read(
    offline_hub, monkeypatch
):
    put(offline_hub, f"{REPOSITORY}-tfm", transformer_files())
    read: list[str] = []

    class Spy:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    original = mlsae_format.safe_open
    monkeypatch.setattr(
        mlsae_format, "safe_open", lambda *a, **k: Spy(original(*a, **k))
    )

    SAE.from_pretrained(RELEASE, f"{SAE_ID}-tfm")

    assert read == [f"autoencoder.{name}" for name in paper_tensors()]


@pytest.mark.parametrize("variant", ["", "-tfm"])
def test_a_published_single_layer_sae_is_a_stock_sae(offline_hub, paper, variant):
    release, sae_id = SINGLE[0], SINGLE[1].format(variant)
    files = transformer_files(layers=[3]) if variant else plain_files()
    put(offline_hub, f"tim-lawson/{release}-{sae_id}", files)

    sae = SAE.from_pretrained(release, sae_id)

    assert type(sae) is TopKSAE
    assert sae.cfg.metadata.hook_name == HOOK_NAMES[3]
    assert_reconstructs(sae, paper["x"][3], paper["x_hat"][3])


def test_an_unlisted_repository_loads_with_the_converter(offline_hub, paper):
    put(offline_hub, "someone/mlsae-pythia-160m-deduped-x3-k5", plain_files())
    load = partial(SAE.from_pretrained, converter=mlsae_huggingface_loader)

    sae = load("someone/mlsae-pythia-160m-deduped-x3-k5", "")
    one = load("someone/mlsae-pythia-160m-deduped-x3-k5", HOOK_NAMES[4])

    assert len(sae.cfg.metadata.hook_names) == 12
    assert_reconstructs(sae, paper["x"], paper["x_hat"])
    assert_reconstructs(one, paper["x"][4], paper["x_hat"][4])


def test_a_repository_without_a_model_name_accepts_one(offline_hub, paper):
    put(offline_hub, "someone/weights", plain_files())
    loader = partial(mlsae_huggingface_loader, model_name="pythia-70m-deduped")

    sae = SAE.from_pretrained("someone/weights", "", converter=loader)
    one = SAE.from_pretrained("someone/weights", HOOK_NAMES[4], converter=loader)

    assert sae.cfg.metadata.hook_names == HOOK_NAMES
    assert_reconstructs(sae, paper["x"], paper["x_hat"])
    assert_reconstructs(one, paper["x"][4], paper["x_hat"][4])


# With a tuned lens


@pytest.fixture(scope="module")
def paper_lens_path() -> dict[str, torch.Tensor]:
    """32 positions of the first prompt at five layers, and their reconstructions.

    Those are taken back by the exact inverse of the paper's lens, in float64, which
    the paper's own code does not do.
    """
    x = load_file(PAPER_DATA / "activations.safetensors")["resid_post"][:, 0, :32]
    stored = load_file(PAPER_DATA / "lens.safetensors")
    return {"x": x, "x_hat": stored["recons_true_inverse_head"]}


def assert_reconstructs_with_lens(sae: Any, paper, layers):
    """`layers` are those of the SAE's hooks."""
    assert type(sae) is MultiLayerSAE
    names = [HOOK_NAMES[layer] for layer in layers]
    assert sae.cfg.metadata.hook_names == names
    assert sae.lens is not None
    assert sae.lens.config.alignment == "reference"
    for layer in set(layers) & set(range(5)):
        x, expected = paper["x"][layer], paper["x_hat"][layer]
        with torch.no_grad():
            hook = HOOK_NAMES[layer]
            x_hat = sae.decode(sae.encode(x, hook), hook)
        torch.testing.assert_close(x_hat, expected, rtol=1e-5, atol=1e-5)


LENS_SPACE = "AlignmentResearch/tuned-lens"


def put_lens(cache, n_layers=6):
    folder = "lens/EleutherAI/pythia-70m-deduped"
    files = {f"{folder}/{k}": v for k, v in tuned_lens_files(n_layers).items()}
    return put(cache, LENS_SPACE, files, kind="spaces") / folder


@pytest.mark.parametrize("variant", ["", "-tfm"])
def test_a_published_lens_mlsae_carries_its_lens(offline_hub, paper_lens_path, variant):
    n_layers = 5 if variant else 6
    files = lens_transformer_files() if variant else lens_files()
    put(offline_hub, f"{REPOSITORY}-lens{variant}", files)
    if not variant:
        put_lens(offline_hub)

    sae: Any = SAE.from_pretrained(RELEASE, f"{SAE_ID}-lens{variant}")
    one = SAE.from_pretrained(RELEASE, f"{SAE_ID}-lens{variant}/{HOOK_NAMES[3]}")

    assert_reconstructs_with_lens(sae, paper_lens_path, range(n_layers))
    assert_reconstructs_with_lens(one, paper_lens_path, [3])
    assert_reconstructs(
        sae.view(2), paper_lens_path["x"][2], paper_lens_path["x_hat"][2]
    )
    assert sae.lens.config.unembed_hash == (None if variant else "88")


def test_a_published_single_layer_sae_with_a_lens_carries_it(
    offline_hub, paper_lens_path
):
    sae_id = "x64-k32-lens-layers-3"
    put(offline_hub, f"tim-lawson/sae-pythia-70m-deduped-{sae_id}", lens_files())
    put_lens(offline_hub)

    sae = SAE.from_pretrained("sae-pythia-70m-deduped", sae_id)

    assert_reconstructs_with_lens(sae, paper_lens_path, [3])


def test_a_saved_lens_mlsae_is_the_same(offline_hub, paper_lens_path, tmp_path):
    put(offline_hub, f"{REPOSITORY}-lens-tfm", lens_transformer_files())
    SAE.from_pretrained(RELEASE, f"{SAE_ID}-lens-tfm").save_model(tmp_path / "saved")

    sae = SAE.load_from_disk(tmp_path / "saved")

    assert_reconstructs_with_lens(sae, paper_lens_path, range(5))


def test_a_folder_takes_the_lens_that_is_given(offline_hub, paper_lens_path, tmp_path):
    for file, content in lens_files().items():
        (tmp_path / file).write_bytes(content)
    lens = put_lens(offline_hub, n_layers=5)
    converter = partial(mlsae_disk_loader, tuned_lens=lens)

    sae = SAE.load_from_disk(tmp_path, converter=converter)

    # The model is unknown; the lens gives the number of layers.
    assert_reconstructs_with_lens(sae, paper_lens_path, range(5))


def test_a_repository_takes_the_lens_that_is_given(offline_hub, paper_lens_path):
    put(offline_hub, "someone/weights", lens_files())
    lens = put_lens(offline_hub, n_layers=5)
    converter = partial(mlsae_huggingface_loader, tuned_lens=lens)

    sae = SAE.from_pretrained("someone/weights", "", converter=converter)

    assert_reconstructs_with_lens(sae, paper_lens_path, range(5))


def test_a_lens_that_cannot_be_loaded_is_an_error(offline_hub):
    put(offline_hub, f"{REPOSITORY}-lens", lens_files())

    with pytest.raises(ValueError, match="no tuned lens 'EleutherAI/pythia-70m-ded"):
        SAE.from_pretrained(RELEASE, f"{SAE_ID}-lens")


def test_a_lens_of_a_model_of_another_depth_is_an_error(offline_hub):
    put(offline_hub, f"{REPOSITORY}-lens", lens_files())
    put_lens(offline_hub, n_layers=7)

    with pytest.raises(ValueError, match=r"for 7 blocks of width 64.*has 6 of"):
        SAE.from_pretrained(RELEASE, f"{SAE_ID}-lens")


def test_a_stored_lens_without_a_tensor_is_an_error(offline_hub):
    files = lens_transformer_files()
    tensors = load(files["model.safetensors"])
    del tensors["lens.layer_translators.2.bias"]
    put(
        offline_hub,
        f"{REPOSITORY}-lens-tfm",
        {**files, "model.safetensors": save(tensors)},
    )

    with pytest.raises(KeyError, match=r"2\.bias"):
        SAE.from_pretrained(RELEASE, f"{SAE_ID}-lens-tfm")


@pytest.mark.parametrize("sae_id", [SAE_ID, f"{SAE_ID}/{HOOK_NAMES[1]}"])
def test_the_config_alone_shows_that_there_is_a_lens(offline_hub, sae_id):
    put(offline_hub, f"{REPOSITORY}-lens", lens_files())
    put_lens(offline_hub)
    sae_id = sae_id.replace(SAE_ID, f"{SAE_ID}-lens")

    cfg = load_sae_config_from_huggingface(RELEASE, sae_id)

    loaded = SAE.from_pretrained(RELEASE, sae_id).cfg.to_dict()
    # The hash is in the lens' own files only.
    loaded["metadata"]["lens"]["unembed_hash"] = None
    assert cfg["metadata"].items() <= loaded["metadata"].items()


# The config, dtype and memory


@pytest.mark.parametrize("sae_id", [SAE_ID, f"{SAE_ID}/{HOOK_NAMES[1]}"])
@pytest.mark.parametrize("variant", ["", "-tfm"])
def test_the_config_alone_is_that_of_the_loaded_sae(offline_hub, sae_id, variant):
    files = transformer_files() if variant else plain_files()
    if variant:
        # The sizes of a `-tfm` come from the model.
        settings = {"expansion_factor": 8, "k": 8, "model_name": "pythia-70m-deduped"}
        files["config.json"] = json.dumps(settings).encode()
    put(offline_hub, REPOSITORY + variant, files)
    sae_id = sae_id.replace(SAE_ID, SAE_ID + variant)

    cfg = load_sae_config_from_huggingface(RELEASE, sae_id)

    if variant:
        assert (cfg["d_in"], cfg["d_sae"]) == (512, 4096)
    else:
        loaded = SAE.from_pretrained(RELEASE, sae_id).cfg.to_dict()
        assert cfg.items() <= {**loaded, "metadata": cfg["metadata"]}.items()
        assert cfg["metadata"].items() <= loaded["metadata"].items()


def test_dtype_and_device_are_the_requested_ones(published):
    sae = SAE.from_pretrained(RELEASE, SAE_ID, dtype="bfloat16", device="cpu")

    assert {p.dtype for p in sae.parameters()} == {torch.bfloat16}
    assert sae.cfg.dtype == "bfloat16"


def test_two_loads_share_no_memory(published):
    first, second = (SAE.from_pretrained(RELEASE, SAE_ID) for _ in range(2))

    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()

    assert all(parameter.any() for parameter in second.parameters())


@pytest.mark.parametrize("sae_id", [SAE_ID, f"{SAE_ID}/{HOOK_NAMES[1]}"])
def test_a_loaded_sae_can_be_saved_as_saelens_own(published, paper, tmp_path, sae_id):
    SAE.from_pretrained(RELEASE, sae_id).save_model(tmp_path / "saved")

    sae = SAE.load_from_disk(tmp_path / "saved")

    assert_reconstructs(sae, paper["x"][1], paper["x_hat"][1])


# Folders


@pytest.mark.parametrize("name", ["snapshot", "repository", "elsewhere"])
def test_a_downloaded_folder_loads(published, paper, tmp_path, name):
    folder = {
        "snapshot": published,
        "repository": tmp_path / REPOSITORY.split("/")[1],
        "elsewhere": tmp_path / "elsewhere",
    }[name]
    folder.mkdir(exist_ok=True)
    if name != "snapshot":
        for file, content in plain_files().items():
            (folder / file).write_bytes(content)
    converter = mlsae_disk_loader
    if name == "elsewhere":
        converter = partial(converter, model_name="pythia-70m-deduped")

    sae = SAE.load_from_disk(folder, converter=converter)

    assert type(sae) is MultiLayerSAE
    assert sae.cfg.metadata.hook_names == HOOK_NAMES
    assert_reconstructs(sae, paper["x"], paper["x_hat"])


def test_our_class_takes_the_published_files_and_saelens_own(tmp_path, paper):
    folder = tmp_path / "mlsae-pythia-70m-deduped-x64-k32"
    folder.mkdir()
    for file, content in plain_files().items():
        (folder / file).write_bytes(content)

    published = MultiLayerSAE.load_from_disk(folder)
    published.save_model(tmp_path / "saved")
    saved = MultiLayerSAE.load_from_disk(str(tmp_path / "saved"), dtype="float64")

    assert_reconstructs(published, paper["x"], paper["x_hat"])
    assert saved.W_dec.dtype == torch.float64
    assert saved.cfg.metadata.hook_names == HOOK_NAMES


def test_loading_names_missing_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match="must be a folder with the publis"):
            MultiLayerSAE.load_from_disk(folder)


def test_a_folder_without_a_model_name_loads_without_hooks(tmp_path, paper, caplog):
    for file, content in plain_files().items():
        (tmp_path / file).write_bytes(content)

    sae: Any = SAE.load_from_disk(tmp_path, converter=mlsae_disk_loader)

    assert_reconstructs(sae, paper["x"], paper["x_hat"])
    assert "no hooks" in caplog.text
    with pytest.raises(ValueError, match="must name its hooks"):
        sae.views()


def test_a_lens_of_a_model_that_nothing_names_is_an_error(tmp_path):
    for file, content in lens_files().items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "config.json").write_bytes(paper_config("mlsae", tuned_lens=True))

    with pytest.raises(ValueError, match="language model"):
        SAE.load_from_disk(tmp_path, converter=mlsae_disk_loader)


def test_the_transformer_in_the_file_gives_the_hooks(tmp_path):
    for file, content in transformer_files().items():
        (tmp_path / file).write_bytes(content)

    sae = SAE.load_from_disk(tmp_path, converter=mlsae_disk_loader)

    # The paper's tiny model, in a folder of this name.
    assert sae.cfg.metadata.model_name == "model"
    assert sae.cfg.metadata.hook_names == HOOK_NAMES[:5]


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("mlsae-gpt2-x8-k8", "'d_in'"),
        ("mlsae-gpt2-x8-k8-tfm", "'d_in'"),
        ("mlsae-gpt2-x9-k8", f"'d_sae': {9 * 64}"),
        ("mlsae-gpt2-x8-k9", "'k': 9"),
    ],
)
def test_sizes_that_the_name_contradicts_are_warned_of(
    offline_hub, caplog, name, differing
):
    put(offline_hub, f"me/{name}", plain_files())

    sae = SAE.from_pretrained(f"me/{name}", "", converter=mlsae_huggingface_loader)

    assert (sae.cfg.d_sae, sae.cfg.k) == (8 * 64, 8)
    expected = caplog.text.rpartition(" has {")[2]
    assert "'d_in': 768" in expected
    assert differing in expected


def test_a_folder_of_one_layer_is_a_stock_sae(tmp_path, paper):
    folder = tmp_path / "sae-pythia-70m-deduped-x64-k32-layers-3"
    folder.mkdir()
    for file, content in plain_files().items():
        (folder / file).write_bytes(content)

    sae = SAE.load_from_disk(folder, converter=mlsae_disk_loader, dtype="float64")

    assert type(sae) is TopKSAE
    assert sae.W_enc.dtype == torch.float64
    with torch.no_grad():
        x_hat = sae(paper["x"][3].double()).float()
    torch.testing.assert_close(x_hat, paper["x_hat"][3], rtol=1e-5, atol=1e-5)


# Bad input


def test_without_a_network_or_a_cached_file_it_is_not_found(offline_hub):
    files = {"config.json": paper_config("mlsae"), "pytorch_model.bin": b"a pickle"}
    put(offline_hub, REPOSITORY, files)

    for sae_id in (SAE_ID, "x64-k64"):
        with pytest.raises(FileNotFoundError):
            SAE.from_pretrained(RELEASE, sae_id)


def _changed(name: str, tensor: torch.Tensor) -> bytes:
    return save({**paper_tensors(), name: tensor})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"k": 8, ', "must be JSON"),
        ("config.json", b'{"model_type": "gpt_neox"}', "must be the config of an MLSA"),
        ("config.json", paper_config("mlsae", k=513), "contradict .*'k': 513"),
        ("config.json", paper_config("mlsae", n_inputs=65), "contradict .*: 65"),
        ("config.json", paper_config("mlsae", expansion_factor=9), "contradict .*: 9"),
        ("config.json", paper_config("mlsae", layers=[7]), r"in \[0, 6\)"),
        ("model.safetensors", b"", "must be a complete safetensors file"),
        (
            "model.safetensors",
            plain_files()["model.safetensors"][:-1],
            "must be a complete safetensors file",
        ),
        ("model.safetensors", save({"weight": torch.ones(2)}), "is not an MLSAE"),
        (
            "model.safetensors",
            _changed("decoder.weight", torch.ones(512, 64)),
            "contradict .* shapes",
        ),
        (
            "model.safetensors",
            _changed("pre_encoder_bias", torch.ones(65)),
            "contradict .* shapes",
        ),
    ],
)
def test_files_that_are_not_a_valid_mlsae_are_an_error(
    offline_hub, name, content, message
):
    put(offline_hub, REPOSITORY, {**plain_files(), name: content})

    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(RELEASE, SAE_ID)


def test_a_model_unknown_to_transformer_lens_is_an_error(offline_hub):
    put(offline_hub, "me/mlsae-pythia-71m-x8-k8", plain_files())

    with pytest.raises(ValueError, match=r"no model 'pythia-71m'.*70m"):
        SAE.from_pretrained(
            "me/mlsae-pythia-71m-x8-k8", "", converter=mlsae_huggingface_loader
        )


def test_a_model_whose_config_is_not_cached_is_an_error(offline_hub):
    put(offline_hub, "me/mlsae-gpt2-xl-x8-k8", plain_files())

    with pytest.raises(FileNotFoundError, match="config of 'gpt2-xl'"):
        SAE.from_pretrained(
            "me/mlsae-gpt2-xl-x8-k8", "", converter=mlsae_huggingface_loader
        )


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_file_is_an_error(tmp_path, missing):
    files = plain_files()
    del files[missing]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)

    with pytest.raises(FileNotFoundError, match=rf"'{missing}'.* missing"):
        SAE.load_from_disk(tmp_path, converter=mlsae_disk_loader)


def test_a_pickle_in_place_of_the_weights_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / "config.json").write_bytes(paper_config("mlsae"))
    for name in ("model.safetensors", "pytorch_model.bin"):
        torch.save(Evil(), tmp_path / name)

    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        SAE.load_from_disk(tmp_path, converter=mlsae_disk_loader)
    assert not (tmp_path / "ran").exists()
