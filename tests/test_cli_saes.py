"""The commands that train, evaluate and analyse, on the tiny model."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
import torch
from conftest import D_MODEL, N_CTX, N_LAYERS, PAPER_DATA, count_calls
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_files import plain_files, transformer_files
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK_NAMES, random_sae
from tuned_lens import TunedLens

from sae_lens_multilayer import MultiLayerSAE, cli, evaluate
from sae_lens_multilayer.analysis import (
    Comparison,
    LayerDistributions,
    TokenClasses,
    TransferMatrix,
    compare_with_single_layers,
)
from sae_lens_multilayer.cli.options import TextOptions
from sae_lens_multilayer.cli.train import parse_config
from sae_lens_multilayer.config_files import read_settings_file
from sae_lens_multilayer.lens import fit
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.loading import load_by_name, shape_by_name
from sae_lens_multilayer.published.saved_sae import load_sae
from sae_lens_multilayer.studies.interventions import InterventionSettings

SIZES = ["--d_in", str(D_MODEL), "--d_sae", "64"]


def test_train_takes_options_and_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nlayers: [0, 2]\nsae: {d_in: 16, d_sae: 64, k: 4}\n")

    cfg = parse_config(["--config", str(file), "--k", "8", "--layers", "1", "3"])

    assert (cfg.lr, cfg.layers, cfg.sae.k, cfg.sae.d_sae) == (1e-3, [1, 3], 8, 64)


def test_train_takes_a_saved_runner_config(make_config, tmp_path):
    before = make_config(seed=3)
    file = tmp_path / "runner_cfg.json"
    file.write_text(json.dumps(before.to_dict()))

    again = parse_config(["--config", str(file)])
    assert Path(str(again.checkpoint_path)).parent == Path(str(before.checkpoint_path))
    again.checkpoint_path = before.checkpoint_path
    assert again.to_dict() == before.to_dict()
    changed = parse_config(["--config", str(file), "--lr", "0.5", "--device", "meta"])
    assert (changed.lr, changed.lr_end) == (0.5, 0.05)
    assert (changed.device, changed.llm_device) == ("meta", "meta")
    assert changed.seed == 3


def test_every_architecture_has_its_own_options():
    cfg = parse_config(["--architecture", "standard", "--l1_coefficient", "3", *SIZES])

    assert (cfg.sae.architecture(), cfg.sae.l1_coefficient) == ("standard", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{d_im: 3}", r"no setting 'd_im'.*"),
        ("{sae: {d_in: 16, d_sae: 64, kk: 3}}", r"no setting 'kk'. Known: .*'k'"),
        ("{sae: {d_in: 16}}", r"needs .*\['d_sae'\] must be given"),
        ("{sae: {architecture: foo}}", "`architecture` must be one of .*got 'foo'"),
        ("{sae: 3}", "`sae` must hold names and values; got 3"),
        ("[1]", "run.yaml must hold names and values"),
        ("{", "run.yaml cannot be read"),
    ],
)
def test_a_wrong_file_is_an_error(content, message, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_config(["--config", str(tmp_path / "run.yaml")])


def test_only_settings_files_are_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_settings_file(tmp_path / "run.yaml")
    (tmp_path / "run.py").write_text("import sys")
    with pytest.raises(ValueError, match=r"run\.py must hold names and values"):
        read_settings_file(tmp_path / "run.py")


def test_train_saves_an_sae(offline, tmp_path):
    cli.main(
        [
            *("train", *SIZES, "--k", "4", "--k_aux", "8", "--model_name", "tiny"),
            *("--dataset_path", "text.parquet", "--context_size", str(N_CTX)),
            *("--training_tokens", "128", "--train_batch_size_tokens", "64"),
            *("--store_batch_size_prompts", "2", "--n_batches_in_buffer", "4"),
            *("--log_to_wandb", "False", "--output_path", "out"),
            *("--checkpoint_path", "checkpoints"),
        ]
    )

    sae = SAE.load_from_disk("out")
    assert (sae.cfg.d_sae, sae.cfg.metadata.model_name) == (64, "tiny")


def train_in(folder: str, *options: str) -> set[str]:
    """Train with checkpoints; the names of the runs' folders."""
    cli.main(
        [
            *("train", *SIZES, "--k", "4", "--k_aux", "8", "--model_name", "tiny"),
            *("--dataset_path", "text.parquet", "--context_size", str(N_CTX)),
            *("--training_tokens", "256", "--train_batch_size_tokens", "64"),
            *("--store_batch_size_prompts", "2", "--n_batches_in_buffer", "4"),
            *("--log_to_wandb", "False", "--checkpoint_path", folder),
            *("--n_checkpoints", "3", *options),
        ]
    )
    return {path.name for path in Path(folder).iterdir()}


def test_each_run_has_its_own_folder_of_checkpoints(offline):
    (first,) = train_in("ck", "--output_path", "a", "--seed", "1")
    keep = "--keep_last_n_checkpoints", "1"
    runs = train_in("ck", "--output_path", "b", "--seed", "2", *keep)
    (second,) = runs - {first}
    assert len(list(Path("ck", first).iterdir())) == 3
    assert len(list(Path("ck", second).iterdir())) == 1


def test_latest_uses_the_given_folder(offline):
    latest = "--resume_from_checkpoint", "latest"
    (run,) = train_in("here/ck", "--output_path", "a")
    (other,) = train_in("here/new", "--output_path", "b", *latest)
    assert other != run
    torn = Path("here/ck/torn/64")
    torn.mkdir(parents=True)
    for name in ("trainer_state.json", "record.json"):
        (torn / name).write_text("{")
    assert train_in("here/ck", "--output_path", "c", *latest) == {run, "torn"}
    # As in a `runner_cfg.json`, which names the folder of its run.
    assert train_in(f"here/ck/{run}", "--output_path", "d", *latest) >= {"128"}
    assert {path.name for path in Path("here/ck").iterdir()} == {run, "torn"}


@pytest.mark.parametrize("command", ["cache", "evaluate", "sweep"])
def test_only_training_is_shared_out_by_torchrun(offline, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=f"`{command}` must run in one process; .* 2"):
        cli.main([command, "x"])


def test_evaluate_gives_what_the_function_gives(
    offline, model, token_dataset, tmp_path, capsys
):
    cli.main(["evaluate", "sae", *offline, "--together", "--output_path", "new/e.csv"])

    tokens = torch.tensor(token_dataset["input_ids"][:4])
    expected = evaluate(random_sae_on_disk(), model, tokens).to_dataframe()
    table = pd.read_csv("new/e.csv", index_col=0)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)
    assert "All layers replaced at once" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"new file; new/e\.csv exists"):
        cli.main(["evaluate", "sae", *offline, "--output_path", "new/e.csv"])


@pytest.mark.parametrize("command", ["evaluate", "report", "analyze", "lens"])
def test_nothing_in_the_home_folder_is_overwritten(
    offline, command, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = {"evaluate": "x.csv", "report": "x.html"}.get(command, "x")
    there = tmp_path / "home" / name
    there.parent.mkdir()
    there.write_text("mine")
    # A shell leaves a "~" after "=" as it is.
    options = ["sae", *offline, "--model_name", "tiny"]
    if command == "lens":
        options = ["run.yaml"]
    with pytest.raises(SystemExit, match=r"overwritten"):
        cli.main([command, *options, f"--output_path=~/{name}"])
    assert there.read_text() == "mine"


@pytest.mark.parametrize("command", ["evaluate", "report", "analyze", "lens"])
def test_what_appears_while_a_command_runs_is_kept_and_so_is_the_result(
    offline, command, monkeypatch, caplog
):
    Path("out").mkdir()
    target = Path("out/x.y")
    at_work = (fit, "_train") if command == "lens" else (loading, "load_by_name")
    original = getattr(*at_work)

    def work(*args):
        target.write_text("mine")
        return original(*args)

    monkeypatch.setattr(*at_work, work)
    few = {
        "analyze": ["--analyses", "decoder_similarity"],
        "lens": ["--n_steps", "1", "--n_tokens", "64"],
    }
    options = ["sae", *offline, "--model_name", "tiny"]
    if command == "lens":
        options = ["run.yaml"]
    options += ["--output_path", str(target)]
    cli.main([command, *options, *few.get(command, [])])
    assert target.read_text() == "mine"
    (other,) = set(Path("out").iterdir()) - {target}
    assert other.suffix == target.suffix
    assert str(other) in caplog.text


def random_sae_on_disk():
    return SAE.load_from_disk("sae")


@pytest.mark.usefixtures("offline")
def test_lens_saves_one_that_tuned_lens_loads(model):
    few = ["--n_tokens", "64", "--n_steps", "2"]
    cli.main(["lens", "run.yaml", *few, "--output_path", "lens"])

    fitted = TunedLens.from_unembed_and_pretrained(as_model(model).unembed(), "lens")
    assert any(p.abs().sum() > 0 for p in fitted.layer_translators.parameters())


def test_analyze_writes_results_and_pictures(offline, tmp_path):
    cli.main(["analyze", "sae", *offline, "--output_path", "new", "--latents", "5"])

    dists = LayerDistributions.load("new/layer_distributions")
    assert dists.n_tokens == 64
    assert TokenClasses.load("new/token_classes").latents.tolist() == [5]
    pictures = {path.stem for path in (tmp_path / "new").glob("*.png")}
    assert {"layer_distributions", "residual_stream", "token_classes_5_token"} <= (
        pictures
    )
    with pytest.raises(SystemExit, match=r"must be a new or an empty folder"):
        cli.main(["analyze", "sae", *offline, "--output_path", "new"])


def test_analyze_runs_some(offline, tmp_path):
    cli.main(
        [
            *("analyze", "sae", *offline, "--analyses", "redundancy", "variances"),
            *("--exclude_positions", "0"),
        ]
    )

    found = {path.name for path in (tmp_path / "analyses").iterdir()}
    names = {"redundancy", "redundancy.png", "variances", "variances.png"}
    assert found == {*names, "record.json"}


@pytest.fixture
def single_layers(offline):
    """Folders of an SAE of each layer."""
    for layer, name in enumerate(HOOK_NAMES):
        metadata = SAEMetadata(hook_names=[name], model_name="tiny")
        random_sae(metadata=metadata).save_model(f"layer_{layer}")
    return ["--single_layers", "layer_0", "layer_1"]


def test_analyze_compares_with_single_layers(offline, single_layers, model, capsys):
    tokens = torch.tensor(pd.read_parquet("text.parquet").input_ids.tolist()[:4])
    options = [*offline, *single_layers, "--exclude_positions", "0"]
    names = ["single_layer_comparison", "transfer_matrix"]
    cli.main(["analyze", "sae", *options, "--analyses", *names])

    found = Comparison.load("analyses/single_layer_comparison")
    saes = [SAE.load_from_disk(f"layer_{layer}") for layer in range(2)]
    expected = compare_with_single_layers(
        random_sae_on_disk(), saes, model, tokens, exclude_positions=[0]
    )
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())
    transfer = TransferMatrix.load("analyses/transfer_matrix")
    own = found.to_dataframe()["fvu", "single_layer"].tolist()
    assert transfer.fvu.diagonal().tolist() == pytest.approx(own, rel=1e-5)
    assert {p.stem for p in Path("analyses").glob("*.png")} == set(names)
    table = capsys.readouterr().out
    assert f"{expected.to_dataframe()['kl_div', 'single_layer'].iloc[1]:.3g}" in table


def test_single_layers_must_be_the_saes_own(offline, single_layers):
    metadata = SAEMetadata(hook_names=["blocks.0.hook_mlp_out"], model_name="tiny")
    random_sae(metadata=metadata).save_model("other")
    with pytest.raises(SystemExit, match=r"the multi-layer SAE's; got .*mlp_out"):
        cli.main(["analyze", "sae", *offline, "--single_layers", "other"])


def save_other_sae(hook: str, d_in: int, head: int | None = None) -> None:
    """An SAE in "other", of vectors that are not the residual stream's."""
    metadata = SAEMetadata(
        hook_names=[f"blocks.{layer}.{hook}" for layer in range(N_LAYERS)],
        hook_head_index=head,
        model_name="tiny",
        context_size=N_CTX,
        prepend_bos=False,
    )
    random_sae(d_in=d_in, metadata=metadata).save_model("other")


def test_an_sae_of_another_width_is_evaluated_and_analysed(
    offline, model, token_dataset
):
    save_other_sae("mlp.hook_post", 32)
    cli.main(["evaluate", "other", *offline, "--output_path", "e.csv"])
    tokens = torch.tensor(token_dataset["input_ids"][:4])
    expected = evaluate(SAE.load_from_disk("other"), model, tokens).to_dataframe()
    table = pd.read_csv("e.csv", index_col=0)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)

    cli.main(["analyze", "other", *offline, "--analyses", "active_layers"])
    assert Path("analyses/active_layers").is_dir()
    cli.main(["report", "other", *offline])
    assert "64 (2 × d_in)" in Path("report.html").read_text()


def test_an_sae_of_one_head_is_analysed(offline):
    save_other_sae("attn.hook_z", 8, head=1)
    cli.main(["analyze", "other", *offline, "--analyses", "variances"])
    assert Path("analyses/variances").is_dir()
    with pytest.raises(SystemExit, match=r"'evaluation' needs .*attention head"):
        cli.main(["report", "other", *offline])


def test_an_sae_of_another_width_is_a_one_line_error(offline):
    save_other_sae("mlp.hook_post", 16)
    with pytest.raises(SystemExit, match=r"must be 32, the width of .*mlp.hook_post"):
        cli.main(["evaluate", "other", *offline])


def test_long_first_positions_are_a_warning(offline, model, caplog):
    with torch.no_grad():
        model.W_pos[0] *= 1000
    options = [*offline, "--analyses", "variances"]
    cli.main(["analyze", "sae", *options])
    assert "The vectors at position 0 are up to" in caplog.text
    caplog.clear()
    cli.main(["evaluate", "sae", *offline, "--exclude_positions", "0"])
    assert "position 0" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["nowhere"], "nowhere must be the folder of a saved SAE"),
        (["empty"], r"folder of a saved SAE; it has no cfg\.json"),
        (["sae", "--device", "nope"], "--device nope cannot be used here: "),
        (["sae", "--n_tokens", "0"], "`n_tokens` must be at least 1"),
        (
            ["sae", "--n_tokens", "9999"],
            "`n_tokens` must be at most 1024, .* 64 whole prompts",
        ),
        (["sae", "--context_size", "0"], "`context_size` must be at least 1; got 0"),
        (
            ["sae", "--context_size", "15", "--dataset_path", "short.jsonl"],
            "must have a whole prompt of 15 tokens; it is shorter.*`context_size`",
        ),
        (["sae", "--dataset_path", "bad.jsonl"], r"bad\.jsonl must be readable.*JSON"),
        (["sae", "--analyses", "foo"], "'foo' needs a row in ANALYSES"),
        (["sae", "--latents", "64"], r"in \[0, d_sae = 64\)"),
        (["sae", "--exclude_positions", "99"], "`exclude_positions` must be in"),
    ],
)
def test_wrong_input_is_a_one_line_error(changes, message, offline):
    sae, *rest = changes
    Path("empty").mkdir()
    Path("short.jsonl").write_text('{"text": "w1 w2"}\n')
    Path("bad.jsonl").write_text('{"text": "w1" "w2"}\n')
    with pytest.raises(SystemExit, match=f"^sae-lens-multilayer analyze: .*{message}"):
        cli.main(["analyze", sae, *offline, *rest])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--n_steps", "0"], "`n_steps` must be at least 1; got 0"),
        (["--n_prompts_per_step", "0"], "`batch_size_prompts` must be at least 1"),
        (["--lr", "1e30", "--n_steps", "3"], "not finite.* Use a lower `lr`"),
    ],
)
def test_wrong_settings_of_a_lens_are_a_one_line_error(changes, message, offline):
    command = ["lens", "run.yaml", "--n_tokens", "64", *changes]
    with pytest.raises(SystemExit, match=f"^sae-lens-multilayer lens: .*{message}"):
        cli.main(command)


def test_a_device_that_is_not_there_is_a_one_line_error(offline):
    command = ["train", "--config", "run.yaml", "--device", "nope"]
    with pytest.raises(SystemExit, match=r"train: `device` nope cannot be used here"):
        cli.main(command)


@pytest.mark.parametrize("kind", ["TransformerBridge", "AutoModelForCausalLM"])
def test_a_model_that_is_not_there_is_named(kind, offline_hub):
    message = "`model_name` must be a folder of a model, .*got 'modle'"
    with pytest.raises(OSError, match=message):
        loading.load_by_name(kind, "modle", None, "cpu")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("sae_weights.safetensors", None, r"No such file .*sae_weights\.safetensors"),
        (
            "sae_weights.safetensors",
            b"torn",
            "a complete SAE; SafetensorErr",
        ),
        ("cfg.json", b'{"d_sae":', r"cfg\.json must be JSON; "),
        (
            "cfg.json",
            {"architecture": "new"},
            "`architecture` must be one of .*; got 'new'",
        ),
        (
            "cfg.json",
            {"d_sae": 65},
            "a complete SAE; .* size mismatch for W_dec",
        ),
    ],
)
@pytest.mark.parametrize("option", [["other"], ["sae", "--single_layers", "other"]])
def test_a_damaged_sae_is_a_one_line_error(file, change, message, option, offline):
    random_sae().save_model("other")
    path = Path("other", file)
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.write_bytes(change)
    with pytest.raises(
        SystemExit, match=f"^sae-lens-multilayer analyze: .*{message}"
    ) as e:
        cli.main(["analyze", *option, *offline])
    assert "\n" not in str(e.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=3),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v),
    max_leaves=4,
)
SETTINGS = [*random_sae().cfg.to_dict(), "context_size", "dataset_path", "hook_name",
    "model_class_name", "seqpos_slice", "model_from_pretrained_kwargs"]  # fmt: skip


@given(name=st.sampled_from(SETTINGS), in_metadata=st.booleans(), value=JSON)
@example("model_from_pretrained_kwargs", True, "trust_remote_code")
@example("hook_names", True, [5])
@example("model_name", True, [])
@example("dataset_path", True, 5)
@example("metadata", False, 3)
@example("architecture", False, [])
@example("k", False, None)
@settings(max_examples=60, deadline=None)
def test_any_value_in_a_config_is_read_or_one_line(name, in_metadata, value):
    with TemporaryDirectory() as folder:
        random_sae().save_model(folder)
        path = Path(folder, "cfg.json")
        cfg = json.loads(path.read_text())
        (cfg["metadata"] if in_metadata else cfg)[name] = value
        path.write_text(json.dumps(cfg))
        message = ""
        try:
            metadata = load_sae(folder, None, "cpu").cfg.metadata
            TextOptions("a", context_size=8).text(metadata)
        except ValueError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 500


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "3"])
def test_a_config_that_is_not_an_object_is_one_line(offline, content):
    Path("sae/cfg.json").write_text(content)
    with pytest.raises(SystemExit, match=r"cfg\.json must be a JSON object"):
        cli.main(["evaluate", "sae", *offline])


def test_an_old_config_without_dtype_is_of_float32(offline):
    values = json.loads(Path("sae/cfg.json").read_text())
    del values["dtype"]
    Path("sae/cfg.json").write_text(json.dumps(values))
    assert MultiLayerSAE.load_from_disk("sae").dtype == torch.float32
    assert load_sae("sae", None, "cpu").dtype == torch.float32


def test_a_context_that_is_too_long_is_found_before_text_is_read(offline):
    options = ["sae", *offline[:2], "--context_size", "1000000000"]
    with pytest.raises(SystemExit, match=f"`context_size` must be at most {N_CTX}"):
        cli.main(["evaluate", *options])


def test_arguments_that_can_run_code_need_an_option(offline, monkeypatch, caplog):
    saved = {"trust_remote_code": True, "quantization_config": {}, "revision": "main"}
    sae = random_sae()
    sae.cfg.metadata.model_from_pretrained_kwargs = saved
    sae.save_model("other")
    loads = count_calls(monkeypatch, loading, "load_by_name")
    cli.main(["evaluate", "other", *offline])
    assert loads[-1][0][2] == {"revision": "main"}
    assert "not used: {'quantization_config': {}, 'trust_remote_code'" in caplog.text
    cli.main(["evaluate", "other", *offline, "--trust_remote_code"])
    assert loads[-1][0][2] == saved


def test_published_files_are_taken_from_a_folder(tmp_path):
    for name, content in transformer_files().items():
        (tmp_path / name).write_bytes(content)
    sae = load_sae(str(tmp_path), None, "cpu")
    assert isinstance(sae, MultiLayerSAE)
    assert len(sae.views()) == 5


def test_the_model_of_published_files_can_be_a_folder(tmp_path):
    folder = tmp_path / "mlsae-unheard-of-x8-k8"
    folder.mkdir()
    for name, content in plain_files().items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is 'unheard-of' by its .* --model-name"):
        load_sae(str(folder), None, "cpu")
    model = str(PAPER_DATA / "model")
    sae = load_sae(str(folder), None, "cpu", model)
    assert isinstance(sae, MultiLayerSAE)
    assert sae.cfg.metadata.model_name == model
    assert len(sae.views()) == 5


@pytest.mark.parametrize(
    "command",
    [["evaluate", "sae"], ["train", *SIZES, "--k", "4", "--log_to_wandb", "False"]],
)
def test_a_model_unknown_to_transformer_lens_is_a_one_line_error(
    command, offline, monkeypatch
):
    monkeypatch.setattr(loading, "load_by_name", load_by_name)
    monkeypatch.setattr(loading, "shape_by_name", shape_by_name)
    dataset = offline[:2]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, *dataset, "--model_name", "tiny"])
    assert "TransformerLens has no model 'tiny'. Known: " in str(stop.value)
    assert len(str(stop.value)) < 400


def test_settings_missing_in_the_metadata_must_be_given(offline):
    with pytest.raises(SystemExit, match="`dataset_path`: give --dataset_path"):
        cli.main(["evaluate", "sae"])


def test_a_folder_without_an_sae_is_named(offline, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "study.json").write_text(
        '{"sae": "empty", "dataset_path": "text.parquet"}'
    )
    for command in (["report", "empty"], ["study", "interventions", "study.json"]):
        options = ["--output", "out"] if command[0] == "study" else [*offline]
        with pytest.raises(SystemExit, match="empty must be the folder of a saved SAE"):
            cli.main([*command, *options])


def test_studies_load_saes_and_models_as_commands_do(offline, tmp_path, monkeypatch):
    file = tmp_path / "sae" / "cfg.json"
    values = json.loads(file.read_text())
    kwargs = {"revision": "main", "trust_remote_code": True}
    values["metadata"]["model_from_pretrained_kwargs"] = kwargs
    file.write_text(json.dumps(values))
    loads = count_calls(monkeypatch, loading, "load_by_name")
    settings = InterventionSettings(
        "sae", "text.parquet", n_tokens=64, model_kwargs={"n_ctx": 16}
    )
    settings.inputs()
    assert loads[-1][0][2] == {"revision": "main", "n_ctx": 16}
    file.write_text(json.dumps({**values, "d_in": "16"}))
    with pytest.raises(ValueError, match="`d_in`"):
        settings.inputs()


def test_the_option_traceback_shows_a_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "evaluate", "nowhere"])
