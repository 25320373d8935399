"""Circuits. References: brute-force patching of whole passes with dense SAEs, autograd,
figures computed by hand, and the fields of the public graph schema."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import count_calls, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from saes import random_lens, random_sae
from scipy import stats
from test_walk import block_names, bridge_of, random_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from sae_lens_multilayer import cli
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures import draw
from sae_lens_multilayer.studies.circuits import (
    Circuits,
    CircuitSettings,
    CircuitTable,
    Streams,
    attribution_graph,
    circuits,
    circuits_study,
    gradients,
    jaccard,
    make_task,
)
from sae_lens_multilayer.studies.circuits import inputs as inputs_module
from sae_lens_multilayer.studies.circuits import run as study_module
from sae_lens_multilayer.studies.circuits.curves import (
    areas,
    check_counts,
    check_shares,
    faithfulness,
    resampled_faithfulness,
    size_at,
)
from sae_lens_multilayer.studies.circuits.nodes import ERROR, find_nodes
from sae_lens_multilayer.studies.circuits.run import run_settings
from sae_lens_multilayer.studies.circuits.runs import run_circuits
from sae_lens_multilayer.studies.circuits.same_fvu import match_fvu, mean_fvu
from sae_lens_multilayer.studies.circuits.seeds import mutual_nearest
from sae_lens_multilayer.studies.circuits.words import (
    NOUNS,
    OF_EVENTS,
    PREPOSITIONS,
    VERBS,
)

SCHEMA = Path(__file__).parent / "data" / "attribution_graph_schema.json"
N_LAYERS, D_IN, D_SAE, K = 3, 32, 48, 6
NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


def word_tokenizer(n_digits: int = 1, years: Sequence[str] = ()) -> Any:
    """One token for each word of the templates, and for each number of some digits.

    Args:
        years: Numbers that are not split.
    """
    words = ["The", "the", "lasted", "from", "year", "to", *PREPOSITIONS, *OF_EVENTS]
    words += [word for pair in (*NOUNS, *VERBS) for word in pair]
    numbers = [f"{i:0{n_digits}d}" for i in range(10**n_digits)]
    names = ["[UNK]", "[BOS]", *words, *numbers, *years]
    tokenizer = Tokenizer(
        models.WordLevel({n: i for i, n in enumerate(names)}, "[UNK]")
    )
    patterns = "|".join([*years, rf"\d{{{n_digits}}}"])
    digits = pre_tokenizers.Split(Regex(patterns), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), digits]
    )
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def make_case(tmp_path):
    """A float64 model and a function that makes SAEs for it."""

    def make(kind: str = "HookedTransformer", **changes: Any) -> tuple[Any, Any]:
        word_tokenizer().save_pretrained(tmp_path / "tokenizer")
        names = NAMES
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        n_layers = N_LAYERS
        if kind == "HookedTransformer":
            settings = {"n_layers": N_LAYERS, "d_model": D_IN, **changes}
            model: Any = tiny_model(tokenizer, **settings)
        elif kind == "bridge":
            model, n_layers = bridge_of("Llama", tokenizer, tmp_path), 4
            names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
        else:
            model, n_layers = random_model("GPTNeoX", tokenizer), 4
            names = block_names(model.model)

        def sae(lens: bool = False) -> Any:
            metadata = SAEMetadata(
                hook_names=names,
                model_name="tiny",
                context_size=16,
                prepend_bos=False,
            )
            settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "dtype": "float64"}
            one = random_sae(metadata=metadata, **settings)
            if lens:
                shape = {"n_layers": n_layers, "d_in": D_IN, "dtype": torch.float64}
                one.lens = random_lens(names, alignment="reference", **shape)
            return one

        return model.double(), sae

    return make


def effects_of(model: Any, task: Any, sae: Any, ablation: Any, **options: Any) -> Any:
    names, lm = sae.cfg.metadata.hook_names, as_model(model)
    streams = Streams.of(lm, task, names, 2)
    options = {"batch_size_prompts": 2, **options}
    found = gradients(lm, task, names, streams, ablation=ablation, **options)
    return streams, find_nodes(sae, task, streams, found, ablation, 2)


# Tasks


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("n_digits", [1, 2])
@pytest.mark.parametrize("name", ["agreement", "induction", "greater_than"])
def test_tasks_have_prompts_pairs_and_answers(name, n_digits, bos):
    tokenizer = word_tokenizer(n_digits)
    task = make_task(name, tokenizer, 12, seed=3, prepend_bos=bos)
    again = make_task(name, tokenizer, 12, seed=3, prepend_bos=bos)
    assert torch.equal(task.clean, again.clean)
    assert not torch.equal(task.clean, make_task(name, tokenizer, 12, 4, bos).clean)
    assert len(task) == 12
    assert (task.clean[:, 0] == 1).all() == bos == (task.positions[0] == "bos")
    changed = {"agreement": "subject", "induction": "answer", "greater_than": "year"}
    differs = task.clean != task.corrupted
    at = [i for i, c in enumerate(task.positions) if c == changed[name]]
    assert differs.any(0).nonzero()[:, 0].tolist() == at
    assert differs.any(1).all()
    text = tokenizer.decode(task.clean[0]).removeprefix("[BOS] ").split()
    correct = tokenizer.decode(task.candidates[task.is_correct[0]]).split()
    wrong = tokenizer.decode(task.candidates[task.is_wrong[0]]).split()
    if name == "agreement":
        number = int(text[1] in [pair[1] for pair in NOUNS])
        (pair,) = [pair for pair in VERBS if pair[number] == correct[0]]
        assert wrong == [pair[1 - number]]
    elif name == "induction":
        first = text.index(text[-1])
        assert [text[first + 1]] == correct
        other = tokenizer.decode(task.corrupted[0]).removeprefix("[BOS] ").split()
        assert [other[first + 1]] == wrong
    else:
        start = int(text[len(text) - {1: 7, 2: 5}[n_digits]])
        low, high = [int(y) for y in wrong], [int(y) for y in correct]
        assert sorted([*low, start, *high]) == list(range(10**n_digits))
        assert max(low) < start < min(high)


def test_the_metric_is_the_log_odds_of_correct_tokens():
    task = make_task("greater_than", word_tokenizer(), 4)
    logits = torch.randn(4, 200, dtype=torch.float64)
    probs = logits.softmax(1)[:, task.candidates]
    odds = (probs * task.is_correct).sum(1) / (probs * task.is_wrong).sum(1)
    torch.testing.assert_close(task.metric(logits), odds.log())
    torch.testing.assert_close(task.metric(logits[1:3], slice(1, 3)), odds.log()[1:3])
    one = make_task("agreement", word_tokenizer(), 4)
    correct, wrong = (
        logits[range(4), one.candidates[mask.int().argmax(1)]]
        for mask in (one.is_correct, one.is_wrong)
    )
    torch.testing.assert_close(one.metric(logits), correct - wrong)


def test_years_that_are_one_token_are_left_out():
    """As in the data of Hanna et al.: GPT-2 has some years as one token."""
    whole = ["1701", "1745", "1776", *(f"17{i}" for i in range(80, 100))]
    tokenizer = word_tokenizer(2, whole)
    task = make_task("greater_than", tokenizer, 60)
    split = [i for i in range(100) if f"17{i:02d}" not in whole]
    first = task.positions.index("year")
    starts = {int(tokenizer.decode([i])) for i in task.clean[:, first]}
    assert len(starts) > 20
    assert starts <= {*split[10:-10]}
    assert {tokenizer.decode([i]) for i in task.corrupted[:, first]} == {"00"}
    for i, row in enumerate(task.clean):
        year = int(tokenizer.decode([row[first]]))
        masks = task.is_correct[i], task.is_wrong[i]
        words = [tokenizer.decode(task.candidates[mask]).split() for mask in masks]
        sides = [sorted(map(int, side)) for side in words]
        assert sides == [[y for y in split if y > year], [y for y in split if y < year]]


def test_too_few_years_are_an_error():
    tokenizer = word_tokenizer(2, [f"17{i:02d}" for i in range(71)])
    with pytest.raises(ValueError, match=r"29 of 00 to 99 \(needed are 30\)"):
        make_task("greater_than", tokenizer, 4)


def test_induction_has_no_special_tokens():
    """Those that the tokenizer's file flags as special, with or without a role."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken("<mark>", special=True), AddedToken("plain")])
    mark, plain = tokenizer.convert_tokens_to_ids(["<mark>", "plain"])
    assert mark not in tokenizer.all_special_ids
    task = make_task("induction", tokenizer, 300)
    assert plain in task.clean
    assert not torch.isin(task.clean, torch.tensor([0, 1, mark])).any()


def test_what_a_task_needs(tokenizer):
    with pytest.raises(ValueError, match=r"'agreement'.*at least 2 of these nouns"):
        make_task("agreement", tokenizer, 4)
    with pytest.raises(ValueError, match="nouns of events"):
        make_task("greater_than", tokenizer, 4)
    whole = word_tokenizer(4)  # 1745 is one token
    with pytest.raises(ValueError, match="splits years"):
        make_task("greater_than", whole, 4)
    with pytest.raises(ValueError, match="`n_prompts` must be at least 1; got 0"):
        make_task("induction", tokenizer, 0)
    with pytest.raises(ValueError, match="tokenizer; it has none"):
        make_task("induction", None, 4)
    with pytest.raises(ValueError, match=r"'induction'.*got 'ioi'"):
        make_task("ioi", tokenizer, 4)


# Effects


def split_densely(sae: Any, x: Tensor, hook: str) -> tuple[Tensor, Tensor, Tensor]:
    """v, the raw vectors of all latents, and r, from the dense encoder."""
    acts = sae.encode(x, hook=hook)
    std = sae.into_lens(x, hook).std(-1, keepdim=True)
    v = acts * std
    zero = torch.zeros_like(sae.W_dec)
    directions = sae.out_of_lens(sae.W_dec, hook) - sae.out_of_lens(zero, hook)
    return v, directions, x - v @ directions


def ablated_densely(
    sae: Any, streams: Streams, layer: int, ablation: str
) -> tuple[Tensor, Tensor]:
    hook = sae.cfg.metadata.hook_names[layer]
    parts = [
        split_densely(sae, x[layer], hook) for x in (streams.clean, streams.corrupted)
    ]
    if ablation == "resample":
        return parts[1][0], parts[1][2]
    means = [
        torch.cat([parts[0][i], parts[1][i]]).mean(0, keepdim=True) for i in (0, 2)
    ]
    return means[0], means[1]


@torch.no_grad()
def score_with(model: Any, task: Any, hooks: dict[str, Any]) -> Tensor:
    return task.metric(as_model(model).logits_with_hooks(task.clean, hooks)[:, -1])


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_attribution_equals_patching_each_node_in_a_linear_model(
    ablation, lens, make_case
):
    linear = {"attn_only": True, "normalization_type": None}
    model, make_sae = make_case(**linear)
    with torch.no_grad():
        for block in model.blocks:  # attention weights do not depend on the tokens
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    sae = make_sae(lens)
    with torch.no_grad():
        task = make_task("agreement", model.tokenizer, 3)
        streams, nodes = effects_of(
            model, task, sae, ablation, method="attribution_patching"
        )
        clean = score_with(model, task, {})
        n_latents = 0
        for i, layer in enumerate(nodes):
            own = split_densely(sae, streams.clean[i], layer.hook)
            other = ablated_densely(sae, streams, i, ablation)
            steps = zip(layer.node_class, layer.node_latent, layer.effect, strict=True)
            for of_class, latent, effect in list(steps)[::5]:
                at = task.class_of == of_class
                dx = other[1] - own[2]
                if latent != ERROR:
                    j = int(latent)
                    dx = (other[0] - own[0])[..., j : j + 1] * own[1][j]
                    n_latents += 1
                patched = streams.clean[i] + dx * at.unsqueeze(-1)
                score = score_with(model, task, {layer.hook: lambda _, p=patched: p})
                expected = float((score - clean).mean())
                assert float(effect) == pytest.approx(expected, abs=1e-10)
        assert n_latents > 20
        assert max(float(layer.effect.abs().max()) for layer in nodes) > 1e-4


@pytest.mark.parametrize("kind", ["HookedTransformer", "Hugging Face", "bridge"])
@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_integrated_gradients_of_a_layer_add_up_to_its_ablation(
    kind, ablation, make_case
):
    model, make_sae = make_case(kind)
    task = make_task("induction", model.tokenizer, 3)
    options = {"method": "integrated_gradients", "n_steps": 80}
    streams, nodes = effects_of(model, task, make_sae(), ablation, **options)
    _, with_lens = effects_of(model, task, make_sae(True), ablation, **options)
    clean, ablated = score_with(model, task, {}), streams.ablated(ablation)
    for i, layer in enumerate(nodes):
        x = ablated[i].expand_as(streams.clean[i])
        total = float(
            (score_with(model, task, {layer.hook: lambda _, x=x: x}) - clean).mean()
        )
        for one in (layer, with_lens[i]):
            assert float(one.effect.sum()) == pytest.approx(total, rel=5e-3, abs=1e-6)


def test_gradients_from_the_middle_equal_those_of_whole_passes(make_case):
    model, _ = make_case()
    names, lm = NAMES, as_model(model)
    task = make_task("induction", model.tokenizer, 3)
    streams = Streams.of(lm, task, names, 3)
    one = gradients(lm, task, names, streams, n_steps=2, batch_size_prompts=2)
    model.blocks[1].register_forward_hook(lambda *_: None)
    other = as_model(model)
    assert other.why_whole_passes(names) is not None
    two = gradients(other, task, names, streams, n_steps=2, batch_size_prompts=3)
    torch.testing.assert_close(one.gradient, two.gradient)


# Circuits


@torch.no_grad()
def run_densely(
    model: Any,
    task: Any,
    sae: Any,
    streams: Streams,
    nodes: Any,
    keep: Tensor,
    kind: str,
) -> Tensor:
    """A circuit by whole passes: all nodes decoded, as in the definition."""
    hooks: dict[str, Any] = {}
    for i, (layer, kept) in enumerate(
        zip(nodes, keep.split([len(n.effect) for n in nodes]), strict=True)
    ):
        v_other, r_other = ablated_densely(sae, streams, i, kind)
        is_kept = torch.zeros(len(task.classes), D_SAE, dtype=torch.bool)
        error = torch.zeros(len(task.classes), dtype=torch.bool)
        latent = layer.node_latent
        rows, of_error = layer.node_class[kept], latent[kept] == ERROR
        is_kept[rows[~of_error], latent[kept][~of_error]] = True
        error[rows[of_error]] = True
        has_nodes = torch.isin(task.class_of, layer.node_class).view(1, -1, 1)

        def replace(
            x,
            i=i,
            layer=layer,
            is_kept=is_kept,
            error=error,
            m=has_nodes,
            v_other=v_other,
            r_other=r_other,
        ):
            v, directions, r = split_densely(sae, x, layer.hook)
            v = torch.where(is_kept[task.class_of], v, v_other)
            r = torch.where(error[task.class_of].unsqueeze(-1), r, r_other)
            return torch.where(m, v @ directions + r, x)

        hooks[layer.hook] = replace
    return score_with(model, task, hooks)


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize(
    ("kind", "ablation"),
    [
        ("HookedTransformer", "mean"),
        ("Hugging Face", "resample"),
        ("bridge", "mean"),
    ],
)
def test_scores_of_circuits_equal_dense_whole_passes(kind, ablation, lens, make_case):
    model, make_sae = make_case(kind)
    sae, task = make_sae(lens), make_task("induction", model.tokenizer, 5)
    streams, nodes = effects_of(
        model, task, sae, ablation, method="attribution_patching"
    )
    n = sum(len(layer.effect) for layer in nodes)
    keep = torch.stack([torch.rand(n) < share for share in (0.2, 0.6, 2.0, 0.0)])
    scores, full = run_circuits(
        as_model(model), sae, task, nodes, keep, batch_size_prompts=2, max_prompts=5
    )
    for found, kept in zip(scores, keep, strict=True):
        expected = run_densely(model, task, sae, streams, nodes, kept, ablation)
        torch.testing.assert_close(found, expected.double())
    assert torch.equal(scores[2], full)
    x = streams.ablated(ablation)[-1].expand_as(streams.clean[-1])
    # After the last layer nothing is left but the ablated stream.
    last = task.class_of == task.class_of[-1]
    assert torch.isin(task.class_of[last], nodes[-1].node_class).all()
    empty = score_with(model, task, {nodes[-1].hook: lambda _: x})
    torch.testing.assert_close(scores[3], empty.double())


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_all_nodes_have_f_1_and_none_0(ablation, make_case, tmp_path):
    model, make_sae = make_case()
    task = make_task("agreement", model.tokenizer, 6)
    shares = [0.02, 0.1, 0.5, 1.0]
    options = {"n_steps": 2, "shares": shares, "n_bootstrap": 20}
    found = circuits(make_sae(), model, task, ablation=ablation, **options)
    f, complement = found.faithfulness(), found.faithfulness(found.complements)
    assert f[-1] == 1
    assert complement[-1] == 0
    assert np.abs(f[:-1] - 1).min() > 1e-6
    table = found.to_dataframe()
    assert table.n_nodes.tolist() == [
        max(1, round(s * len(found.effect))) for s in shares
    ]
    assert (found.effect.abs().diff() <= 0).all()
    assert found.random[-1].allclose(found.full)
    found.save(tmp_path / "circuits")
    assert Circuits.load(tmp_path / "circuits").summary.equals(found.summary)
    draw(found)


@pytest.mark.parametrize("ranking", ["absolute", "signed"])
def test_circuits_of_a_number_of_nodes_have_the_first_by_rank(ranking, make_case):
    """Reference: dense whole passes with the nodes that have these effects."""
    model, make_sae = make_case()
    sae, task = make_sae(), make_task("induction", model.tokenizer, 3)
    method: Any = {"method": "attribution_patching"}
    streams, nodes = effects_of(model, task, sae, "mean", **method)
    effects = torch.cat([layer.effect for layer in nodes])
    counts = [7, 40, 10**6]
    found = circuits(sae, model, task, counts=counts, ranking=ranking, **method)
    assert found.counts == counts[:2]
    gain = effects.abs() if ranking == "absolute" else -effects
    for n, score in zip(found.counts, found.by_count, strict=True):
        keep = gain >= gain.topk(n).values[-1]
        assert int(keep.sum()) == n
        expected = run_densely(model, task, sae, streams, nodes, keep, "mean")
        torch.testing.assert_close(score, expected.double())
    assert found.ranking == ranking
    table = found.counts_table()
    assert table.n_nodes.tolist() == [7, 40]
    assert (table.f_low <= table.f + 1e-9).all()


def test_no_numbers_of_nodes(make_case):
    model, make_sae = make_case()
    task = make_task("agreement", model.tokenizer, 4)
    options: Any = {"method": "attribution_patching", "n_bootstrap": 2}
    found = circuits(make_sae(), model, task, counts=[], **options)
    assert found.counts_table().empty


def test_a_task_that_is_not_done_is_a_warning(make_case, caplog):
    model, make_sae = make_case()
    task = make_task("agreement", model.tokenizer, 4)
    options: Any = {"method": "attribution_patching", "n_bootstrap": 2}
    is_done = []
    for correct, wrong in (
        (task.is_correct, task.is_wrong),
        (task.is_wrong, task.is_correct),
    ):
        prompts = task.clean, task.corrupted, task.positions, task.candidates
        one = type(task)("either", *prompts, correct, wrong)
        caplog.clear()
        found = circuits(make_sae(), model, one, **options).summary
        is_done.append(found.m_full > found.m_empty)
        text = f"m(M) = {found.m_full:.3f} of the task 'either' is below m(empty)"
        assert (text in caplog.text) == (not is_done[-1])
    assert sorted(is_done) == [False, True]


def test_layers_can_be_chosen(make_case):
    model, make_sae = make_case()
    task = make_task("agreement", model.tokenizer, 4)
    options: Any = {"method": "attribution_patching", "n_bootstrap": 2}
    found = circuits(make_sae(), model, task, layers=[2, 0], **options)
    assert found.hook_names == [NAMES[0], NAMES[2]]
    assert found.layer.unique().tolist() == [0, 1]
    # The first position is the same in all prompts, so it has no nodes.
    assert found.position_class.min() == 1


def test_bad_input_of_circuits(make_case):
    model, make_sae = make_case()
    sae, task = make_sae(), make_task("agreement", model.tokenizer, 4)
    call: Any = {"method": "attribution_patching"}
    with pytest.raises(ValueError, match="5 is not a hook"):
        circuits(sae, model, task, layers=[5], **call)
    with pytest.raises(ValueError, match="need a multi-layer SAE"):
        circuits(sae.view(0), model, task, **call)
    with pytest.raises(ValueError, match="grow from above 0 to 1"):
        circuits(sae, model, task, shares=[0.1, 0.5], **call)
    same = make_task("agreement", model.tokenizer, 4)
    object.__setattr__(same, "corrupted", same.clean)
    with pytest.raises(ValueError, match="prompts must differ"):
        circuits(sae, model, same, ablation="resample", **call)
    with torch.no_grad():
        model.unembed.W_U.zero_()
    with pytest.raises(ValueError, match=r"m\(M\) and m\(empty\) must differ"):
        circuits(sae, model, task, **call)
    sae.cfg.metadata.hook_names = ["blocks.0.hook_mlp_out"]
    with pytest.raises(ValueError, match=r"residual stream.*hook_mlp_out"):
        circuits(sae, model, task, **call)
    none = task.clean[:0], task.clean[:0], [], task.candidates
    with pytest.raises(ValueError, match="needs prompts; it has none"):
        type(task)("none", *none, task.is_correct[:0], task.is_wrong[:0])


# Curves


def test_areas_and_sizes_by_hand():
    shares, f = [0.25, 0.5, 1.0], np.array([0.0, 0.5, 1.0])
    found = areas(shares, f)
    assert found["cpr"] == pytest.approx((0.25 * 0.25 + 0.5 * 0.75) / 0.75)
    assert found["cmd"] == pytest.approx((0.25 * 0.75 + 0.5 * 0.25) / 0.75)
    assert found["cpr_log"] == found["cmd_log"] == pytest.approx(0.5)
    assert size_at(shares, f, 0.8) == pytest.approx(0.5 * 2**0.6)
    assert size_at(shares, f + 1) == 0.25
    assert np.isnan(size_at(shares, f / 2))


@pytest.mark.parametrize("wrong", [None, 10, "10", [], [1.0], [True, 2], [0.5, 0.5, 1]])
def test_shares_and_counts_are_lists_that_grow(wrong: Any):
    with pytest.raises(ValueError, match=r"`shares` must be a list .* grow"):
        check_shares(wrong)
    if wrong != []:  # no comparison at equal numbers of nodes
        with pytest.raises(ValueError, match=r"`counts` must be a list .* grow"):
            check_counts(wrong)


@given(st.lists(st.floats(-1, 3), min_size=4, max_size=4))
def test_areas_equal_a_fine_sum_over_the_curve(values):
    shares, f = [0.01, 0.1, 0.3, 1.0], np.array(values)
    found = areas(shares, f)
    for end, axis in (("", np.array(shares)), ("_log", np.log(shares))):
        x = np.linspace(axis[0], axis[-1], 4_001)
        x = (x[1:] + x[:-1]) / 2
        fine = np.interp(x, axis, f).mean(), np.interp(x, axis, np.abs(1 - f)).mean()
        assert found[f"cpr{end}"] == pytest.approx(fine[0], abs=2e-3)
        assert found[f"cmd{end}"] == pytest.approx(fine[1], abs=2e-3)


def test_faithfulness_and_its_samples():
    full, empty = np.array([3.0, 1.0]), np.array([1.0, -1.0])
    scores = np.array([[2.0, 0.0], [3.0, 1.0], [1.0, -1.0]])
    assert faithfulness(scores, full, empty).tolist() == [0.5, 1.0, 0.0]
    samples = resampled_faithfulness(scores, full, empty, 50, 0)
    np.testing.assert_allclose(samples, np.tile([0.5, 1.0, 0.0], (50, 1)))
    with pytest.raises(ValueError, match="must differ; both are 2"):
        faithfulness(scores, full, full)


def made_up() -> Circuits:
    """Nodes of two layers: latent 3 at both, latent 5 at two classes, one error."""
    scores = torch.tensor([[0.4, 0.4], [0.9, 0.9], [1.0, 1.0]], dtype=torch.float64)
    return Circuits(
        task="agreement",
        ablation="mean",
        method="attribution_patching",
        hook_names=NAMES[:2],
        classes=["a", "b"],
        k=1,
        shares=[0.4, 0.8, 1.0],
        counts=[1, 3],
        ranking="absolute",
        n_bootstrap=10,
        layer=torch.tensor([0, 1, 0, 0, 1]),
        position_class=torch.tensor([0, 0, 1, 0, 1]),
        latent=torch.tensor([3, 3, ERROR, 5, 5]),
        effect=torch.tensor([-4.0, 3.0, 2.0, 1.0, 0.0]),
        scores=scores,
        by_count=scores[:2],
        complements=1 - scores,
        random=scores / 2,
        latents_only=torch.tensor([0.3, 0.3]),
        errors_only=torch.tensor([0.2, 0.2]),
        full=torch.ones(2),
    )


def test_what_circuits_are_made_of():
    table, summary = made_up().to_dataframe(), made_up().summary
    assert table.n_nodes.tolist() == [2, 4, 5]
    assert table.error_share.tolist() == pytest.approx([0, 0.2, 0.2])
    assert table.nodes_per_latent.tolist() == [2, 1.5, 2]
    assert table.nodes_per_layer_latent.tolist() == [1, 1, 1]
    assert summary["size"] == pytest.approx(0.4 * 2 ** (0.4 / 0.5))
    assert summary.size_nodes == pytest.approx(5 * 0.4 * 2 ** (0.4 / 0.5))
    assert summary.size_low == summary.size_high == pytest.approx(summary["size"])
    assert summary.nodes_per_latent_at_size == 1.5
    assert summary.f_latents_only == pytest.approx(0.3)
    assert made_up().effects_by_layer().tolist() == [[5, 3], [2, 0]]


def test_labels_are_compared_at_equal_numbers_of_nodes():
    """By hand: of 10, 100 and 1,000 nodes, both SAEs have 10 and 100."""

    def row(label: str, n_nodes: int, f: float, ablation: str = "mean") -> Any:
        keys = {"label": label, "index": 0, "task": "t", "seed": 0}
        return {**keys, "ablation": ablation, "n_nodes": n_nodes, "f": f}

    by_count = [row("a", 10, 0.0), row("a", 100, 0.5), row("a", 1000, 1.0)]
    by_count += [row("b", 10, 0.2), row("b", 100, 0.4), row("a", 10, 0.3, "resample")]
    rows = [row("b", 150, 0), row("a", 2000, 0), row("a", 20, 0, "resample")]
    table = CircuitTable(rows, [], by_count, [])
    assert table.to_dataframe().cpr_nodes.tolist() == pytest.approx(
        [0.3, 0.25, np.nan], nan_ok=True
    )
    counts = table.counts_table()
    of_a = counts[(counts.label == "a") & (counts.ablation == "mean")]
    assert of_a.f.tolist() == [0.0, 0.5, 1.0]
    assert counts.n_saes.tolist() == [1] * 6
    none = CircuitTable(rows, [], [], [])
    assert none.to_dataframe().cpr_nodes.isna().all()
    assert none.counts_table().empty


def test_jaccard_by_hand():
    a = np.array([[0, 0, 3], [1, 0, 3], [0, 1, ERROR]])
    b = np.array([[0, 0, 2], [1, 0, 4], [0, 1, ERROR]])
    assert jaccard(a, a) == 1
    assert jaccard(a, b) == pytest.approx(1 / 5)
    stands_for = np.array([-2, -2, 3, -2, -2])
    assert jaccard(a, b, stands_for) == pytest.approx(2 / 4)
    rows = torch.eye(3)
    assert mutual_nearest(rows, rows[[2, 0]]).tolist() == [2, 0]
    near = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.0]])
    assert mutual_nearest(rows, near).tolist() == [-2, 0]


@pytest.mark.parametrize("n_at_once", [1, 7, 1024])
def test_nearest_latents_are_found_in_blocks(n_at_once):
    """Reference: the whole matrix of cosines."""
    a, b = torch.randn(40, 8, dtype=torch.float64), torch.randn(30, 8).double()
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    expected = [
        int(i) if cosines[i].argmax() == j else -2
        for j, i in enumerate(cosines.argmax(0))
    ]
    assert expected.count(-2) not in (0, 30)
    assert mutual_nearest(a, b, n_at_once).tolist() == expected
    ties = torch.eye(3)[[0, 0]], torch.eye(3)[[1, 0, 0]]  # the first one counts
    assert mutual_nearest(*ties, n_at_once).tolist() == [-2, 0, -2]


@torch.no_grad()
def fvu_of_each_k(sae: Any, x: Tensor) -> dict[int, float]:
    """By the dense decoder and the definition."""
    found: dict[int, float] = {}
    total = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    for k in range(1, sae.cfg.d_sae + 1):
        sae.activation_fn.k = k
        x_hat = torch.stack([sae.decode(sae.encode(one)) for one in x])
        found[k] = float(((x_hat - x).square().sum((1, 2)) / total).mean())
    return found


@pytest.mark.parametrize("is_noisy", [False, True])
def test_k_is_moved_to_the_nearest_fvu(is_noisy, caplog):
    """Reference: every k. With noise the FVU rises again after its minimum."""
    d_in = 64 if is_noisy else 16
    d_sae = 2 * d_in if is_noisy else 16
    metadata = SAEMetadata(hook_names=NAMES[:2])
    settings = {"d_in": d_in, "d_sae": d_sae, "k": 3, "dtype": "float64"}
    sae = random_sae(metadata=metadata, normalize_activations="none", **settings)
    with torch.no_grad():
        sae.b_dec.zero_()
        if not is_noisy:
            sae.W_dec.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
        sae.W_enc.copy_(sae.W_dec.T)
        chosen = torch.rand(2, 300, d_sae, dtype=torch.float64).topk(3).indices
        acts = torch.zeros(2, 300, d_sae, dtype=torch.float64)
        size = 1 + torch.rand(chosen.shape, dtype=torch.float64)
        x = acts.scatter(2, chosen, size) @ sae.W_dec
        x = x + 0.1 * torch.randn_like(x)
    expected = fvu_of_each_k(sae, x)
    best = min(expected, key=expected.__getitem__)
    assert (3 <= best < 8) == (expected[d_sae] > expected[best] + 0.1) == is_noisy
    for k in (1, 3, 7):
        sae.cfg.k = k
        assert mean_fvu(sae, x, NAMES[:2]) == pytest.approx(expected[k])
    for target in (0.9, 0.7, 0.4, 0.0):
        sae.cfg.k = 3
        fvu = match_fvu(sae, x, NAMES[:2], target)
        least = min(abs(expected[k] - target) for k in range(1, best + 1))
        assert abs(fvu - target) == pytest.approx(least)
        assert expected[sae.cfg.k] == pytest.approx(fvu)
        assert sae.cfg.k <= best
        assert ("more than 0.005" in caplog.text) == (abs(fvu - target) > 0.005)
        caplog.clear()


# Graphs

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}


def check_schema(value: Any, schema: dict[str, Any], at: str = "graph") -> None:
    """The keywords of JSON Schema that the graphs' schema uses."""
    kinds = schema.get("type", [*_TYPES])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    assert any(isinstance(value, _TYPES[kind]) for kind in kinds), (at, value)
    for name in schema.get("required", []):
        assert name in value, (at, name)
    for name, part in schema.get("properties", {}).items():
        if name in value:
            check_schema(value[name], part, f"{at}.{name}")
    for i, item in enumerate(value if "items" in schema else []):
        check_schema(item, schema["items"], f"{at}[{i}]")


@pytest.mark.parametrize("lens", [False, True])
def test_graphs_follow_the_schema_and_links_add_up(lens, make_case):
    """Reference for weights: derivatives along the whole stream, by autograd."""
    model, make_sae = make_case()
    sae, task = make_sae(lens), make_task("agreement", model.tokenizer, 3)
    graph = attribution_graph(sae, model, task, prompt=1, n_nodes=10**6)
    check_schema(json.loads(json.dumps(graph)), json.loads(SCHEMA.read_text()))
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    latents = [n for n in nodes.values() if n["feature_type"].startswith("cross")]
    assert len({n["feature"] for n in latents}) < len(
        {(n["feature"], n["layer"]) for n in latents}
    )
    for node in latents:
        layer, latent, at = node["node_id"].split("_")
        assert (node["layer"], node["feature"], node["ctx_idx"]) == (
            layer,
            int(latent),
            int(at),
        )
    ids = task.clean[1:2]
    for node in latents[::40]:
        along = _along_the_stream(sae, model, ids, node)
        weights = [
            e["weight"] for e in graph["links"] if e["target"] == node["node_id"]
        ]
        assert sum(weights) == pytest.approx(along, abs=1e-8)
        assert node["activation"] > 0
        assert node["clerp"] == f"latent {node['feature']}"
    sources = {
        nodes[e["source"]]["layer"]
        for e in graph["links"]
        if nodes[e["target"]]["layer"] == "1"
    }
    assert sources == {"0"}
    few = attribution_graph(sae, model, task, prompt=1, n_nodes=5)
    own = [n for n in few["nodes"] if n["influence"] is not None]
    assert len(own) == 5
    assert max(n["influence"] for n in own) == pytest.approx(1)
    for prompt in (-1, 3):
        message = rf"`prompt` must be in \[0, 3\).*{prompt}"
        with pytest.raises(ValueError, match=message):
            attribution_graph(sae, model, task, prompt=prompt)


def _along_the_stream(sae: Any, model: Any, ids: Tensor, node: dict[str, Any]) -> float:
    """d/ds of a pre-activation if the stream of the layer before is times 1 + s."""
    layer, at = int(node["layer"]), node["ctx_idx"]
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found: dict[str, Tensor] = {}
    before = NAMES[layer - 1] if layer else "blocks.0.hook_resid_pre"

    def read(x: Tensor) -> Tensor:
        found["x"] = x
        return x

    hooks = {before: lambda x: x * (1 + s), NAMES[layer]: read}
    as_model(model).logits_with_hooks(ids, hooks)
    _, pre = sae.encode_with_hidden_pre(found["x"][0, at], NAMES[layer])
    return float(torch.autograd.grad(pre[node["feature"]], s)[0])


# The study


@pytest.fixture
def study(make_case, token_dataset, tmp_path, monkeypatch):
    """Two SAEs of one label and one with a lens, and how to run their study."""
    model, make_sae = make_case(d_vocab=512)
    for name, lens in (("a", False), ("b", False), ("c", True)):
        make_sae(lens).save_model(tmp_path / name)
    token_dataset.to_parquet(tmp_path / "text.parquet")
    monkeypatch.chdir(tmp_path)
    settings = {
        "saes": {"raw": ["a", "b"], "lens": "c"},
        "tasks": ["induction"],
        "ablations": ["mean"],
        "seeds": [0, 1],
        "n_prompts": 3,
        "n_steps": 1,
        "shares": [0.1, 0.5, 1.0],
        "dataset_path": "text.parquet",
        "n_tokens": 64,
        "n_bootstrap": 5,
        "n_graph_nodes": 5,
    }
    return model, settings


def test_the_study_compares_labels_and_resumes(study, tmp_path, monkeypatch):
    model, settings = study
    chosen = CircuitSettings.from_settings(settings)
    folder = tmp_path / "out"
    found = circuits_study(chosen, folder, override_model=model)
    table = found.to_dataframe()
    assert len(table) == 2 * 3
    assert set(table.label) == {"raw", "lens"}
    assert table.k[0] == K
    assert table.fvu_gap.to_numpy() == pytest.approx(table.fvu - table.fvu[0])
    assert table.fvu_gap.abs().max() > 0.01
    assert found.short_table().fvu_gap.notna().all()
    assert len(pd.read_csv(folder / "counts.csv")) == len(found.counts_table()) > 2
    jaccards = found.jaccard_table()
    assert set(jaccards.between) == {"prompts", "SAEs"}
    assert jaccards.jaccard.between(0, 1).all()
    check_schema(
        json.loads((folder / "graphs" / "lens_induction.json").read_text()),
        json.loads(SCHEMA.read_text()),
    )
    assert (folder / "faithfulness.png").exists()
    assert (folder / "faithfulness_by_nodes.png").exists()
    assert (folder / "measures.png").exists()
    means = found.summary()
    own = table[(table.label == "raw") & (table.task == "induction")]
    row = means[(means.label == "raw") & (means.task == "induction")].iloc[0]
    of_saes = own.groupby("index").cpr_log.mean()  # seeds of prompts first
    assert row.n_saes == len(of_saes) == 2
    assert row.cpr_log == pytest.approx(of_saes.mean())
    half = stats.t.ppf(0.975, 1) * of_saes.sem()
    assert row.cpr_log_half == pytest.approx(half)
    saved = pd.read_csv(folder / "summary.csv")
    assert saved.cpr_log_half.to_numpy() == pytest.approx(
        means.cpr_log_half.to_numpy(), nan_ok=True
    )
    assert len(pd.read_csv(folder / "jaccard.csv")) == len(found.jaccard_table())
    found.save(tmp_path / "result")
    assert CircuitTable.load(tmp_path / "result").summary().equals(means)
    # A second call reads everything; one without a point computes only that one.
    calls: list[Any] = []
    original = study_module.circuits
    monkeypatch.setattr(
        study_module, "circuits", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    again = circuits_study(chosen, folder)
    assert again.to_dataframe().equals(table)
    assert not calls
    (folder / "raw-1_induction-1_mean" / "circuits").rename(tmp_path / "moved")
    assert (
        circuits_study(chosen, folder, override_model=model)
        .to_dataframe()
        .equals(table)
    )
    assert len(calls) == 1
    other = CircuitSettings.from_settings({**settings, "n_prompts": 4})
    with pytest.raises(ValueError, match=r"other settings.*\n.*n_prompts"):
        circuits_study(other, folder, override_model=model)


def test_changed_inputs_are_an_error_and_nothing_of_them_is_reused(study, tmp_path):
    model, settings = study
    one = {**settings, "saes": {"raw": "a", "lens": "c"}, "seeds": [0]}
    chosen, folder = CircuitSettings.from_settings(one), tmp_path / "out"
    circuits_study(chosen, folder, override_model=model)
    saes, names = folder / "saes.json", {p.name for p in folder.glob("gradients_*")}
    assert len(names) == 1
    assert len(json.loads(saes.read_text())) == 2
    other = SAE.load_from_disk("c")
    with torch.no_grad():
        other.W_dec[0, 0] += 1e-6
    other.save_model(tmp_path / "c")
    with pytest.raises(ValueError, match=r"lens-0.*\n.*`sae_hash`"):
        circuits_study(chosen, folder, override_model=model)
    shutil.rmtree(folder / "lens-0_induction-0_mean")
    circuits_study(chosen, folder, override_model=model)
    assert len(json.loads(saes.read_text())) == 3
    assert {p.name for p in folder.glob("gradients_*")} == names
    with torch.no_grad():
        model.blocks[1].mlp.W_in[0, 0] += 1
    with pytest.raises(ValueError, match=r"raw-0.*\n.*`weights_hash`"):
        circuits_study(chosen, folder, override_model=model)
    for point in folder.glob("*-0_induction-0_mean"):
        shutil.rmtree(point)
    circuits_study(chosen, folder, override_model=model)
    assert len(json.loads(saes.read_text())) == 5
    assert len([*folder.glob("gradients_*")]) == 2


def test_a_model_that_is_loaded_later_is_compared_too(study, tmp_path, monkeypatch):
    model, settings = study
    one = {**settings, "saes": {"raw": "a"}, "seeds": [0]}
    chosen, folder = CircuitSettings.from_settings(one), tmp_path / "out"
    circuits_study(chosen, folder, override_model=model)
    with torch.no_grad():
        model.blocks[1].mlp.W_in[0, 0] += 1
    monkeypatch.setattr(inputs_module.loading, "load_by_name", lambda *_: model)
    circuits_study(chosen, folder)  # all is done, so the model is not loaded
    (folder / "raw-0_induction-0_mean" / "circuits").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"raw-0.*\n.*`weights_hash`"):
        circuits_study(chosen, folder)


def test_graphs_fail_alone_and_are_made_again(study, tmp_path, monkeypatch, caplog):
    model, settings = study
    one = {**settings, "saes": {"raw": "a"}}
    folder = tmp_path / "out"
    original, calls = study_module.attribution_graph, list[int]()

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(options["n_nodes"])
        if len(calls) == 1:
            raise ValueError("no such graph")
        return original(*args, **options)

    def run(n_nodes: int) -> int:
        chosen = CircuitSettings.from_settings({**one, "n_graph_nodes": n_nodes})
        circuits_study(chosen, folder, override_model=model)
        graph = json.loads((folder / "graphs" / "raw_induction.json").read_text())
        return len([n for n in graph["nodes"] if n["influence"] is not None])

    monkeypatch.setattr(study_module, "attribution_graph", failing)
    with pytest.raises(FileNotFoundError):
        run(5)
    assert "no such graph" in caplog.text
    assert (folder / "raw-0_induction-0_mean" / "circuits").is_dir()
    assert (folder / "summary.csv").exists()
    assert [run(5), run(5), run(8), run(8)] == [5, 5, 8, 8]
    assert calls == [5, 5, 8]
    listed = json.loads((folder / "graphs" / "graph-metadata.json").read_text())
    assert [one["slug"] for one in listed["graphs"]] == ["raw_induction"]


def test_a_study_that_resumes_loads_each_sae_once_to_check_its_folders(
    study, tmp_path, monkeypatch
):
    model, settings = study
    chosen, folder = CircuitSettings.from_settings(settings), tmp_path / "out"

    def started() -> Any:
        inputs = inputs_module.StudyInputs(chosen, folder, model, None)
        return study_module._Study(chosen, folder, inputs)

    new = started()
    for point in new.points:
        new._record(point).write(folder / point.name)
    loads = count_calls(monkeypatch, inputs_module.SAE, "load_from_disk")
    started()
    assert sorted(args[0] for args, _ in loads) == ["a", "b", "c"]


def test_a_hook_that_the_saes_lack_is_an_error_before_a_model_is_loaded(
    study, tmp_path
):
    chosen = CircuitSettings.from_settings({**study[1], "layers": [7]})
    with pytest.raises(ValueError, match="7"):
        circuits_study(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_runs_the_study(study, tmp_path, monkeypatch, capsys):
    model, settings = study
    monkeypatch.setattr(inputs_module.loading, "load_by_name", lambda *_: model)
    small = {"saes": {"raw": "a"}, "seeds": [0], "n_graph_nodes": 0}
    (tmp_path / "study.json").write_text(json.dumps({**settings, **small}))
    cli.main(["study", "circuits", "study.json", "--output", "out"])
    assert "cpr_log" in capsys.readouterr().out


def test_bad_input_of_the_study(study, tokenizer, tmp_path):
    model, settings = study
    for change, message in (
        ({"saes": {}}, "at least one label"),
        ({"tasks": ["ioi"]}, "'greater_than'.*got 'ioi'"),
        ({"ablations": ["zero"]}, "got 'zero'"),
        ({"method": "exact"}, "`method` must be in.*got 'exact'"),
        ({"n_prompts": 1}, "at least 2; got 1"),
        ({"counts": [10, 10]}, r"`counts` must be a list.*\[10, 10\]"),
        ({"counts": [0, 10]}, r"`counts` must be a list.*\[0, 10\]"),
        ({"ranking": "size"}, "`ranking` must be in.*got 'size'"),
        ({"n_steps": 0}, "`n_steps` must be at least 1; got 0"),
        ({"seeds": []}, "`seeds` must not be empty"),
        ({"jaccard_share": 2.0}, r"in \(0, 1\]; got 2.0"),
        ({"saes": {"raw": ["a", "a"]}}, "'raw' must differ"),
        ({"layer": [1]}, "layer"),
    ):
        with pytest.raises(ValueError, match=message):
            run_settings({**settings, **change}, tmp_path / "new")
    model.tokenizer = tokenizer
    with pytest.raises(ValueError, match="needs a tokenizer with single tokens"):
        circuits_study(
            CircuitSettings.from_settings({**settings, "tasks": ["agreement"]}),
            tmp_path / "x",
            override_model=model,
        )
