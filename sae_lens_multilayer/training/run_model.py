"""The model of a run: how it is loaded, and what can be checked before."""

from typing import Any

from sae_lens.load_model import load_model

from sae_lens_multilayer import hooks
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.lens.lens import LayerLens


def check_named_model(cfg: MultiLayerConfig[Any], lens: LayerLens | None) -> None:
    """Check that a run fits the model it names, by the model's configuration alone.

    Nothing is checked where that cannot be had without loading the model.

    Raises:
        ValueError: As `check_shape`, or if a Hugging Face model has no such module.
    """
    kwargs = cfg.model_from_pretrained_kwargs or {}
    shape = hooks.shape_of_named_model(cfg.model_class_name, cfg.model_name, kwargs)
    if shape is None:
        return
    check_shape(cfg, shape, lens)
    if cfg.model_class_name == "AutoModelForCausalLM":
        names = cfg.resolve_hook_names(shape.n_layers)
        hooks.check_hf_hook_names(cfg.model_name, names, kwargs)


def check_shape(
    cfg: MultiLayerConfig[Any], shape: hooks.ModelShape, lens: LayerLens | None
) -> None:
    """Check that a run fits a model of these sizes.

    Raises:
        ValueError: If a layer is not in the model, the context is too long for it, or
            the lens or the SAE is of another width or depth.
    """
    if lens is not None:
        lens.config.check_shape(shape, cfg.model_name)
    names = cfg.resolve_hook_names(shape.n_layers)
    hooks.check_context_size(cfg.context_size, shape, cfg.model_name)
    hooks.check_width(names, cfg.sae.d_in, shape)


def load_any_model(cfg: MultiLayerConfig[Any]) -> Any:
    """Load the model of a run: the host's kinds, and TransformerBridge.

    Raises:
        ValueError: If the model or `model_class_name` is unknown, or it has no such
            hook.
    """
    kwargs = cfg.model_from_pretrained_kwargs or {}
    if cfg.model_class_name == "TransformerBridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            cfg.model_name, device=cfg.llm_device, **kwargs
        )
    hook_names = None
    if cfg.model_class_name == "AutoModelForCausalLM":
        shape = hooks.shape_of_named_model(cfg.model_class_name, cfg.model_name, kwargs)
        hook_names = None if shape is None else cfg.resolve_hook_names(shape.n_layers)
    with hooks.short_unknown_model_error(cfg.model_name):
        return load_model(
            cfg.model_class_name,
            cfg.model_name,
            device=cfg.llm_device,
            model_from_pretrained_kwargs=kwargs,
            hook_names=hook_names,
        )
