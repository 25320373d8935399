"""Ordinary SAELens SAEs for single hooks of a multi-layer SAE, sharing its memory."""

import copy
import functools
from dataclasses import fields
from typing import Any

import torch
from sae_lens import SAE, SAEConfig, TopKSAE, TopKSAEConfig, TrainingSAE
from sae_lens.registry import get_sae_class
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.hooks import find_hook
from sae_lens_multilayer.lens.carrier import LensCarrier, lens_of
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.sae.config import MultiLayerSAEConfig
from sae_lens_multilayer.sae.layer_norm import CopyableLayerNorm
from sae_lens_multilayer.sae.token_sae import TokenSAE, no_view
from sae_lens_multilayer.sae.topk_weights import check_unit_norm


def hook_names_of(sae: SAE[Any]) -> list[str]:
    """The hooks an SAE was trained on; ValueError if this package did not train it."""
    names = sae.cfg.metadata.hook_names
    if not names:
        raise ValueError(
            "The SAE must name its hooks in `cfg.metadata.hook_names`, as SAEs trained "
            "by this package do."
        )
    return list(names)


def view(sae: SAE[Any], layer_or_hook_name: int | str) -> SAE[Any]:
    """An ordinary SAE for one hook of an SAE that was trained on several.

    Its tensors share the memory of `sae` until it is converted, folded or loaded into:
    train a `copy.deepcopy`.

    Views of a stock SAE in training hold copies of its weights, folded for inference.

    Args:
        sae: A `MultiLayerSAE`, or any SAELens SAE trained on a multi-layer stream.
        layer_or_hook_name: One of `sae.cfg.metadata.hook_names`, or its block number.

    Returns:
        An SAE of the stock class: TopK for a multi-layer SAE. Once saved, it loads in
        SAELens without this package. With a lens, which no stock class applies, a
        `MultiLayerSAE` of one hook, which needs this package to load.
    """
    index = find_hook(hook_names_of(sae), layer_or_hook_name)
    return views(sae)[index]


def views(sae: SAE[Any]) -> list[SAE[Any]]:
    """The views of all hooks, in the order of the layer axis."""
    if isinstance(sae, TokenSAE):
        raise no_view(sae)
    cfg, tensors = _view_form(sae)
    lens = lens_of(sae)
    return [_HookView.build(cfg, tensors, n, lens) for n in hook_names_of(sae)]


def _view_form(sae: SAE[Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
    """The inference config and tensors of an equivalent SAE, stock without a lens."""
    if isinstance(sae, LensCarrier):
        shared = {f.name: getattr(sae.cfg, f.name) for f in fields(SAEConfig)}
        if sae.lens is not None:
            return MultiLayerSAEConfig(k=sae.cfg.k, **shared), sae.state_dict()
        b_enc = torch.zeros(sae.cfg.d_sae, dtype=sae.dtype, device=sae.device)
        tensors = {**sae.state_dict(), "b_enc": b_enc}
        return TopKSAEConfig(k=sae.cfg.k, **shared), tensors
    if isinstance(sae, TrainingSAE):
        # This folds norms and thresholds into the given tensors.
        tensors = {name: t.clone() for name, t in sae.state_dict().items()}
        sae.process_state_dict_for_saving_inference(tensors)
        return SAEConfig.from_dict(sae.cfg.get_inference_sae_cfg_dict()), tensors
    return sae.cfg, sae.state_dict()


def _with_own_memory(name: str) -> Any:
    def method(self: "_HookView", *args: Any, **kwargs: Any) -> Any:
        self.copy_tensors()
        return getattr(super(_HookView, self), name)(*args, **kwargs)

    return method


class _HookView(CopyableLayerNorm):
    """Mixin that makes a view of a stock class."""

    @staticmethod
    def build(
        cfg: SAEConfig,
        tensors: dict[str, Tensor],
        hook_name: str,
        lens: LayerLens | None,
    ) -> SAE[Any]:
        cfg = copy.deepcopy(cfg)
        cfg.metadata.hook_name = hook_name
        delattr(cfg.metadata, "hook_names")
        if lens is not None:
            cfg.metadata.hook_names = [hook_name]
            delattr(cfg.metadata, "lens")
        device, cfg.device = cfg.device, "meta"
        sae = _view_class(get_sae_class(cfg.architecture())[0])(cfg)
        cfg.device, sae.device = device, torch.device(device)
        for name in sae.state_dict():
            # A new parameter over the shared memory, with its own `requires_grad`
            # and gradient.
            is_parameter = name in sae._parameters
            value = tensors[name].detach()
            setattr(sae, name, nn.Parameter(value) if is_parameter else value)
        if lens is not None:
            sae.lens = lens.select([hook_name])
        return sae

    load_state_dict = _with_own_memory("load_state_dict")
    fold_and_get_W_dec_norm = _with_own_memory("fold_and_get_W_dec_norm")
    fold_activation_norm_scaling_factor = _with_own_memory(
        "fold_activation_norm_scaling_factor"
    )
    fold_activation_whitening = _with_own_memory("fold_activation_whitening")

    def copy_tensors(self) -> None:
        """Stop sharing memory with the SAE."""
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                # A new tensor object: lenses share theirs with other views.
                setattr(module, name, buffer.clone())

    @override
    def fold_W_dec_norm(self) -> None:
        """Scale the decoder rows to unit norm; those of a TopK view must have it."""
        # SAEDashboard calls this for every SAE, and the stock TopK raises an error.
        is_topk = isinstance(self, (TopKSAE, LensCarrier))
        if is_topk and not getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            check_unit_norm(self.W_dec)
            return
        self.copy_tensors()
        super().fold_W_dec_norm()

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # safetensors saves contiguous tensors only.
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()


@functools.cache
def _view_class(stock: type[SAE[Any]]) -> type[SAE[Any]]:
    name = f"{stock.__name__}View"
    return type(name, (_HookView, stock), {"__module__": __name__})
