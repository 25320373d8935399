"""Which hooks feed the SAE: layer numbers, hook names, and models that have them."""

import difflib
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

DEFAULT_HOOK_NAME = "blocks.{layer}.hook_resid_post"
"""The residual stream after a block: the paper's choice."""

# Other `hook_out`s of a bridge (a query, an MLP's inside) and other `layers` (a vision
# tower's) have other widths.
_BLOCK_INPUT = re.compile(r"blocks\.(\d+)\.hook_(?:resid_pre|in)")
_BLOCK_OUTPUT = re.compile(
    r"blocks\.(\d+)\.hook_(?:resid_post|out)"
    r"|(?:model(?:\.language_model|\.decoder)?|gpt_neox|transformer)\.(?:layers|h)\.(\d+)"
)
_OTHER_RESIDUAL_HOOK = re.compile(
    r"blocks\.\d+\.hook_resid_mid|hook_embed|embed\.hook_out"
)
_EMBEDDING_HOOKS = ("hook_embed", "hook_pos_embed", "embed.hook_out")
_ALIASES = (
    (r"^(blocks\.\d+)\.hook_resid_post$", r"\1.hook_out"),
    (r"^(blocks\.\d+)\.hook_resid_pre$", r"\1.hook_in"),
    (r"^hook_embed$", "embed.hook_out"),
)
_HUB_KWARGS = ("revision", "trust_remote_code", "token", "cache_dir")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide which hooks it has."""

    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    n_ctx: int | None
    """Longest context in tokens; None if the model states none."""


def shape_of_model(model: Any) -> ModelShape:
    """Read the sizes of a loaded model of any kind the host can train on.

    Args:
        model: A HookedTransformer, a TransformerBridge or the host's HookedProxyLM
            around a Hugging Face model.

    Raises:
        ValueError: If the model does not say how many layers it has.
    """
    if isinstance(model, HookedProxyLM):
        return _shape_of_hf_config(model.model.config)
    cfg = getattr(model, "cfg", None)
    if cfg is None or getattr(cfg, "n_layers", None) is None:
        raise ValueError(
            "The model must be a HookedTransformer, a TransformerBridge or a Hugging "
            f"Face causal language model loaded by SAELens; got {type(model).__name__}."
            " Wrap a Hugging Face model in sae_lens.load_model.HookedProxyLM(model, "
            "tokenizer), or give its name or folder as `model_name`."
        )
    return ModelShape(cfg.n_layers, cfg.d_model, getattr(cfg, "n_ctx", None))


def shape_of_named_model(
    model_class_name: str, model_name: str, kwargs: dict[str, Any] | None = None
) -> ModelShape | None:
    """Read the sizes of a model from its configuration alone, before it is loaded.

    Args:
        kwargs: What the model will be loaded with; it may change the sizes.

    Returns:
        The shape, or None where the configuration cannot be had (no network, or a class
        that has no small configuration); the loaded model is then asked instead.
    """
    readers = {
        "HookedTransformer": _shape_of_hooked_transformer,
        "TransformerBridge": _shape_of_bridge,
        "AutoModelForCausalLM": _shape_of_hf_model,
    }
    if model_class_name not in readers:
        return None
    try:
        return readers[model_class_name](model_name, kwargs or {})
    except OSError:
        # Neither cached nor reachable: loading the model says so in its own words.
        return None


@contextmanager
def short_unknown_model_error(model_name: str) -> Generator[None, None, None]:
    """TransformerLens' error for an unknown model, with the nearest names of hundreds.

    Raises:
        ValueError: If the model is unknown.
    """
    from transformer_lens.loading_from_pretrained import (
        OFFICIAL_MODEL_NAMES,  # pyright: ignore[reportPrivateImportUsage]  (of 2.x, too)
    )

    try:
        yield
    except ValueError as error:
        if "Valid official model names" not in str(error):
            raise
        near = difflib.get_close_matches(model_name, OFFICIAL_MODEL_NAMES, 5, 0.3)
        raise ValueError(
            f"TransformerLens knows no model {model_name!r}"
            + f" (the nearest are {near})" * bool(near)
            + "; for a Hugging Face folder, model_class_name must be TransformerBridge."
        ) from error


def _shape_of_hooked_transformer(name: str, kwargs: dict[str, Any]) -> ModelShape:
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    given = _only(kwargs, *_HUB_KWARGS, "n_ctx", "first_n_layers")
    with short_unknown_model_error(name):
        cfg = get_pretrained_model_config(name, **given)
    return ModelShape(cfg.n_layers, cfg.d_model, cfg.n_ctx)


def _shape_of_bridge(name: str, kwargs: dict[str, Any]) -> ModelShape:
    overrides = kwargs.get("hf_config_overrides") or {}
    given = _only(kwargs, *_HUB_KWARGS) | overrides
    shape = _shape_of_hf_config(AutoConfig.from_pretrained(name, **given))
    n_ctx = kwargs.get("n_ctx")
    return shape if n_ctx is None else replace(shape, n_ctx=n_ctx)


def _shape_of_hf_model(name: str, kwargs: dict[str, Any]) -> ModelShape:
    return _shape_of_hf_config(_hf_config(name, kwargs))


def _hf_config(model_name: str, kwargs: dict[str, Any]) -> Any:
    # As `from_pretrained` of the model: arguments that name a setting change it.
    return AutoConfig.from_pretrained(model_name, **kwargs)


def _only(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}


def _shape_of_hf_config(config: Any) -> ModelShape:
    text = config.get_text_config()
    return ModelShape(
        text.num_hidden_layers,
        text.hidden_size,
        getattr(text, "max_position_embeddings", None),
    )


def resolve_hook_names(
    hook_name: str,
    hook_names: Sequence[str] | None,
    layers: Sequence[int] | None,
    n_layers: int,
    model_name: str = "the model",
) -> list[str]:
    """Name the hooks that feed the SAE, in the order of the layer axis.

    Args:
        hook_name: A template with `{layer}`, or one hook name for a single hook.
        hook_names: Explicit names; they replace `hook_name` and `layers`.
        layers: Block numbers from 0; None for every block.
        n_layers: Number of blocks of the model.
        model_name: For messages.

    Raises:
        ValueError: If a layer is repeated or not in the model, or a template without
            `{layer}` would name the same hook for several layers.

    Example:
        >>> resolve_hook_names("blocks.{layer}.hook_resid_post", None, [0, 3], 6)
        ['blocks.0.hook_resid_post', 'blocks.3.hook_resid_post']
    """
    check_hook_choice(hook_name, hook_names, layers)
    if hook_names is not None:
        return list(hook_names)
    if "{layer}" not in hook_name and (layers is None or len(layers) == 1):
        return [hook_name]
    chosen = list(range(n_layers)) if layers is None else list(layers)
    if any(not 0 <= layer < n_layers for layer in chosen):
        raise ValueError(
            f"`layers` must be distinct and in [0, {n_layers}) for {model_name!r}; "
            f"got {chosen}. Use `layers=None` for all layers."
        )
    return [hook_name.replace("{layer}", str(layer)) for layer in chosen]


def check_hook_choice(
    hook_name: str, hook_names: Sequence[str] | None, layers: Sequence[int] | None
) -> None:
    """Check what can be known about a choice of hooks without a model.

    Raises:
        ValueError: As `resolve_hook_names`, for what does not depend on the model.
    """
    if type(hook_names) is str or type(layers) in (int, str):
        raise ValueError(
            "`hook_names` must be a list of names and `layers` a list of block numbers;"
            f" got {hook_names!r} and {layers!r}."
        )
    if hook_names is not None:
        if layers is not None:
            raise ValueError(
                "Give either `hook_names` or `layers`, not both; got "
                f"hook_names={list(hook_names)} and layers={list(layers)}."
            )
        if not hook_names or len(set(hook_names)) != len(hook_names):
            raise ValueError(
                "`hook_names` must hold at least one name, each once; got "
                f"{list(hook_names)}."
            )
        return
    if layers is None:
        return
    plain = all(type(layer) is int and layer >= 0 for layer in layers)
    if not plain or not len(layers) or len(set(layers)) != len(layers):
        raise ValueError(
            "`layers` must hold at least one block number, each once and from 0; got "
            f"{list(layers)}. Use `layers=None` for all layers."
        )
    if len(layers) > 1 and "{layer}" not in hook_name:
        raise ValueError(
            "`hook_name` must contain '{layer}' to name a hook for each of several "
            f"layers, as in {DEFAULT_HOOK_NAME!r}; got {hook_name!r}."
        )
    named = extract_layer_from_tlens_hook_name(hook_name)
    if "{layer}" not in hook_name and named not in (None, layers[0]):
        raise ValueError(
            f"`layers` and `hook_name` must mean the same block; got {list(layers)} "
            f"and {hook_name!r}. Put '{{layer}}' in `hook_name` or leave out `layers`."
        )


def layer_labels(hook_names: Sequence[str]) -> list[str]:
    """Name each hook for logs and tables: `layer_3`, or the hook where that is unclear.

    Example:
        >>> layer_labels(["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"])
        ['layer_0', 'layer_3']
        >>> layer_labels(["hook_embed", "blocks.0.hook_resid_post"])
        ['hook_embed', 'blocks.0.hook_resid_post']
    """
    layers = [extract_layer_from_tlens_hook_name(name) for name in hook_names]
    if None in layers or len(set(layers)) != len(layers):
        return list(hook_names)
    return [f"layer_{layer}" for layer in layers]


def find_hook(hook_names: Sequence[str], layer_or_hook_name: int | str) -> int:
    """Position on the layer axis of a hook given by its name or its block number.

    Raises:
        ValueError: If no hook, or more than one, is meant; lists the known ones.
    """
    if isinstance(layer_or_hook_name, str):
        matches = [i for i, h in enumerate(hook_names) if h == layer_or_hook_name]
    else:
        matches = [
            i
            for i, h in enumerate(hook_names)
            if extract_layer_from_tlens_hook_name(h) == layer_or_hook_name
        ]
    if len(matches) == 1:
        return matches[0]
    problem = "is not a hook" if not matches else "names several hooks"
    raise ValueError(
        f"{layer_or_hook_name!r} {problem} of this SAE; its hooks are "
        f"{list(hook_names)}. Give one of these names or its block number."
    )


def block_end(hook_name: str) -> tuple[int, bool] | None:
    """The block whose input or output a hook is, and whether it is the output.

    None for hooks that are not at the residual stream between blocks. The module of a
    block of a Hugging Face model is its output.

    Example:
        >>> block_end("blocks.2.hook_resid_pre")
        (2, False)
        >>> block_end("model.layers.2")
        (2, True)
        >>> block_end("blocks.2.hook_resid_mid") is None
        True
    """
    for pattern, is_output in ((_BLOCK_INPUT, False), (_BLOCK_OUTPUT, True)):
        match = pattern.fullmatch(hook_name)
        if match is not None:
            return int(next(filter(None, match.groups()))), is_output
    return None


def stop_at_layer(hook_names: Sequence[str]) -> int | None:
    """First block that need not run for these hooks; None if the whole model must.

    Example:
        >>> stop_at_layer(["blocks.2.hook_resid_post", "blocks.0.hook_resid_post"])
        3
        >>> stop_at_layer(["hook_embed", "blocks.1.hook_resid_pre"])
        2
    """
    stops: list[int] = []
    for name in hook_names:
        layer = extract_layer_from_tlens_hook_name(name)
        if layer is None and name not in _EMBEDDING_HOOKS:
            return None
        stops.append(0 if layer is None else layer + 1)
    return max(stops)


def model_hook_names(model: Any, hook_names: Sequence[str]) -> list[str]:
    """The model's own names of these hooks.

    SAETransformerBridge knows `blocks.{layer}.hook_out` but not its alias
    `blocks.{layer}.hook_resid_post`, which it ignores without a word; likewise
    `hook_in` for `hook_resid_pre` and `embed.hook_out` for `hook_embed`.

    Raises:
        ValueError: If the model lacks a hook; lists the nearest that it has.
    """
    known = set(model.hook_dict)
    return [_model_hook_name(known, name) for name in hook_names]


def _model_hook_name(known: set[str], name: str) -> str:
    aliases = (re.sub(pattern, alias, name) for pattern, alias in _ALIASES)
    for candidate in (name, *aliases):
        if candidate in known:
            return candidate
    raise missing_hook(name, known)


def missing_hook(name: str, known: Iterable[str]) -> ValueError:
    """The error for a hook that the model does not have, naming the nearest ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    if not near:
        # The first of each kind of repeated part, such as "gpt_neox.layers.0".
        near = [hook for hook in known if hook.endswith(".0")] or known[:5]
    return ValueError(f"The model has no hook {name!r}. The nearest are {near}.")


def check_hf_hook_names(
    model_name: str, hook_names: Sequence[str], kwargs: dict[str, Any]
) -> None:
    """Check that a Hugging Face model has these submodules, before it is loaded.

    The model is laid out without memory for its weights.

    Raises:
        ValueError: If a submodule is missing; lists the nearest ones.
    """
    try:
        config = _hf_config(model_name, kwargs)
    except OSError:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, **_only(kwargs, "trust_remote_code")
        )
    known = {name for name, _ in model.named_modules() if name}
    for name in hook_names:
        if name not in known:
            raise missing_hook(name, known)


def check_context_size(context_size: int, shape: ModelShape, model_name: str) -> None:
    """Raise ValueError if a context is longer than the model's."""
    if shape.n_ctx is not None and context_size > shape.n_ctx:
        raise ValueError(
            f"`context_size` must be at most {shape.n_ctx} tokens, the context of "
            f"{model_name!r}; got {context_size}."
        )


def device_of_model(model: Any) -> torch.device:
    """Where a model of any kind takes its tokens."""
    return next(model.parameters()).device


def check_token_ids(model: Any, tokens: Tensor) -> None:
    """Raise ValueError if a token is not in the model's vocabulary.

    A negative id, such as padding of -1, would be taken from the end of the embedding.
    """
    d_vocab = _vocabulary_size(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (d_vocab is not None and high >= d_vocab):
        top = "d_vocab" if d_vocab is None else d_vocab
        raise ValueError(
            f"Token ids must be in [0, {top}), the model's vocabulary; got ids from "
            f"{low} to {high}. Use the model's own tokenizer, without padding."
        )


def _vocabulary_size(model: Any) -> int | None:
    """Number of token ids; None if the model does not say."""
    if isinstance(model, HookedProxyLM):
        config: Any = model.model.config
        size = getattr(config.get_text_config(), "vocab_size", None)
    else:
        size = getattr(model.cfg, "d_vocab", None)
    # TransformerLens' config has -1 where nothing is known.
    return size if size is not None and size > 0 else None


def check_width(hook_names: Sequence[str], d_in: int, shape: ModelShape) -> None:
    """Raise ValueError if residual-stream hooks do not have the width `d_in`.

    Hooks of other kinds are measured when the model runs (`check_widths`).
    """
    residual = [name for name in hook_names if _is_residual(name)]
    if residual and d_in != shape.d_model:
        raise ValueError(
            f"`d_in` must be {shape.d_model}, the width of the model at "
            f"{residual[0]!r}; got {d_in}."
        )


def _is_residual(hook_name: str) -> bool:
    return (
        block_end(hook_name) is not None
        or _OTHER_RESIDUAL_HOOK.fullmatch(hook_name) is not None
    )


def check_widths(widths: dict[str, int], d_in: int) -> None:
    """Raise ValueError unless all hooks have the width `d_in`.

    Args:
        widths: Measured width of each hook.
    """
    if len(set(widths.values())) > 1:
        raise ValueError(
            "All hooks of one SAE must have the same width; got "
            + ", ".join(f"{name}: {width}" for name, width in widths.items())
            + ". Choose hooks of one kind."
        )
    name, width = next(iter(widths.items()))
    if width != d_in:
        raise ValueError(
            f"`d_in` must be {width}, the width of the model at {name!r}; got {d_in}."
        )
