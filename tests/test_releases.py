"""The list of published checkpoints, as SAELens' directory and as a table."""

import copy

import pytest
from sae_lens.evals import get_saes_from_regex
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import sae_lens_multilayer
from sae_lens_multilayer import hooks
from sae_lens_multilayer._registration import register
from sae_lens_multilayer.published.releases import (
    PublishedName,
    multi_layer_ids,
    published_names,
)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "mlsae-pythia-70m-deduped-x64-k32",
            ("mlsae", "pythia-70m-deduped", "x64-k32", 64, 32, False, False, None),
        ),
        (
            "mlsae-gpt2-x64-k32-lens-tfm",
            ("mlsae", "gpt2", "x64-k32-lens-tfm", 64, 32, True, True, None),
        ),
        (
            "sae-Llama-3.2-3B-x8-k16-tfm-layers-11",
            ("sae", "Llama-3.2-3B", "x8-k16-tfm-layers-11", 8, 16, False, True, 11),
        ),
    ],
)
def test_a_published_name_is_parsed(name, parts):
    parsed = PublishedName.parse(name)

    assert parsed is not None
    assert parsed == PublishedName(*parts)
    assert parsed.repository == f"tim-lawson/{name}"


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "mlsae-x64-k32",
        "mlsae-gpt2-x64",
        "sae-gpt2-x64-k32-control",
        "snapshots",
    ],
)
def test_other_names_are_not_published_ones(name):
    assert PublishedName.parse(name) is None


def test_the_table_has_a_row_for_each_repository():
    table = sae_lens_multilayer.releases()

    assert table.repository.is_unique
    assert {"mlsae-pythia-70m-deduped", "sae-pythia-410m-deduped"} < set(table.release)
    row = table.set_index("repository").loc[
        "tim-lawson/sae-pythia-160m-deduped-x64-k32-tfm-layers-11"
    ]
    assert row.to_dict() == {
        "release": "sae-pythia-160m-deduped",
        "sae_id": "x64-k32-tfm-layers-11",
        "model": "EleutherAI/pythia-160m-deduped",
        "n_layers": 12,
        "layer": 11,
        "d_in": 768,
        "d_sae": 64 * 768,
        "k": 32,
        "lens": False,
        "transformer": True,
    }


def test_every_single_layer_sae_is_of_a_block_of_its_model():
    table = sae_lens_multilayer.releases()
    single = table[table.layer.notna()]

    assert (single.layer < single.n_layers).all()
    per_variant = single.groupby(["release", "lens", "transformer"])
    assert (per_variant.size() == per_variant.n_layers.first()).all()


@pytest.mark.parametrize("by_repository", [False, True])
def test_saelens_directory_lists_every_id(by_repository):
    directory = get_pretrained_saes_directory()

    for name in published_names():
        release = name.repository if by_repository else name.release
        lookup = directory[release]
        assert lookup.conversion_func == "mlsae"
        assert lookup.expected_l0[name.variant] == name.k
        assert set(lookup.expected_var_explained) == set(lookup.saes_map)
        path = f"{lookup.repo_id}/{lookup.saes_map[name.variant]}".strip("/")
        assert path == name.repository


def test_saelens_evaluations_find_hooks_by_regular_expressions():
    found = get_saes_from_regex("mlsae-.*70m.*", r"x64-k32/blocks\.[24].*")

    assert [sae[:2] for sae in found] == [
        ("mlsae-pythia-70m-deduped", f"x64-k32/blocks.{layer}.hook_resid_post")
        for layer in (2, 4)
    ]


def test_ids_of_several_hooks_differ_from_those_of_one():
    wholes = multi_layer_ids()

    assert ("mlsae-gpt2", "x64-k32") in wholes
    assert ("tim-lawson/mlsae-gpt2-x64-k32", "x64-k32") in wholes
    assert not any("/" in sae_id or "layers" in sae_id for _, sae_id in wholes)


def test_registering_again_keeps_a_release_that_saelens_lists_itself(monkeypatch):
    directory = get_pretrained_saes_directory()
    theirs = copy.copy(directory["gpt2-small-res-jb"])
    monkeypatch.setitem(directory, "mlsae-gpt2", theirs)
    n_releases = len(directory)

    register()

    assert directory["mlsae-gpt2"] is theirs
    assert len(directory) == n_releases


def test_hooks_are_the_output_of_every_block():
    lookup = get_pretrained_saes_directory()["mlsae-gpt2"]
    names = [hooks.DEFAULT_HOOK_NAME.replace("{layer}", str(i)) for i in range(12)]

    assert [i for i in lookup.saes_map if i.startswith("x64-k32/")] == [
        f"x64-k32/{name}" for name in names
    ]
