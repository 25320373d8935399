"""The prompts of a text, and which positions count.

Reference: the training store of a run with the same settings.
"""

from typing import Any

import pytest
import torch
from conftest import N_CTX
from datasets import Dataset
from pandas.testing import assert_frame_equal
from sae_lens import SAE, LanguageModelSAETrainingRunner, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from saes import random_sae

from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerCacheActivationsRunner,
    SweepEvaluation,
    Text,
    cli,
    evaluate,
    reconstruction_metrics,
    sweep,
)
from sae_lens_multilayer.analysis import layer_distributions
from sae_lens_multilayer.cli import analyze as cli_analyze
from sae_lens_multilayer.cli import evaluate as cli_evaluate
from sae_lens_multilayer.cli import report as cli_report
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.store.source import ModelSource
from sae_lens_multilayer.sweeps import evaluation as sweep_evaluation
from sae_lens_multilayer.text.prompts import Prompts, counted_positions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

N_PROMPTS = 12
SETTINGS = {
    "defaults": {},
    "documents apart": {"disable_concat_sequences": True},
    "slice": {"seqpos_slice": (3, -2)},
    "slice with a step": {"seqpos_slice": (1, None, 2)},
    "no separator": {"sequence_separator_token": None},
    "separator": {"sequence_separator_token": 7},
    "with bos": {"prepend_bos": True},
    "without special tokens": {"prepend_bos": True, "exclude_special_tokens": True},
    "without some tokens": {"exclude_special_tokens": [5, 6, 7, 8, 9]},
    "whole files": {"streaming": False},
    "conversations": {"use_chat_formatting": True},
    "all": {
        "disable_concat_sequences": True,
        "seqpos_slice": (1, -1),
        "prepend_bos": True,
        "exclude_special_tokens": True,
    },
}


@pytest.fixture(params=SETTINGS)
def cfg(request, model, make_config, text_dataset, tmp_path, monkeypatch):
    """A run with one setting, on text in a file, with the tiny model under any name."""
    texts = list(text_dataset["text"])
    turns = [[{"role": "user", "content": text}] for text in texts]
    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_dict({"text": texts, "messages": turns}).to_parquet(
        folder / "text.parquet"
    )
    template = "w3 {% for m in messages %}{{ m['content'] }} w4{% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    monkeypatch.setattr(loading, "load_by_name", lambda *_: model)
    monkeypatch.setattr(loading, "shape_by_name", lambda *_: as_model(model).shape)
    monkeypatch.chdir(tmp_path)
    return make_config(
        dataset_path=str(folder / "text.parquet"),
        is_dataset_tokenized=False,
        training_tokens=128,
        **SETTINGS[request.param],
    )


@pytest.fixture
def expected(model, cfg) -> Prompts:
    """The first prompts of the training store, and the positions that it keeps."""
    store = MultiLayerActivationsStore.from_config(model, cfg)
    ids = store.get_batch_tokens(N_PROMPTS)
    kept = torch.zeros(ids.numel(), dtype=torch.bool)
    assert isinstance(store.source, ModelSource)
    kept[store.source.token_indices(ids)] = True
    return Prompts(ids, kept.view(ids.shape))


@pytest.fixture
def used(monkeypatch) -> list[Prompts]:
    """The prompts that commands and sweeps evaluate and analyse."""
    found: list[Prompts] = []

    def recording(function):
        def record(sae, model, tokens, *args, **kwargs):
            found.append(tokens)
            return function(sae, model, tokens, *args, **kwargs)

        return record

    for module, name in [
        (cli_evaluate, "evaluate"),
        (cli_analyze, "Suite"),
        (cli_report, "layer_distributions"),
        (sweep_evaluation, "Suite"),
    ]:
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    return found


def assert_same(found: Prompts, expected: Prompts) -> None:
    n = len(found)
    assert torch.equal(found.ids, expected.ids[:n])
    assert torch.equal(found.counted, expected.counted[:n])


def test_commands_use_the_prompts_of_training(model, cfg, expected, used):
    LanguageModelSAETrainingRunner(cfg).run()
    saved = SAE.load_from_disk(cfg.output_path).cfg.metadata
    assert Text.from_settings(saved) == Text.from_config(cfg)

    options = [str(cfg.output_path), "--n_tokens", str(N_PROMPTS * N_CTX)]
    cli.main(["evaluate", *options])
    cli.main(["analyze", *options, "--analyses", "variances"])
    cli.main(["report", *options, "--n_latents", "2"])
    assert [len(prompts) for prompts in used] == [N_PROMPTS] * 3 + [1]
    for prompts in used:
        assert_same(prompts, expected)


def test_sweeps_use_the_prompts_of_training(model, cfg, expected, used, tmp_path):
    table = sweep(
        {**cfg.to_dict(), "checkpoint_path": None},
        [{"k": 2}],
        tmp_path / "sweep",
        evaluation=SweepEvaluation(
            cfg.dataset_path, N_PROMPTS * N_CTX, analyses=("active_layers",)
        ),
        override_model=model,
    )
    assert list(table.status) == ["done"]
    (prompts,) = used
    assert_same(prompts, expected)


def test_a_cache_has_the_prompts_of_training(model, cfg, expected, tmp_path):
    cfg.cached_activations_path = str(tmp_path / "cache")
    cfg.training_tokens = N_PROMPTS * N_CTX
    cache = MultiLayerCacheActivationsRunner(cfg).run()
    shard = cache.shards[0].tokens()
    n_counted = int(expected.counted.sum())
    assert torch.equal(shard.tokens[:N_PROMPTS].long(), expected.ids)
    prompt, position = expected.counted.nonzero(as_tuple=True)
    assert torch.equal(shard.prompt[:n_counted].long(), prompt)
    assert torch.equal(shard.position[:n_counted].long(), position)


# From metadata


def test_given_settings_come_first_then_the_metadata_then_defaults():
    metadata = SAEMetadata(
        dataset_path="theirs", context_size=8, prepend_bos=False, seqpos_slice=[1, None]
    )
    text = Text.from_settings(metadata, dataset_path="given", context_size=None)
    assert text == Text(
        context_size=8,
        dataset_path="given",
        prepend_bos=False,
        seqpos_slice=(1, None),
        sequence_separator_token="bos",
    )


def test_no_separator_in_the_metadata_is_a_setting():
    metadata = SAEMetadata(dataset_path="a", context_size=8)
    assert Text.from_settings(metadata).sequence_separator_token == "bos"
    metadata.sequence_separator_token = None
    assert Text.from_settings(metadata).sequence_separator_token is None


@pytest.mark.parametrize("name", ["dataset_path", "context_size"])
def test_a_setting_missing_in_both_is_an_error(name):
    metadata = SAEMetadata(dataset_path="a", context_size=8)
    metadata[name] = None
    with pytest.raises(ValueError, match=f"give --{name}"):
        Text.from_settings(metadata)


def test_a_text_that_is_too_short_is_an_error(model, token_dataset):
    with pytest.raises(ValueError, match=r"at most 1024, as .* 64 whole prompts"):
        Text(N_CTX).prompts(model, 1025, token_dataset)
    assert len(Text(N_CTX).prompts(model, 1009, token_dataset)) == 64


# Which positions count


def test_positions_that_count_worked_by_hand():
    ids = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 1]])
    found = counted_positions(ids, [1], [-1], (1, None))
    assert found.tolist() == [[False, False, True, False], [False, True, False, False]]


def test_not_counted_is_as_excluded(model, token_dataset):
    sae = random_sae()
    ids = torch.tensor(token_dataset["input_ids"][:5])
    counted = counted_positions(ids, [7], [0])
    excluded: Any = {"exclude_tokens": [7], "exclude_positions": [0]}
    given = Prompts(ids, counted)
    for measure in (evaluate, reconstruction_metrics):
        found = measure(sae, model, given, batch_size_prompts=3)
        assert_frame_equal(
            found.to_dataframe(), measure(sae, model, ids, **excluded).to_dataframe()
        )
    found = layer_distributions(sae, model, given, batch_size_prompts=3)
    assert found.n_tokens == int(counted.sum())


def test_a_store_excludes_the_same_tokens_in_evaluation_and_training(
    model, make_config, token_dataset
):
    def store(**changes):
        cfg = make_config(**changes)
        return MultiLayerActivationsStore.from_config(model, cfg, token_dataset)

    sae = random_sae()
    found = evaluate(
        sae, model, store(seqpos_slice=(2, None), exclude_special_tokens=[9])
    )
    ids = store().get_batch_tokens(4)
    options: Any = {"exclude_tokens": [9], "exclude_positions": [0, 1]}
    expected = evaluate(sae, model, ids, **options)
    assert_frame_equal(found.to_dataframe(), expected.to_dataframe())


def test_an_evaluation_in_training_leaves_out_what_is_not_trained_on(
    model, make_config, token_dataset
):
    cfg = make_config(seqpos_slice=(2, None), n_eval_batches=1)
    runner = LanguageModelSAETrainingRunner(cfg, token_dataset, model)
    ids = runner.activations_store.get_batch_tokens(4)
    runner._set_sae_metadata()
    evaluator: Any = runner.evaluator
    found = evaluator._evaluate(runner.sae, ids)
    expected = evaluate(runner.sae, model, ids, exclude_positions=[0, 1])
    assert_frame_equal(found.to_dataframe(), expected.to_dataframe())


def test_a_stock_architecture_keeps_the_text_too(model, make_config, token_dataset):
    sae = TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4)
    cfg = make_config(sae, seqpos_slice=(2, None), disable_concat_sequences=True)
    LanguageModelSAETrainingRunner(cfg, token_dataset, model).run()
    metadata = SAE.load_from_disk(cfg.output_path).cfg.metadata
    assert Text.from_settings(metadata, dataset_path="a") == Text(
        N_CTX,
        "a",
        prepend_bos=False,
        disable_concat_sequences=True,
        seqpos_slice=(2, None),
    )
