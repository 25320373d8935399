"""Models by name: their shape before they are loaded, and loading them."""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import sae_lens.load_model
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sae_lens_multilayer.hooks import missing_hook, unknown_name
from sae_lens_multilayer.models.decoder import check_decoder_only
from sae_lens_multilayer.models.model import ModelShape

logger = logging.getLogger(__name__)

_HUB_KWARGS = ("revision", "trust_remote_code", "token", "cache_dir")


def usable_class(
    model_class_name: str, model_name: str, hook_names: Sequence[str] | None
) -> str:
    """The class by which a model can be loaded.

    A HookedTransformer, the default, cannot be loaded from a folder. Instead of it, a
    TransformerBridge is loaded, which has the same hook names, or a Hugging Face model
    if the hooks are named by its modules.
    """
    if model_class_name != "HookedTransformer" or not _is_folder(model_name):
        return model_class_name
    is_bridge = all("hook_" in name for name in hook_names or ())
    usable = "TransformerBridge" if is_bridge else "AutoModelForCausalLM"
    logger.info("%s is a folder, so it is loaded as a %s.", model_name, usable)
    return usable


def _is_folder(model_name: str) -> bool:
    return (Path(model_name) / "config.json").is_file()


def check_device(name: str, device: str) -> None:
    """Raise ValueError if the device, the setting `name`, cannot be used."""
    try:
        torch.zeros(1).to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} {device} cannot be used here: {reason}") from error


def load_by_name(
    model_class_name: str,
    model_name: str,
    kwargs: dict[str, Any] | None,
    device: str | None,
    hook_names: Sequence[str] | None = None,
) -> Any:
    """Load a model of one of SAELens' classes, or a TransformerBridge.

    Args:
        hook_names: The hooks to install on a Hugging Face model; None: all modules.
    """
    kwargs = kwargs or {}
    if device is not None:
        check_device("`device`", device)
    with _short_error(model_name):
        if model_class_name == "TransformerBridge":
            from transformer_lens.model_bridge import TransformerBridge

            return TransformerBridge.boot_transformers(
                model_name, device=device, **kwargs
            )
        return sae_lens.load_model.load_model(
            model_class_name,
            model_name,
            device=device,
            model_from_pretrained_kwargs=kwargs,
            hook_names=None if hook_names is None else list(hook_names),
        )


def shape_by_name(
    model_class_name: str, model_name: str, kwargs: dict[str, Any] | None = None
) -> ModelShape | None:
    """Read the shape of a model from its configuration, before it is loaded.

    None if it cannot be read: no network, or a class without a small configuration.
    """
    kwargs = kwargs or {}
    hub_kwargs = _only(kwargs, *_HUB_KWARGS)
    try:
        if model_class_name == "HookedTransformer" and not _is_folder(model_name):
            given = hub_kwargs | _only(kwargs, "n_ctx", "first_n_layers")
            return _shape_of_hooked_transformer(model_name, given)
        # A folder is loaded as one of the others: see `usable_class`.
        if model_class_name in ("TransformerBridge", "HookedTransformer"):
            given = hub_kwargs | (kwargs.get("hf_config_overrides") or {})
            config = AutoConfig.from_pretrained(model_name, **given)
            check_decoder_only(config)
            shape = ModelShape.of_hf_config(config)
            return replace(shape, n_ctx=kwargs.get("n_ctx") or shape.n_ctx)
        if model_class_name == "AutoModelForCausalLM":
            # As in `from_pretrained`, arguments that name a setting change it.
            config = AutoConfig.from_pretrained(model_name, **kwargs)
            return ModelShape.of_hf_config(config)
    except OSError:
        # Neither cached nor reachable: loading the model raises a clearer error.
        return None
    return None


def _shape_of_hooked_transformer(name: str, kwargs: dict[str, Any]) -> ModelShape:
    try:
        from transformer_lens.loading_from_pretrained import get_pretrained_model_config
    except ImportError as error:
        raise ValueError(
            f"`model_class_name` must be 'TransformerBridge' or 'AutoModelForCausalLM' "
            f"for {name!r}: this version of TransformerLens has no HookedTransformer."
        ) from error
    with _short_error(name):
        return ModelShape.of_config(get_pretrained_model_config(name, **kwargs))


def _only(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}


@contextmanager
def _short_error(model_name: str) -> Generator[None]:
    """Name the model in errors, without the hosts' lists of hundreds of others."""
    try:
        yield
    except OSError as error:
        if model_name in str(error):
            raise
        raise OSError(
            f"`model_name` must be a folder of a model, or a name that is cached or on "
            f"a hub that can be reached; got {model_name!r}. {error}"
        ) from error
    except ValueError as error:
        first_line = str(error).split("\n")[0]
        if first_line.startswith("Unrecognized configuration class"):
            raise ValueError(
                f"`model_name` must be a causal language model such as GPT-2 or Llama; "
                f"{model_name!r} is none: {first_line}"
            ) from error
        if "Valid official model names" not in str(error):
            raise
        from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

        problem = (
            "Give a folder of the model as `model_name`, or a name that "
            "TransformerLens lists; TransformerLens has no model"
        )
        raise unknown_name(problem, model_name, OFFICIAL_MODEL_NAMES) from error


def check_modules(
    model_class_name: str,
    model_name: str,
    kwargs: dict[str, Any],
    hook_names: Sequence[str],
) -> None:
    """Raise ValueError if a Hugging Face model lacks a module; loads no weights."""
    if model_class_name != "AutoModelForCausalLM":
        return
    config = AutoConfig.from_pretrained(model_name, **kwargs)
    with torch.device("meta"), _short_error(model_name):
        model = AutoModelForCausalLM.from_config(
            config, **_only(kwargs, "trust_remote_code")
        )
    known = {name for name, _ in model.named_modules() if name}
    for name in hook_names:
        if name not in known:
            raise missing_hook(name, known)
