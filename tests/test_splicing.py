"""Reference: the paper's numbers, SAELens' `run_evals`, and whole passes with hooks."""

import inspect
import json
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX, PAPER_DATA, count_calls, tiny_model
from sae_lens import (
    HookedSAETransformer,
    StandardSAE,
    StandardSAEConfig,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.load_model import load_model
from saes import host_numbers
from safetensors.torch import load_file

from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerSAE,
    MultiLayerSAEConfig,
    SpliceMetrics,
    evaluate,
    reconstruction_metrics,
)
from sae_lens_multilayer.evaluation import scores

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
COLUMNS = [
    "ce_loss_clean",
    "ce_loss_spliced",
    "delta_ce",
    "kl_div",
    "kl_div_reverse",
    "ce_loss_ablated",
    "ce_loss_score",
    "fvu",
    "fvu_scalar",
    "mse",
    "l0",
    "l1",
    "silent_fraction",
    "dead_fraction",
]


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer, n_layers=4)


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


def random_sae(hook_names=HOOKS, d_in=16) -> MultiLayerSAE:
    sae = MultiLayerSAE(MultiLayerSAEConfig(d_in=d_in, d_sae=64, k=4))
    sae.cfg.metadata.hook_names = list(hook_names)
    sae.cfg.metadata.context_size = N_CTX
    sae.cfg.metadata.prepend_bos = False
    return sae


def unannotated(function) -> Any:
    """As users call it, without the check of annotations that the tests run under."""
    return torch.no_grad()(inspect.unwrap(function))


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, atol=2e-6) -> None:
    pd.testing.assert_frame_equal(found, expected, check_exact=False, atol=atol)


@pytest.fixture(scope="module")
def data():
    weights = load_file(PAPER_DATA / "plain.safetensors")
    hooks = [f"gpt_neox.layers.{layer}" for layer in range(5)]
    sae = MultiLayerSAE(MultiLayerSAEConfig(d_in=64, d_sae=512, k=8))
    sae.load_state_dict(
        {
            "W_enc": weights["encoder.weight"].T,
            "W_dec": weights["decoder.weight"].T,
            "b_dec": weights["pre_encoder_bias"],
        }
    )
    sae.cfg.metadata.hook_names = hooks
    folder = str(PAPER_DATA / "model")
    model = load_model("AutoModelForCausalLM", folder, "cpu", {}, hooks)
    numbers = json.loads((PAPER_DATA / "splices.json").read_text())
    return sae, model, load_file(PAPER_DATA / "activations.safetensors"), numbers


class TestThePapersNumbers:
    @pytest.mark.parametrize(
        ("column", "name"),
        [
            ("ce_loss_clean", "ce_clean"),
            ("ce_loss_spliced", "ce_spliced"),
            ("delta_ce", "delta_ce"),
            ("kl_div", "kl_clean_spliced"),
            ("kl_div_reverse", "kl_spliced_clean"),
            ("fvu", "fvu_per_dimension_mean"),
        ],
    )
    def test_standard_metrics(self, data, column, name):
        sae, model, inputs, numbers = data
        table = evaluate(sae, model, inputs["tokens"]).to_dataframe()
        assert table[column].tolist() == pytest.approx(numbers["plain"][name], abs=1e-5)

    def test_fvu_of_the_papers_code_is_fvu_scalar(self, data):
        sae, model, inputs, numbers = data
        metrics = reconstruction_metrics(sae, model, inputs["tokens"])
        expected = numbers["plain_reference_fvu"]
        assert metrics.fvu_scalar.tolist() == pytest.approx(expected, abs=1e-6)

    def test_special_tokens_keep_their_own_activations(self, data):
        sae, model, inputs, numbers = data
        metrics = evaluate(sae, model, inputs["tokens_special"], keep_tokens=[0])
        table, expected = metrics.to_dataframe(), numbers["special_tokens"]
        for column, name in [
            ("ce_loss_clean", "ce_clean"),
            ("delta_ce", "delta_ce"),
            ("kl_div", "kl_clean_spliced"),
        ]:
            assert table[column].tolist() == pytest.approx(expected[name], abs=1e-5)


class TestSAELens:
    @pytest.mark.parametrize("exclude", [[], [1, 2, 3]])
    def test_run_evals_on_a_view_gives_the_same_numbers(self, model, exclude):
        tokens = torch.randint(1, 20, (6, N_CTX))
        sae = random_sae()
        table = evaluate(sae, model, tokens, exclude_tokens=exclude).to_dataframe()
        for name in HOOKS:
            host = host_numbers(sae.view(name), model, tokens, exclude)
            ours = {key: table.loc[name, key] for key in host}
            assert ours == pytest.approx(host, abs=1e-5)


class TestOneResult:
    def test_the_table_has_a_row_for_each_hook_and_the_columns_of_the_design(
        self, model, tokens
    ):
        metrics = evaluate(random_sae(), model, tokens)
        table = metrics.to_dataframe()
        assert list(table.index) == HOOKS
        assert list(table.columns) == COLUMNS
        assert metrics.mean()["kl_div"] == pytest.approx(table["kl_div"].mean())
        log = metrics.to_log_dict()
        assert log["layer_2/delta_ce"] == table["delta_ce"].iloc[2]

    def test_saving_and_loading_changes_nothing(self, model, tokens, tmp_path):
        metrics = evaluate(random_sae(), model, tokens, together="all")
        metrics.save(tmp_path / "evaluation")
        loaded = SpliceMetrics.load(tmp_path / "evaluation")
        pd.testing.assert_frame_equal(loaded.to_dataframe(), metrics.to_dataframe())
        assert loaded.together == metrics.together

    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    @pytest.mark.parametrize("ablation", ["zero", "mean"])
    def test_batch_size_changes_nothing(self, model, tokens, batch_size, ablation):
        options = {"together": "all", "ablation": ablation, "exclude_tokens": [7]}
        tokens[0, 3] = 7
        sae = random_sae()
        parts = evaluate(sae, model, tokens, batch_size_prompts=batch_size, **options)
        whole = evaluate(sae, model, tokens, batch_size_prompts=9, **options)
        assert_same(parts.to_dataframe(), whole.to_dataframe())
        assert parts.together == pytest.approx(whole.together, abs=2e-6)

    def test_few_logits_at_a_time_change_nothing(self, model, tokens, monkeypatch):
        sae = random_sae()
        whole = evaluate(sae, model, tokens).to_dataframe()
        monkeypatch.setattr(
            "sae_lens_multilayer.evaluation.scores._LOGITS_AT_A_TIME", 3 * 5 * D_VOCAB
        )
        monkeypatch.setattr(
            "sae_lens_multilayer.evaluation.evaluation._POSITIONS_PER_BLOCK",
            {"cpu": 2 * N_CTX},
        )
        assert_same(evaluate(sae, model, tokens).to_dataframe(), whole)

    @pytest.mark.parametrize(
        "hook_names",
        [HOOKS, HOOKS[1:3], [f"blocks.{i}.hook_resid_pre" for i in (0, 2)]],
    )
    def test_starting_in_the_middle_equals_hooks_on_whole_passes(
        self, model, tokens, hook_names
    ):
        sae = random_sae(hook_names)
        options = {"together": "all", "keep_positions": [0], "exclude_tokens": [5]}
        fast = evaluate(sae, model, tokens, from_middle=True, **options)
        slow = evaluate(sae, model, tokens, from_middle=False, **options)
        assert_same(fast.to_dataframe(), slow.to_dataframe(), atol=1e-5)
        assert fast.together == pytest.approx(slow.together, abs=1e-5)

    @pytest.mark.parametrize("positions", ["standard", "rotary"])
    def test_padding_on_the_left_is_masked_in_every_block(
        self, tokenizer, tokens, positions, monkeypatch
    ):
        # Reference: each prompt alone and without padding.
        changes = {"positional_embedding_type": positions, "rotary_dim": 8}
        model: Any = tiny_model(tokenizer, n_layers=4, **changes)
        for block in model.blocks:
            # Where all is masked, as padding is, an attention does not even give this.
            block.attn.b_V.data.normal_()
        monkeypatch.setattr(model.tokenizer, "padding_side", "left")
        pad = model.tokenizer.pad_token_id
        sae, tokens = random_sae(), tokens.masked_fill(tokens == pad, pad + 1)[:3]
        padded = tokens.clone()
        padded[0, :5] = pad
        for from_middle in (None, False):
            metrics = evaluate(
                sae, model, padded, exclude_tokens=[pad], from_middle=from_middle
            )
            alone = [evaluate(sae, model, tokens[:1, 5:], from_middle=False)]
            alone += [evaluate(sae, model, tokens[1:], from_middle=False)]
            found, one, two = (
                m.to_dataframe().filter(regex="^ce_loss_(clean|spliced|ablated)$")
                for m in (metrics, *alone)
            )
            expected = (10 * one + 30 * two) / 40  # by predicted tokens
            assert_same(found, expected, atol=1e-5)

    def test_other_hooks_take_whole_passes(self, model, tokens):
        sae = random_sae([f"blocks.{i}.hook_mlp_out" for i in range(4)])
        assert evaluate(sae, model, tokens).to_dataframe()["kl_div"].gt(0).all()
        with pytest.raises(ValueError, match="not the input or output of a block"):
            evaluate(sae, model, tokens, from_middle=True)

    def test_each_run_starts_after_the_spliced_block(self, model, tokens, monkeypatch):
        calls = []
        for i, block in enumerate(model.blocks):
            # Not a hook, with which whole passes would run.
            def forward(x, *args, i=i, original=block.forward, **kwargs):
                calls.append((i, len(x)))
                return original(x, *args, **kwargs)

            monkeypatch.setattr(block, "forward", forward)
        evaluate(random_sae(), model, tokens, batch_size_prompts=3)
        # The check that blocks can be called: a whole pass, then each block alone; and
        # that they read nothing of a prompt beside the stream.
        of_check, calls = calls[:12], calls[12:]
        whole = [(i, 2) for i in range(4)]
        assert of_check == [*whole, *((3 - i, 4) for i in range(4)), *whole]
        # The clean prompts and for each hook below the spliced ones, of each batch; and
        # one prompt, ablated at each hook below, for both batches.
        assert calls == [(i, n + i * n) for n in (3, 2, 1) for i in range(4)]

    def test_only_spliced_runs_are_compared_with_the_clean_one(
        self, model, tokens, monkeypatch
    ):
        calls = count_calls(monkeypatch, scores, "score")
        evaluate(random_sae(), model, tokens, together="all")
        assert len(calls) == len(HOOKS) + 1

    def test_only_the_scored_positions_have_logits(self, model, tokens, monkeypatch):
        tokens[:, 2] = 7
        tokens = tokens.masked_fill(tokens == 9, 8)
        sae = random_sae()
        options: dict[str, Any] = {"exclude_tokens": [7, 9], "keep_positions": [4]}
        expected = evaluate(sae, model, tokens, **options).to_dataframe()
        forward, n_rows = model.unembed.forward, []
        monkeypatch.setattr(
            model.unembed, "forward", lambda x: n_rows.append(len(x)) or forward(x)
        )
        found = evaluate(sae, model, tokens, **options).to_dataframe()
        assert_same(found, expected)
        assert max(n_rows) <= (tokens != 7).sum()

    def test_tokens_may_come_from_a_store(self, model, make_config, token_dataset):
        cfg = make_config()
        store = MultiLayerActivationsStore.from_config(model, cfg, token_dataset)
        sae = random_sae()
        found = evaluate(sae, model, store, n_prompts=3).to_dataframe()
        given = torch.as_tensor(token_dataset[:3]["input_ids"])
        assert_same(found, evaluate(sae, model, given).to_dataframe())
        # The next ones are as many as a batch of the store.
        found = evaluate(sae, model, store).to_dataframe()
        given = torch.as_tensor(token_dataset[3:7]["input_ids"])
        assert_same(found, evaluate(sae, model, given).to_dataframe())


class TestWhatIsReplaced:
    def test_the_error_term_restores_the_model(self, model, tokens):
        metrics = evaluate(
            random_sae(), model, tokens, use_error_term=True, together="all"
        )
        assert metrics.together is not None
        table = metrics.to_dataframe()
        assert table["delta_ce"].abs().max() < 1e-6
        assert table["kl_div"].abs().max() < 1e-6
        assert abs(metrics.together["delta_ce"]) < 1e-6
        assert (table["fvu"] > 0.1).all()

    @pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
    def test_the_error_term_restores_a_model_in_bfloat16(
        self, tokenizer, tokens, sae_dtype
    ):
        model = tiny_model(tokenizer, n_layers=4, dtype=torch.bfloat16)
        sae = random_sae().to(sae_dtype)
        table = evaluate(sae, model, tokens, use_error_term=True).to_dataframe()
        assert table["delta_ce"].abs().max() < 1e-6
        assert table["kl_div"].abs().max() < 1e-6

    def test_kept_positions_everywhere_change_nothing(self, model, tokens):
        with pytest.raises(ValueError, match="at least one token"):
            evaluate(random_sae(), model, tokens, keep_positions=range(N_CTX))

    @pytest.mark.parametrize("from_middle", [None, False])
    def test_excluded_positions_are_as_excluded_tokens(
        self, model, tokens, from_middle
    ):
        sae = random_sae()
        tokens = tokens.masked_fill(tokens == 7, 8)
        tokens[:, 0] = tokens[:, 3] = 7
        by_id, by_place = (
            evaluate(
                sae,
                model,
                tokens,
                from_middle=from_middle,
                exclude_tokens=ids,
                exclude_positions=places,
            )
            for ids, places in [([7], []), ([], [0, 3])]
        )
        assert_same(by_id.to_dataframe(), by_place.to_dataframe())
        kept = evaluate(sae, model, tokens, keep_positions=[0, 3])
        assert by_place.ce_loss_clean != kept.ce_loss_clean
        found = reconstruction_metrics(
            sae, model, tokens, exclude_positions=[0, 3 - N_CTX]
        )
        table = found.to_dataframe()
        expected = by_place.to_dataframe().loc[:, list(table.columns)]
        assert_same(table, expected, atol=1e-5)

    def test_together_is_the_model_with_all_views_attached(self, tokenizer, tokens):
        model: Any = tiny_model(tokenizer, HookedSAETransformer, n_layers=4)
        sae = random_sae()
        found = evaluate(sae, model, tokens, together=[0, HOOKS[2]]).together
        assert found is not None
        with model.saes(saes=[sae.view(0), sae.view(2)]):
            loss = model(tokens, return_type="loss")
        assert found["ce_loss_spliced"] == pytest.approx(loss.item(), abs=1e-5)

    def test_mean_ablation_is_by_the_mean_of_these_tokens(self, model, tokens):
        found = evaluate(random_sae(), model, tokens, ablation="mean").to_dataframe()
        _, cache = model.run_with_cache(tokens)
        for name in HOOKS:
            mean = cache[name].flatten(0, 1).mean(0)
            loss = model.run_with_hooks(
                tokens,
                return_type="loss",
                fwd_hooks=[(name, lambda x, hook, mean=mean: mean.expand_as(x))],
            )
            assert found.loc[name, "ce_loss_ablated"] == pytest.approx(
                loss.item(), abs=1e-5
            )

    @pytest.mark.parametrize("ablation", ["zero", "mean"])
    @pytest.mark.parametrize("kind", ["attn.hook_z", "hook_mlp_out"])
    def test_only_what_passes_the_hook_is_replaced_with_heads_or_without(
        self, model, tokens, ablation, kind
    ):
        names = [f"blocks.{layer}.{kind}" for layer in range(4)]
        sae = random_sae(names)
        found = evaluate(sae, model, tokens, ablation=ablation, together="all")
        table = found.to_dataframe()
        _, cache = model.run_with_cache(tokens)
        for i, name in enumerate(names):
            z = cache[name]
            x_hat = sae.view(i)(z.flatten(2)).view(z.shape)
            removed = z.mean((0, 1)) if ablation == "mean" else torch.zeros(())
            for column, by in [
                ("ce_loss_spliced", x_hat),
                ("ce_loss_ablated", removed),
            ]:
                loss = model.run_with_hooks(
                    tokens,
                    return_type="loss",
                    fwd_hooks=[(name, lambda z, hook, by=by: by.expand_as(z))],
                )
                assert table.loc[name, column] == pytest.approx(loss.item(), abs=1e-5)
            mse = (x_hat - z).square().mean().item()
            assert table.loc[name, "mse"] == pytest.approx(mse, rel=1e-4)
        restored = evaluate(sae, model, tokens, use_error_term=True).to_dataframe()
        assert restored["kl_div"].abs().max() < 1e-6

    @pytest.mark.parametrize("chosen", [2, HOOKS[2]])
    def test_together_takes_one_hook_alone(self, model, tokens, chosen):
        found = evaluate(random_sae(), model, tokens, together=chosen)
        assert found.together is not None
        assert found.together["kl_div"] == pytest.approx(
            found.kl_div[2].item(), abs=2e-6
        )

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
    def test_tokens_of_any_integer_type(self, model, tokens, dtype):
        sae = random_sae()
        found = evaluate(sae, model, tokens.to(dtype)).to_dataframe()
        assert_same(found, evaluate(sae, model, tokens).to_dataframe())

    def test_one_view_or_single_layer_sae_is_a_list_of_one(self, model, tokens):
        stock = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32))
        stock.cfg.metadata.hook_name = HOOKS[1]
        for sae in (random_sae().view(1), stock):
            alone = evaluate(sae, model, tokens).to_dataframe()
            assert list(alone.index) == [HOOKS[1]]
            assert_same(alone, evaluate([sae], model, tokens).to_dataframe())

    def test_a_list_of_single_layer_saes(self, model, tokens):
        saes = []
        for name, d_sae in zip(HOOKS[:2], (32, 48), strict=True):
            sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=d_sae))
            sae.cfg.metadata.hook_name = name
            saes.append(sae)
        table = evaluate(saes, model, tokens).to_dataframe()
        for i, sae in enumerate(saes):
            alone = evaluate([sae], model, tokens).to_dataframe()
            assert_same(table.iloc[[i]], alone)

    def test_views_give_the_same_metrics_as_the_multi_layer_sae(self, model, tokens):
        sae = random_sae()
        whole = evaluate(sae, model, tokens).to_dataframe()
        views = evaluate(sae.views(), model, tokens).to_dataframe()
        assert_same(views.iloc[:, :-1], whole.iloc[:, :-1], atol=1e-5)
        assert (views["dead_fraction"] == views["silent_fraction"]).all()

    def test_bfloat16(self, tokenizer, tokens):
        model = tiny_model(tokenizer, n_layers=4, dtype=torch.bfloat16)
        sae = random_sae().to(torch.bfloat16)
        table = evaluate(sae, model, tokens).to_dataframe()
        assert table.notna().all(axis=None)
        assert (table["kl_div"] > 0).all()


class TestBadInput:
    def test_no_predicted_token(self, model, tokens, monkeypatch):
        monkeypatch.setattr(model, "forward", None)  # as it is known before any run
        message = "at least one predicted token"
        with pytest.raises(ValueError, match=message):
            evaluate(random_sae(), model, torch.tensor([[1], [2]]))
        places = list(range(tokens.shape[1] - 1))
        with pytest.raises(ValueError, match=message):
            evaluate(random_sae(), model, tokens, exclude_positions=places)

    def test_tokens_longer_than_the_context(self, model):
        tokens = torch.ones(1, N_CTX + 1, dtype=torch.long)
        with pytest.raises(ValueError, match=f"at most {N_CTX} tokens"):
            evaluate(random_sae(), model, tokens)

    def test_no_prompts(self, model, tokens):
        for none in (tokens[:0], tokens[:, :0]):
            with pytest.raises(ValueError, match="at least one prompt of at least one"):
                evaluate(random_sae(), model, none)

    @pytest.mark.parametrize("token_id", [-1, D_VOCAB])
    def test_token_ids_outside_the_vocabulary(self, model, tokens, token_id):
        tokens[1, 2] = token_id
        with pytest.raises(ValueError, match=rf"in \[0, {D_VOCAB}\).*{token_id}"):
            evaluate(random_sae(), model, tokens)

    def test_token_ids_outside_the_vocabulary_of_a_hugging_face_model(self, data):
        sae, model, inputs, _ = data
        with pytest.raises(ValueError, match=r"in \[0, 512\).*512"):
            evaluate(sae, model, torch.full_like(inputs["tokens"], 512))

    @pytest.mark.parametrize(
        ("wrong", "found"),
        [
            (torch.ones(3, dtype=torch.long), r"int64 of shape \(3,\)"),
            (torch.ones(2, 3), r"float32 of shape \(2, 3\)"),
            (torch.ones(2, 3, dtype=torch.bool), r"bool of shape \(2, 3\)"),
            ([[1, 2]], r"\[\[1, 2\]\]"),
        ],
    )
    def test_tokens_that_are_no_matrix_of_ids(self, model, wrong, found):
        with pytest.raises(
            ValueError, match=rf"shape \[prompt, pos\].*; got .*{found}"
        ):
            unannotated(evaluate)(random_sae(), model, wrong)

    def test_no_such_ablation(self, model, tokens):
        with pytest.raises(ValueError, match=r"\('zero', 'mean'\).*got means"):
            unannotated(evaluate)(random_sae(), model, tokens, ablation="means")

    @pytest.mark.parametrize("size", [0, -1])
    def test_batches_of_no_prompts(self, model, tokens, size):
        message = f"`batch_size_prompts` must be at least 1; got {size}"
        with pytest.raises(ValueError, match=message):
            evaluate(random_sae(), model, tokens, batch_size_prompts=size)

    @pytest.mark.parametrize("place", [N_CTX, -N_CTX - 1])
    def test_kept_positions_outside_the_prompt(self, model, tokens, place):
        message = rf"`keep_positions` must be in \[-16, 16\).*got \[{place}\]"
        with pytest.raises(ValueError, match=message):
            evaluate(random_sae(), model, tokens, keep_positions=[0, place])

    def test_together_with_a_hook_that_the_sae_does_not_have(self, model, tokens):
        with pytest.raises(ValueError, match="'blocks' is not a hook of this SAE"):
            evaluate(random_sae(), model, tokens, together="blocks")

    @pytest.mark.parametrize("name", [HOOKS[0], "blocks.0.attn.hook_z"])
    def test_an_sae_of_another_width(self, model, tokens, name):
        with pytest.raises(ValueError, match=f"must be 16, .*'{name}'; got 8"):
            evaluate(random_sae([name], d_in=8), model, tokens)

    def test_a_model_with_saes_attached(self, tokenizer, tokens):
        model: Any = tiny_model(tokenizer, HookedSAETransformer, n_layers=4)
        sae = random_sae()
        model.add_sae(sae.view(1))
        for measure in (evaluate, reconstruction_metrics):
            with pytest.raises(ValueError, match=r"`model.reset_saes\(\)`"):
                measure(sae, model, tokens)
        model.reset_saes()
        evaluate(sae, model, tokens)

    def test_a_bridge_with_saes_attached(self):
        folder = str(PAPER_DATA / "model")
        model = SAETransformerBridge.boot_transformers(folder, device="cpu")
        sae = random_sae([f"blocks.{i}.hook_out" for i in range(2)], d_in=64)
        model.add_sae(sae.view(0))
        with pytest.raises(ValueError, match=r"blocks\.0\.hook_out.*reset_saes"):
            evaluate(sae, model, torch.ones(1, 4, dtype=torch.long))

    def test_more_prompts_than_an_epoch_of_the_store_holds(
        self, model, make_config, token_dataset
    ):
        store = MultiLayerActivationsStore.from_config(
            model, make_config(), token_dataset.select(range(5))
        )
        with pytest.raises(ValueError, match=r"at most 5, .*; got 6"):
            evaluate(random_sae(), model, store, n_prompts=6)
        assert evaluate(random_sae(), model, store, n_prompts=5)
        with pytest.raises(ValueError, match="`n_prompts` must be at least 1; got 0"):
            evaluate(random_sae(), model, store, n_prompts=0)

    def test_an_sae_of_several_hooks_in_a_list(self, model, tokens):
        with pytest.raises(ValueError, match="by itself"):
            evaluate([random_sae()], model, tokens)

    def test_two_saes_for_one_hook(self, model, tokens):
        view = random_sae().view(0)
        with pytest.raises(ValueError, match="must name its own hook"):
            evaluate([view, view], model, tokens)

    def test_an_sae_of_one_head(self, model, tokens):
        sae = random_sae()
        sae.cfg.metadata.hook_head_index = 1
        with pytest.raises(ValueError, match="attention head"):
            evaluate(sae, model, tokens)

    def test_a_number_of_prompts_with_given_tokens(self, model, tokens):
        with pytest.raises(ValueError, match="take from a store"):
            evaluate(random_sae(), model, tokens, n_prompts=2)
