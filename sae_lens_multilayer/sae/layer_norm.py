"""SAELens' layer norm around an SAE, made safe for `copy.deepcopy`."""

from typing import Any

from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.topk.reference import standardize


class CopyableLayerNorm(SAE[Any]):
    """An SAE whose layer norm is made of bound methods.

    SAELens makes it of closures over the SAE, which after `copy.deepcopy` write to the
    original instead of the copy.
    """

    def _setup_activation_normalization(self) -> None:
        super()._setup_activation_normalization()
        if self.standardizes:
            self.run_time_activation_norm_fn_in = self._standardize
            self.run_time_activation_norm_fn_out = self._destandardize

    @property
    def standardizes(self) -> bool:
        """Whether each vector is standardised to mean 0 and standard deviation 1."""
        return self.cfg.normalize_activations == "layer_norm"

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self._check_can_fold()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        self._check_can_fold()
        super().fold_activation_whitening(*args, **kwargs)

    def _check_can_fold(self) -> None:
        # SAELens would fold anyway, as if raw vectors were multiplied by the weights.
        if self.standardizes or self.cfg.metadata.lens is not None:
            raise ValueError(
                "A scale or whitening of inputs can only be folded into an SAE with "
                "normalize_activations='none' and no tuned lens."
            )

    def _standardize(self, x: Tensor) -> Tensor:
        u, self.ln_mu, self.ln_std = standardize(x)
        return u

    def _destandardize(self, x: Tensor) -> Tensor:
        if not hasattr(self, "ln_std"):
            raise RuntimeError(
                "`decode` deletes the mean and standard deviation that it uses. Call "
                "`encode` before each `decode`, or use `encode_topk` and `decode_topk`."
            )
        x = x * self.ln_std + self.ln_mu
        del self.ln_mu, self.ln_std
        return x
