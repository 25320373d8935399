"""Reference: the list of bad input in issue 2."""

import re

import pytest

from sae_lens_multilayer.hooks import (
    DEFAULT_HOOK_NAME,
    check_hook_choice,
    find_hook,
    layer_labels,
    resolve_hook_names,
    stop_at_layer,
)

POST = [f"blocks.{layer}.hook_resid_post" for layer in range(5)]


# Choice of hooks


def test_default_is_the_output_of_every_block_in_order():
    assert resolve_hook_names(DEFAULT_HOOK_NAME, None, None, 5) == POST


def test_layers_keep_the_order_they_were_given_in():
    names = resolve_hook_names("model.layers.{layer}", None, [3, 0], 5)
    assert names == ["model.layers.3", "model.layers.0"]


def test_any_sequence_of_layers_is_taken():
    assert resolve_hook_names(DEFAULT_HOOK_NAME, None, range(5), 5) == POST
    assert resolve_hook_names(DEFAULT_HOOK_NAME, None, (4,), 5) == POST[4:]


def test_explicit_names_replace_the_template():
    names = ["hook_embed", "blocks.1.hook_resid_pre"]
    assert resolve_hook_names(DEFAULT_HOOK_NAME, names, None, 5) == names


def test_a_name_without_template_is_one_hook():
    assert resolve_hook_names("hook_embed", None, None, 5) == ["hook_embed"]
    assert resolve_hook_names("hook_embed", None, [0], 5) == ["hook_embed"]
    assert resolve_hook_names(POST[3], None, [3], 5) == [POST[3]]


@pytest.mark.parametrize("layers", [[5], [0, 7], [-1]])
def test_a_layer_out_of_range_is_an_error(layers):
    message = f"must be distinct and in [0, 5) for 'tiny'; got {layers}. Use `layers=N"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_hook_names(DEFAULT_HOOK_NAME, None, layers, 5, "tiny")


@pytest.mark.parametrize("layers", [[0, 0], [1, 2, 1], []])
def test_repeated_or_no_layers_are_an_error_without_a_model(layers):
    message = f"`layers` must hold at least one entry, each once; got {layers}."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_hook_choice(DEFAULT_HOOK_NAME, None, layers)


def test_several_layers_need_a_template():
    message = (
        r"`hook_name` must contain '\{layer\}'.*as in 'blocks\.\{layer\}\.hook_resid_"
        r"post'; got 'blocks\.0\.hook_resid_post'"
    )
    with pytest.raises(ValueError, match=message):
        check_hook_choice(POST[0], None, [0, 1])


def test_a_layer_that_is_not_the_one_in_the_hook_name_is_an_error():
    with pytest.raises(ValueError, match=r"must contain .*\[3\].*ks\.0"):
        check_hook_choice(POST[0], None, [3])


def test_names_and_layers_together_are_an_error():
    with pytest.raises(ValueError, match="either `hook_names` or `layers`, not both"):
        check_hook_choice(DEFAULT_HOOK_NAME, POST, [0])


@pytest.mark.parametrize("names", [[], [POST[0], POST[1], POST[0]]])
def test_repeated_or_no_names_are_an_error(names):
    message = f"`hook_names` must hold at least one entry, each once; got {names}"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_hook_choice(DEFAULT_HOOK_NAME, names, None)


# Labels and positions


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([POST[0], POST[3]], ["layer_0", "layer_3"]),
        (["blocks.10.hook_resid_pre"], ["layer_10"]),
        (["model.layers.2", "model.layers.1"], ["layer_2", "layer_1"]),
        (["transformer.h.7"], ["layer_7"]),
        (["hook_embed"], ["hook_embed"]),
        (["hook_embed", POST[0]], ["hook_embed", POST[0]]),
        (["blocks.0.hook_resid_pre", POST[0]], ["blocks.0.hook_resid_pre", POST[0]]),
    ],
)
def test_labels_are_layers_where_these_are_clear_and_else_names(names, labels):
    assert layer_labels(names) == labels


def test_a_hook_is_found_by_name_or_by_block_number():
    names = [POST[4], POST[0], "hook_embed"]
    assert find_hook(names, 4) == 0
    assert find_hook(names, 0) == 1
    assert find_hook(names, "hook_embed") == 2


@pytest.mark.parametrize("wanted", [7, -1, 1, "blocks.7.hook_resid_post", "0"])
def test_an_unknown_hook_is_an_error_that_lists_the_known(wanted):
    names = [POST[0], POST[3]]
    message = f"{wanted!r} is not a hook of this SAE; its hooks are {names}"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_hook(names, wanted)


def test_a_block_with_two_hooks_is_ambiguous_but_its_names_are_not():
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    with pytest.raises(ValueError, match=r"1 names several hooks.*one of these names"):
        find_hook(names, 1)
    assert find_hook(names, names[1]) == 1


# How far the model must run


@pytest.mark.parametrize(
    ("names", "stop"),
    [
        ([POST[2], POST[0]], 3),
        (["blocks.0.hook_resid_pre"], 1),
        (["blocks.11.attn.hook_z", POST[2]], 12),
        (["hook_embed"], 0),
        (["hook_embed", "hook_pos_embed"], 0),
        (["embed.hook_out", "blocks.1.hook_out"], 2),
        (["model.layers.3", "model.layers.1"], 4),
        ([POST[0], "ln_final.hook_normalized"], None),
        (["model.embed_tokens"], None),
    ],
)
def test_the_model_stops_after_the_last_hook(names, stop):
    assert stop_at_layer(names) == stop
