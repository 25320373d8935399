"""The config of a training run.

References: the paper's recipe (design, section 3) for the defaults; SAELens'
`LanguageModelSAERunnerConfig` for the meaning of its own fields.
"""

import json
from dataclasses import MISSING, fields
from typing import Any, get_args

import pytest
from conftest import PAPER_DATA, tiny_sae_config
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

from sae_lens_multilayer import MultiLayerConfig, MultiLayerTrainingSAEConfig
from sae_lens_multilayer.config import Role, fields_of, fields_that_decide_weights
from sae_lens_multilayer.hooks import DEFAULT_HOOK_NAME

TEMPLATE = "blocks.{layer}.hook_resid_pre"
SIZES: dict[str, Any] = {"d_in": 16, "d_sae": 64}
STOCK_SAES = [
    StandardTrainingSAEConfig(**SIZES, l1_coefficient=2.0),
    GatedTrainingSAEConfig(**SIZES),
    JumpReLUTrainingSAEConfig(**SIZES),
    TopKTrainingSAEConfig(**SIZES, k=4),
    BatchTopKTrainingSAEConfig(**SIZES, k=4.5),
    MatryoshkaBatchTopKTrainingSAEConfig(**SIZES, k=4, matryoshka_widths=[16, 64]),
]


def config(sae=None, **changes) -> MultiLayerConfig:
    return MultiLayerConfig(
        **{"sae": sae or tiny_sae_config(), "verbose": False, **changes}
    )


def through_json(cfg: MultiLayerConfig) -> MultiLayerConfig:
    return MultiLayerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))


# Defaults


def test_the_defaults_are_the_papers_recipe():
    cfg = MultiLayerConfig(verbose=False)

    assert type(cfg.sae) is MultiLayerTrainingSAEConfig
    assert cfg.sae.k == 32
    assert cfg.sae.d_sae == 64 * cfg.sae.d_in
    assert cfg.hook_name == "blocks.{layer}.hook_resid_post"
    assert cfg.layers is None
    assert cfg.hook_names is None
    assert cfg.lr == 1e-4
    assert cfg.lr_scheduler_name == "constant"
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps) == (0, 0)
    assert (cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps) == (0.9, 0.999, 6.25e-10)
    assert cfg.max_grad_norm is None


def test_every_other_field_of_the_host_keeps_its_default():
    ours = {"sae", "hook_name", "lr", "lr_end"}
    host = LanguageModelSAERunnerConfig(sae=tiny_sae_config(), verbose=False)
    cfg = config()

    for field in fields(LanguageModelSAERunnerConfig):
        # These two differ between any two configs, of the host too.
        if field.name not in ours | {"checkpoint_path", "logger"}:
            assert getattr(cfg, field.name) == getattr(host, field.name), field.name
    assert cfg.lr_end == cfg.lr / 10
    assert cfg.checkpoint_path is not None
    assert cfg.checkpoint_path.startswith("checkpoints/")
    assert cfg.logger.log_to_wandb is True


def test_every_field_has_a_default_as_the_hosts_command_line_needs():
    for field in fields(MultiLayerConfig):
        has_default = field.default is not MISSING
        assert has_default or field.default_factory is not MISSING, field.name


def test_two_configs_share_no_default():
    first, second = (MultiLayerConfig(verbose=False) for _ in range(2))

    assert first.sae is not second.sae
    assert first.sae.metadata is not second.sae.metadata
    assert first.logger is not second.logger
    assert first.model_kwargs is not second.model_kwargs


HOST_FIELDS = {
    "model_name": "pythia-70m-deduped",
    "model_class_name": "AutoModelForCausalLM",
    "hook_name": TEMPLATE,
    "hook_head_index": 1,
    "dataset_path": "some/text",
    "dataset_trust_remote_code": False,
    "streaming": False,
    "is_dataset_tokenized": False,
    "use_chat_formatting": True,
    "context_size": 32,
    "cached_activations_path": "somewhere",
    "from_pretrained_path": "an/sae",
    "n_batches_in_buffer": 3,
    "training_tokens": 1000,
    "store_batch_size_prompts": 2,
    "seqpos_slice": (1, -1, 2),
    "disable_concat_sequences": True,
    "sequence_separator_token": None,
    "activations_mixing_fraction": 0.25,
    "device": "cuda:1",
    "llm_device": "cuda:0",
    "act_store_device": "cpu",
    "prefetch_llm_batches": 2,
    "seed": 7,
    "dtype": "bfloat16",
    "prepend_bos": False,
    "autocast": True,
    "autocast_lm": True,
    "compile_llm": True,
    "llm_compilation_mode": "default",
    "compile_sae": True,
    "sae_compilation_mode": "default",
    "train_batch_size_tokens": 128,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "lr": 1e-3,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 5,
    "lr_end": 1e-6,
    "lr_decay_steps": 6,
    "n_restart_cycles": 2,
    "dead_feature_window": 11,
    "feature_sampling_window": 12,
    "dead_feature_threshold": 1e-6,
    "n_eval_batches": 1,
    "eval_batch_size_prompts": 3,
    "logger": LoggingConfig(log_to_wandb=False, run_name="a run"),
    "n_checkpoints": 2,
    "checkpoint_path": None,
    "save_final_checkpoint": True,
    "output_path": None,
    "resume_from_checkpoint": "a/checkpoint",
    "model_kwargs": {"return_type": "logits"},
    "model_from_pretrained_kwargs": {"revision": "step0"},
    "sae_lens_version": "6.0.0",
    "sae_lens_training_version": "6.0.0",
    "exclude_special_tokens": [0, 1],
    "n_batches_for_norm_estimate": 4,
}


@pytest.mark.parametrize("name", HOST_FIELDS)
def test_a_field_of_the_host_is_taken_and_survives_json(name):
    # The host's own default contradicts chat formatting.
    beside = {"is_dataset_tokenized": False} if name == "use_chat_formatting" else {}
    cfg = config(**beside, **{name: HOST_FIELDS[name]})

    assert getattr(cfg, name) == HOST_FIELDS[name]
    assert getattr(through_json(cfg), name) == HOST_FIELDS[name]


def test_no_field_of_the_host_is_forgotten_above():
    # Not in use or deprecated, tested elsewhere, or refused with a reason.
    apart = {"sae", "hook_eval", "verbose", "use_cached_activations"}

    assert {f.name for f in fields(LanguageModelSAERunnerConfig)} == (
        set(HOST_FIELDS) | apart
    )


def test_every_field_has_one_role():
    named = fields_of(*get_args(Role))

    assert sorted(named) == sorted(f.name for f in fields(MultiLayerConfig))


def test_folders_and_reports_do_not_decide_the_weights():
    decide = fields_that_decide_weights()

    assert {"seed", "seqpos_slice", "n_eval_batches", "dtype"} <= set(decide)
    assert not {"output_path", "logger", "n_checkpoints"} & set(decide)


def test_the_trainer_gets_the_hosts_fields_and_ours():
    cfg = config(
        adam_eps=1e-7, max_grad_norm=2.0, lr=1e-3, training_tokens=999, adam_beta1=0.8
    )

    trainer_cfg = cfg.to_sae_trainer_config()

    assert trainer_cfg.adam_eps == 1e-7
    assert trainer_cfg.max_grad_norm == 2.0
    assert (trainer_cfg.lr, trainer_cfg.adam_beta1) == (1e-3, 0.8)
    assert trainer_cfg.total_training_samples == 999
    assert trainer_cfg.standardize_stock_inputs is False


@pytest.mark.parametrize("standardize", [True, False])
def test_only_stock_architectures_are_standardised_outside(standardize):
    ours = config(standardize_stock_inputs=standardize)
    stock = config(STOCK_SAES[0], standardize_stock_inputs=standardize)

    assert ours.standardizes_stock_inputs is False
    assert stock.standardizes_stock_inputs is standardize
    assert stock.to_sae_trainer_config().standardize_stock_inputs is standardize


# JSON


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seqpos_slice": (2, -1)},
        {"layers": [1, 0, 4]},
        {"hook_name": TEMPLATE, "layers": [3]},
        {"hook_names": ["hook_embed", "blocks.0.hook_resid_post"]},
        {"micro_batch_size_tokens": 64, "max_grad_norm": 1.0, "adam_eps": 1e-8},
        {"standardize_stock_inputs": False},
        {"checkpoint_path": None, "output_path": None},
    ],
)
def test_a_config_survives_json(changes):
    cfg = config(**changes)

    again = through_json(cfg)

    assert type(again) is MultiLayerConfig
    assert again == cfg
    assert again.to_dict() == cfg.to_dict()
    assert again.checkpoint_path == cfg.checkpoint_path


def test_a_range_of_layers_or_a_tuple_of_names_can_be_saved():
    cfg = config()
    # As a caller without a type checker gives them; the tests' own would refuse.
    vars(cfg).update(layers=range(3), seqpos_slice=[1, None])
    cfg.__post_init__()
    assert (cfg.layers, cfg.seqpos_slice) == ([0, 1, 2], (1, None))
    assert through_json(cfg) == cfg

    vars(cfg).update(layers=None, hook_names=("a", "b"))
    cfg.__post_init__()
    assert through_json(cfg) == cfg


@pytest.mark.parametrize("sae", STOCK_SAES, ids=lambda sae: sae.architecture())
def test_a_config_of_a_stock_architecture_survives_json(sae):
    again = through_json(config(sae))

    assert type(again.sae) is type(sae)
    assert again.sae.to_dict() == sae.to_dict()
    assert again.standardizes_stock_inputs


# Hooks


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, [f"blocks.{i}.hook_resid_post" for i in range(3)]),
        (
            {"layers": [2, 0]},
            ["blocks.2.hook_resid_post", "blocks.0.hook_resid_post"],
        ),
        ({"hook_name": TEMPLATE, "layers": [1]}, ["blocks.1.hook_resid_pre"]),
        ({"hook_name": "hook_embed"}, ["hook_embed"]),
        ({"hook_name": "ln_final", "layers": [2]}, ["ln_final"]),
        ({"hook_names": ["hook_embed", "b"]}, ["hook_embed", "b"]),
    ],
)
def test_hook_names_follow_the_template_the_layers_or_the_list(changes, names):
    assert config(**changes).resolve_hook_names(3) == names


def test_a_layer_beyond_the_model_is_an_error():
    with pytest.raises(
        ValueError, match=r"in \[0, 3\) for 'tiny'; got \[0, 3\]. Use `layers=None`"
    ):
        config(layers=[0, 3], model_name="tiny").resolve_hook_names(3)


# Bad input

BAD = {
    "layers and names": (
        {"layers": [0], "hook_names": ["a"]},
        r"either `hook_names` or `layers`, not both.*\['a'\].*\[0\]",
    ),
    "no layers": ({"layers": []}, r"`layers` must hold at least one.*got \[\]"),
    "repeated": ({"layers": [1, 1]}, r"each once; got \[1, 1\]"),
    "no template": (
        {"layers": [0, 1], "hook_name": "blocks.0.hook_resid_post"},
        r"must contain '\{layer\}'.*got 'blocks.0.hook_resid_post'",
    ),
    "no names": ({"hook_names": []}, r"`hook_names` must hold at least one.*\[\]"),
    "repeated name": (
        {"hook_names": ["a", "a"]},
        r"`hook_names` must hold at least one entry, each once.*\['a', 'a'\]",
    ),
    "no learning rate": ({"lr": 0.0}, "`lr` must be positive; got 0.0"),
    "unknown dtype": ({"dtype": "float7"}, "Invalid dtype: float7"),
    "a number that JSON cannot hold": (
        {"model_kwargs": {"x": {1, 2}}},
        "must be JSON values: Object of type set",
    ),
    "no tokens": (
        {"training_tokens": 0},
        "`training_tokens` must be a positive whole number; got 0",
    ),
    "no batch": (
        {"train_batch_size_tokens": -1},
        "`train_batch_size_tokens` must be a positive whole number; got -1",
    ),
    "no prompts": (
        {"store_batch_size_prompts": 0},
        "`store_batch_size_prompts` must be a positive whole number; got 0",
    ),
    "no buffer": (
        {"n_batches_in_buffer": 0},
        "`n_batches_in_buffer` must be a positive whole number; got 0",
    ),
    "no context": (
        {"context_size": 0},
        "`context_size` must be a positive whole number; got 0",
    ),
    "micro": (
        {"train_batch_size_tokens": 100, "micro_batch_size_tokens": 64},
        "`train_batch_size_tokens` must be a multiple.*got 100 and 64",
    ),
    "micro of 0": (
        {"micro_batch_size_tokens": 0},
        "`micro_batch_size_tokens` must be a positive whole number; got 0",
    ),
    "micro below 0": (
        {"micro_batch_size_tokens": -64},
        "`micro_batch_size_tokens` must be a positive whole number; got -64",
    ),
    "cache": (
        {"use_cached_activations": True},
        "`cached_activations_path` must be given",
    ),
    "slice": ({"seqpos_slice": (5, 2)}, "empty range"),
    "chat": ({"use_chat_formatting": True}, "use_chat_formatting"),
    "prefetch": ({"prefetch_llm_batches": -1}, "prefetch_llm_batches must be"),
    "d_in": (
        {"sae": StandardTrainingSAEConfig(d_in=0, d_sae=64)},
        "`d_in` must be a positive whole number; got 0",
    ),
    "d_sae": (
        {"sae": StandardTrainingSAEConfig(d_in=16, d_sae=-1)},
        "`d_sae` must be a positive whole number; got -1",
    ),
    "k of topk": (
        {"sae": TopKTrainingSAEConfig(d_in=16, d_sae=64)},
        r"`k` must be in \(0, d_sae = 64\]; got 100",
    ),
    "k of batchtopk": (
        {"sae": BatchTopKTrainingSAEConfig(d_in=16, d_sae=64, k=0)},
        r"`k` must be in \(0, d_sae = 64\]; got 0",
    ),
    "normalisation": (
        {
            "sae": StandardTrainingSAEConfig(
                **SIZES, normalize_activations="expected_average_only_in"
            )
        },
        "`normalize_activations`.*got 'expected_average_only_in'.*=False",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_an_error_that_shows_the_value(what):
    changes, message = BAD[what]

    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_stock_normalisation_is_allowed_on_raw_vectors():
    sae = StandardTrainingSAEConfig(
        **SIZES, normalize_activations="expected_average_only_in"
    )

    cfg = config(sae, standardize_stock_inputs=False)

    assert cfg.sae.normalize_activations == "expected_average_only_in"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 65}, "`k` must be"),
        ({"k_aux": 65}, "`k_aux` must be"),
        ({"d_in": 0}, "`d_in` must be a positive"),
    ],
)
def test_a_bad_sae_is_an_error_before_there_is_a_run(changes, message):
    with pytest.raises(ValueError, match=message):
        config(tiny_sae_config(**changes))


@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
def test_an_unwritable_path_is_an_error_before_a_model_is_loaded(
    field, tmp_path, monkeypatch
):
    (tmp_path / "here").write_text("a file")
    path = str(tmp_path / "here" / "below")
    cfg = config(**{"output_path": None, "checkpoint_path": None, field: path})

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sae_lens_multilayer.models.loading.load_by_name", load)
    with pytest.raises(OSError, match="below"):
        LanguageModelSAETrainingRunner(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 5]}, r"in \[0, 5\) for .*; got \[0, 5\]"),
        ({"sae": tiny_sae_config()}, "`d_in` must be 64, the width of .*; got 16"),
        ({"context_size": 4096}, "`context_size` must be at most .* got 4096"),
        (
            {"hook_name": "gpt_neox.layer.{layer}"},
            r"has no hook 'gpt_neox\.layer\.0'. Known: .*gpt_neox\.layers\.",
        ),
    ],
)
def test_settings_that_do_not_match_the_model_fail_before_it_is_loaded(
    changes, message, tmp_path, monkeypatch
):
    settings = {
        "sae": tiny_sae_config(d_in=64, d_sae=128),
        "model_class_name": "AutoModelForCausalLM",
        "model_name": str(PAPER_DATA / "model"),
        "hook_name": "gpt_neox.layers.{layer}",
        "context_size": 16,
        "output_path": str(tmp_path / "output"),
        "checkpoint_path": None,
    }
    cfg = config(**{**settings, **changes})

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sae_lens_multilayer.models.loading.load_by_name", load)
    with pytest.raises(ValueError, match=message):
        LanguageModelSAETrainingRunner(cfg)


def test_the_default_template_names_the_papers_hooks():
    assert DEFAULT_HOOK_NAME == "blocks.{layer}.hook_resid_post"
