"""What importing this package does to SAELens, and what it leaves alone.

Reference: SAELens without this package, in processes of their own.
"""

import copy
import inspect
import json
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import D_MODEL, N_CTX, PAPER_DATA, tiny_sae_config
from sae_lens import (
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETrainingRunner,
    StandardSAE,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
)
from saes import run_fresh
from safetensors.torch import load_file

import sae_lens_multilayer
from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    MultiLayerSAE,
    MultiLayerSAEConfig,
    MultiLayerSAETrainingRunner,
    MultiLayerTrainingSAE,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer._registration import register

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use LanguageModelSAE:DeprecationWarning"
)
both_runners = pytest.mark.parametrize(
    "runner_class", [LanguageModelSAETrainingRunner, SAETrainingRunner]
)


# The registries


def test_saelens_lists_the_architecture():
    known = (MultiLayerSAE, MultiLayerSAEConfig)
    known_training = (MultiLayerTrainingSAE, MultiLayerTrainingSAEConfig)

    assert get_sae_class("multilayer") == known
    assert get_sae_training_class("multilayer") == known_training


def test_registering_again_changes_nothing():
    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    constructor = LanguageModelSAETrainingRunner.__init__

    register()
    register()

    assert before == (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
    assert LanguageModelSAETrainingRunner.__init__ is constructor


@pytest.mark.parametrize("registry", [SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY])
def test_a_foreign_class_under_our_name_is_an_error(registry, monkeypatch):
    foreign = (StandardSAE, StandardTrainingSAEConfig)
    monkeypatch.setitem(registry, "multilayer", foreign)

    with pytest.raises(ValueError, match="multilayer already registered"):
        register()

    assert registry["multilayer"] == foreign


def test_public_names_are_those_of_all():
    names = sae_lens_multilayer.__all__
    present = {
        name
        for name, value in vars(sae_lens_multilayer).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }

    assert names == sorted(names)
    assert present - {"register"} == set(names)
    assert sae_lens_multilayer.__version__


def test_the_runners_keep_their_signatures_and_documentation():
    constructor = LanguageModelSAETrainingRunner.__init__

    assert list(inspect.signature(constructor).parameters) == [
        "self",
        "cfg",
        "override_dataset",
        "override_model",
        "override_sae",
    ]
    assert constructor.__qualname__ == "LanguageModelSAETrainingRunner.__init__"
    assert "run_trainer_with_interruption_handling" in dir(MultiLayerSAETrainingRunner)


# The host's command line


def test_the_hosts_command_line_still_gives_stock_saes():
    cfg = _parse_cfg_args(["--model_name", "m", "--l1_coefficient", "3"])

    assert type(cfg.sae) is StandardTrainingSAEConfig
    assert cfg.sae.l1_coefficient == 3
    assert not isinstance(cfg, MultiLayerConfig)


def test_the_hosts_command_line_offers_our_architecture():
    arguments = "--architecture multilayer --d_in 16 --d_sae 64 --k 8 --k_aux 4"

    cfg = _parse_cfg_args(arguments.split())

    assert cfg.sae == MultiLayerTrainingSAEConfig(d_in=16, d_sae=64, k=8, k_aux=4)


# Multi-layer configs


@both_runners
def test_saelens_runners_run_the_multi_layer_job(
    runner_class, make_config, token_dataset, model
):
    cfg = make_config()

    runner = runner_class(cfg=cfg, override_dataset=token_dataset, override_model=model)

    assert isinstance(runner, runner_class)
    assert isinstance(runner, MultiLayerSAETrainingRunner)
    assert type(runner).__name__ in (
        "MultiLayerSAETrainingRunner",
        runner_class.__name__,
    )
    assert isinstance(runner.activations_store, MultiLayerActivationsStore)
    sae = runner.run()
    assert isinstance(sae, MultiLayerTrainingSAE)
    assert len(sae.views()) == 2


def test_positional_overrides_are_taken(make_config, token_dataset, model):
    sae = MultiLayerTrainingSAE(tiny_sae_config())

    runner = LanguageModelSAETrainingRunner(make_config(), token_dataset, model, sae)

    assert runner.sae is sae
    assert runner.model is model


def test_a_subclass_of_our_config_is_a_multi_layer_config(
    make_config, token_dataset, model
):
    class Mine(MultiLayerConfig):
        pass

    cfg = Mine(**vars_of(make_config()))

    runner = LanguageModelSAETrainingRunner(cfg, token_dataset, model)

    assert isinstance(runner, MultiLayerSAETrainingRunner)


def vars_of(cfg) -> dict:
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


def users_subclass(base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        class Mine(base):
            colour = "red"

            def __init__(self, cfg, *args, note="", **kwargs):
                self.calls = [f"init {note}"]
                super().__init__(cfg, *args, **kwargs)

            def run(self):
                self.calls.append("run")
                return super().run()

            def save_final_sae(self, sae, output_path, log_feature_sparsity=None):
                self.calls.append("save")
                super().save_final_sae(sae, output_path, log_feature_sparsity)

            def _set_sae_metadata(self):
                super()._set_sae_metadata()
                self.sae.cfg.metadata.note = "mine"

            def run_trainer_with_interruption_handling(self, trainer):
                self.calls.append(type(trainer).__name__)
                return super().run_trainer_with_interruption_handling(trainer)

    return Mine


@pytest.mark.parametrize(
    "base",
    [LanguageModelSAETrainingRunner, SAETrainingRunner, MultiLayerSAETrainingRunner],
)
def test_a_users_subclass_runs_the_multi_layer_job_with_its_overrides(
    base, make_config, token_dataset, model
):
    mine = users_subclass(base)

    runner = mine(make_config(), token_dataset, override_model=model, note="first")

    assert isinstance(runner, mine)
    assert isinstance(runner, base)
    assert isinstance(runner, MultiLayerSAETrainingRunner)
    assert type(runner).__name__ == "Mine"
    assert runner.colour == "red"
    sae = runner.run()
    assert runner.calls == ["init first", "run", "MultiLayerTrainer", "save"]
    assert sae.cfg.metadata.note == "mine"
    assert len(sae.cfg.metadata.hook_names) == 2


def test_a_subclass_without_a_multi_layer_config_is_unchanged(
    token_dataset, model, tmp_path
):
    mine = users_subclass(LanguageModelSAETrainingRunner)

    runner = mine(stock_config(tmp_path), token_dataset, override_model=model)
    runner.run()

    assert type(runner) is mine
    assert runner.calls == ["init ", "run", "SAETrainer", "save"]


def test_two_runs_of_one_class_have_one_class(make_config, token_dataset, model):
    mine = users_subclass(LanguageModelSAETrainingRunner)

    first, second = (mine(make_config(), token_dataset, model) for _ in range(2))

    assert type(first) is type(second)


def test_the_deprecated_runner_warns_once_and_as_before(
    make_config, token_dataset, model
):
    cfg = make_config()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SAETrainingRunner(cfg, token_dataset, model)

    message = "Use LanguageModelSAETrainingRunner instead"
    ours = [w for w in caught if str(w.message) == message]
    assert [w.filename for w in ours] == [__file__]


# Everything else is as before


def stock_config(tmp_path) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32),
        hook_name="blocks.0.hook_resid_post",
        model_name="tiny",
        context_size=N_CTX,
        training_tokens=256,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        prepend_bos=False,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=str(tmp_path / "stock"),
        checkpoint_path=None,
    )


@both_runners
def test_other_configs_run_saelens_own_job(
    runner_class, token_dataset, model, tmp_path
):
    runner = runner_class(
        stock_config(tmp_path), override_dataset=token_dataset, override_model=model
    )

    assert type(runner) is runner_class
    assert type(runner.activations_store) is ActivationsStore
    sae = runner.run()
    assert type(sae) is StandardTrainingSAE
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_resid_post"


def test_configs_can_be_copied(make_config):
    cfg = make_config()

    assert copy.deepcopy(cfg) == cfg


TRAIN_STOCK = """
import json, sys
model_folder, output, note = sys.argv[1:]
known = "matplotlib", "triton"  # what `import sae_lens` brings is not ours
if note == "with":
    import sae_lens_multilayer
    at_import = [name for name in known if name in sys.modules]
else:
        at_import = [name for name in known if name in sys.modules]

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig,
    SAETrainingRunner, TopKTrainingSAEConfig,
)
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

torch.manual_seed(0)
model = HookedTransformer(
    HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_mlp=32, d_vocab=512,
        act_fn="gelu", seed=0, default_prepend_bos=False,
    ),
    tokenizer=AutoTokenizer.from_pretrained(model_folder),
)
dataset = Dataset.from_dict({"input_ids": torch.randint(1, 512, (64, 16)).tolist()})
settings = dict(
    model_name="tiny", context_size=16, training_tokens=2048,
    train_batch_size_tokens=64, store_batch_size_prompts=4, n_batches_in_buffer=16,
    prepend_bos=False, verbose=False, logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
)
cfg = LanguageModelSAERunnerConfig(
    sae=TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4),
    hook_name="blocks.1.hook_resid_post", lr=1e-2, output_path=output, **settings,
)
runner = LanguageModelSAETrainingRunner(cfg, dataset, model)
assert type(runner) is LanguageModelSAETrainingRunner
runner.run()
report = {"at_import": at_import}
assert ("sae_lens_multilayer" in sys.modules) == (note == "with")

if note == "with":
    import importlib

    def multi_layer_job():
        from sae_lens_multilayer import MultiLayerConfig, MultiLayerTrainingSAEConfig

        sae = MultiLayerTrainingSAEConfig(d_in=16, d_sae=64, k=4)
        cfg = MultiLayerConfig(sae=sae, output_path=None, **settings)
        runner = SAETrainingRunner(cfg, dataset, model)
        assert isinstance(runner, sae_lens_multilayer.MultiLayerSAETrainingRunner)
        return runner.run().cfg.metadata.hook_names

    report["after import"] = multi_layer_job()
    importlib.reload(sae_lens_multilayer)
    report["after reload"] = multi_layer_job()
    for name in list(sys.modules):
        if name.startswith("sae_lens_multilayer"):
            del sys.modules[name]
    import sae_lens_multilayer

    report["after a second import"] = multi_layer_job()
    constructor = LanguageModelSAETrainingRunner.__init__
    report["patches"] = 0
    while hasattr(constructor, "__wrapped__"):
        constructor, report["patches"] = constructor.__wrapped__, report["patches"] + 1
else:
    def members():
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "sae_lens":
                for key, value in vars(module).items():
                    yield f"{name}.{key}", value
                    if isinstance(value, type) and value.__module__ == name:
                        for inner, attribute in vars(value).items():
                            yield f"{name}.{key}.{inner}", attribute

    before = dict(members())
    import sae_lens_multilayer

    after = dict(members())
    report["changed"] = [
        key for key, value in before.items()
        if after[key] is not value and not key.endswith("_abc_impl")
    ]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def in_fresh_processes(tmp_path_factory):
    """Train one stock SAE in two processes, with this package imported and without."""
    parent = tmp_path_factory.mktemp("stock")

    def run(note):
        folder = parent / note
        printed = run_fresh(TRAIN_STOCK, PAPER_DATA / "model", folder, note)
        return json.loads(printed.splitlines()[-1]), folder

    notes = ("with", "without")
    with ThreadPoolExecutor() as pool:
        return dict(zip(notes, pool.map(run, notes), strict=True))


def test_a_stock_sae_trains_to_the_same_bits_with_this_package_imported(
    in_fresh_processes,
):
    folders = [folder for _, folder in in_fresh_processes.values()]
    mine, stock = (load_file(folder / "sae_weights.safetensors") for folder in folders)

    assert mine.keys() == stock.keys()
    assert all(torch.equal(mine[name], t) for name, t in stock.items())
    mine_cfg, stock_cfg = (json.loads((f / "cfg.json").read_text()) for f in folders)
    assert mine_cfg == stock_cfg


def test_importing_this_package_does_not_import_matplotlib_or_triton(
    in_fresh_processes,
):
    with_package, without = (report for report, _ in in_fresh_processes.values())

    assert set(with_package["at_import"]) <= set(without["at_import"])


@pytest.mark.parametrize(
    "when", ["after import", "after reload", "after a second import"]
)
def test_the_multi_layer_job_runs_when_this_package_comes_first(
    in_fresh_processes, when
):
    report, _ = in_fresh_processes["with"]

    assert report[when] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


def test_importing_this_package_again_patches_the_runner_once(in_fresh_processes):
    report, _ = in_fresh_processes["with"]

    assert report["patches"] == 1


def test_saelens_is_patched_in_one_file_only(in_fresh_processes):
    report, _ = in_fresh_processes["without"]

    assert report["changed"] == [
        "sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner.__init__"
    ]
