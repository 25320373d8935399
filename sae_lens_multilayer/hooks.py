"""Hook names of layers, and layers of hook names."""

import difflib
import re
from collections.abc import Iterable, Sequence

from sae_lens.util import extract_layer_from_tlens_hook_name

DEFAULT_HOOK_NAME = "blocks.{layer}.hook_resid_post"
"""The residual stream after a block: the paper's choice."""

# Other hooks of a bridge named `hook_out` (a query, inside an MLP) and other `layers`
# (of a vision tower) have other widths.
_BLOCK_INPUT = re.compile(r"blocks\.(\d+)\.hook_(?:resid_pre|in)")
_BLOCK_OUTPUT = re.compile(
    r"blocks\.(\d+)\.hook_(?:resid_post|out)"
    r"|(?:model(?:\.language_model|\.decoder)?|gpt_neox|transformer)\.(?:layers|h)\.(\d+)"
)
_OTHER_RESIDUAL = re.compile(r"blocks\.\d+\.hook_resid_mid|hook_embed|embed\.hook_out")
_ALIASES = (
    (r"^(blocks\.\d+)\.hook_resid_post$", r"\1.hook_out"),
    (r"^(blocks\.\d+)\.hook_resid_pre$", r"\1.hook_in"),
    (r"^hook_embed$", "embed.hook_out"),
)
_EMBEDDING_HOOKS = ("hook_embed", "hook_pos_embed", "embed.hook_out")


def resolve_hook_names(
    hook_name: str,
    hook_names: Sequence[str] | None,
    layers: Sequence[int] | None,
    n_layers: int,
    model_name: str = "the model",
) -> list[str]:
    """Name the hooks that feed the SAE, in the order of the layer axis.

    The settings are those of `MultiLayerConfig`; `check_hook_choice` checks them.

    Example:
        >>> resolve_hook_names("blocks.{layer}.hook_resid_post", None, [0, 3], 6)
        ['blocks.0.hook_resid_post', 'blocks.3.hook_resid_post']
    """
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
    """Raise ValueError for a choice of hooks that is wrong for every model."""
    if hook_names is not None and layers is not None:
        raise ValueError(
            "Give either `hook_names` or `layers`, not both; got "
            f"{list(hook_names)} and {list(layers)}."
        )
    chosen = layers if hook_names is None else hook_names
    if chosen is None:
        return
    if isinstance(chosen, (int, str)) or not 0 < len(set(chosen)) == len(chosen):
        name = "layers" if hook_names is None else "hook_names"
        raise ValueError(
            f"`{name}` must hold at least one entry, each once; got {chosen!r}. Use "
            "`layers=None` for all layers."
        )
    if layers is None or "{layer}" in hook_name:
        return
    named = extract_layer_from_tlens_hook_name(hook_name)
    if len(layers) > 1 or named not in (None, layers[0]):
        raise ValueError(
            "`hook_name` must contain '{layer}' to name the hooks of `layers` = "
            f"{list(layers)}, as in {DEFAULT_HOOK_NAME!r}; got {hook_name!r}."
        )


def unknown_name(problem: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest of the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=5, cutoff=0.5) or known[:5]
    return ValueError(f"{problem} {name!r}. Known: {near}.")


def layer_labels(hook_names: Sequence[str]) -> list[str]:
    """Name each hook for logs and tables: `layer_3`, or the hook where that is unclear.

    Example:
        >>> layer_labels(["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"])
        ['layer_0', 'layer_3']
    """
    layers = [extract_layer_from_tlens_hook_name(name) for name in hook_names]
    if None in layers or len(set(layers)) != len(layers):
        return list(hook_names)
    return [f"layer_{layer}" for layer in layers]


def find_hook(hook_names: Sequence[str], layer_or_hook_name: int | str) -> int:
    """Index on the layer axis of a hook given by its name or its block number."""
    by_name = isinstance(layer_or_hook_name, str)
    matches = [
        i
        for i, name in enumerate(hook_names)
        if layer_or_hook_name
        == (name if by_name else extract_layer_from_tlens_hook_name(name))
    ]
    if len(matches) != 1:
        problem = "names several hooks" if matches else "is not a hook"
        raise ValueError(
            f"{layer_or_hook_name!r} {problem} of this SAE; its hooks are "
            f"{list(hook_names)}. Give one of these names or its block number."
        )
    return matches[0]


def block_end(hook_name: str) -> tuple[int, bool] | None:
    """The block whose input or output a hook is, and whether it is the output.

    None for other hooks. A block's module in a Hugging Face model is its output.

    Example:
        >>> block_end("blocks.2.hook_resid_pre"), block_end("model.layers.2")
        ((2, False), (2, True))
    """
    for pattern, is_output in ((_BLOCK_INPUT, False), (_BLOCK_OUTPUT, True)):
        match = pattern.fullmatch(hook_name)
        if match is not None:
            return int(next(filter(None, match.groups()))), is_output
    return None


def stop_at_layer(hook_names: Sequence[str]) -> int | None:
    """First block that need not run for these hooks; None if the whole model must."""
    stops: list[int] = []
    for name in hook_names:
        layer = extract_layer_from_tlens_hook_name(name)
        if layer is None and name not in _EMBEDDING_HOOKS:
            return None
        stops.append(0 if layer is None else layer + 1)
    return max(stops)


def is_residual(hook_name: str) -> bool:
    """Whether a hook is at the residual stream."""
    return bool(block_end(hook_name) or _OTHER_RESIDUAL.fullmatch(hook_name))


def own_hook_name(known: set[str], name: str) -> str:
    """The name under which a model lists a hook, which may be an alias of it."""
    aliases = (re.sub(pattern, alias, name) for pattern, alias in _ALIASES)
    for candidate in (name, *aliases):
        if candidate in known:
            return candidate
    raise missing_hook(name, known)


def missing_hook(name: str, known: Iterable[str]) -> ValueError:
    """The error for a hook that the model does not have, with the nearest ones."""
    return unknown_name("The model has no hook", name, known)
