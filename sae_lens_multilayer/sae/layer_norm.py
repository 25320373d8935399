"""The host's layer norm around an SAE, in a form that survives copying the SAE."""

from typing import Any

from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.topk.reference import standardize


class CopyableLayerNorm(SAE[Any]):
    """SAELens keeps an SAE's layer norm in closures over the SAE itself.

    After `copy.deepcopy` those write on the original. Bound methods follow the copy.
    """

    def _setup_activation_normalization(self) -> None:
        super()._setup_activation_normalization()
        if self.standardizes:
            self.run_time_activation_norm_fn_in = self._standardize
            self.run_time_activation_norm_fn_out = self._destandardize

    @property
    def standardizes(self) -> bool:
        """Whether each vector is given mean 0 and standard deviation 1."""
        return self.cfg.normalize_activations == "layer_norm"

    def check_can_fold(self, what: str) -> None:
        """Raise ValueError if the SAE standardises its inputs.

        SAELens would fold all the same and then take the inputs for raw ones.

        Args:
            what: The method that folds something of the inputs into the weights.
        """
        if self.standardizes:
            raise ValueError(
                f"`{what}` needs an SAE with normalize_activations='none'; this one "
                "standardises each vector, which cannot be folded into its weights."
            )

    def _standardize(self, x: Tensor) -> Tensor:
        u, self.ln_mu, self.ln_std = standardize(x)
        return u

    def _destandardize(self, x: Tensor) -> Tensor:
        if not hasattr(self, "ln_std"):
            raise RuntimeError(
                "`decode` needs the mean and standard deviation that the last `encode` "
                "kept, and uses them up; there are none. Call `encode` before each "
                "`decode`, or use `encode_topk` and `decode_topk` of a MultiLayerSAE."
            )
        x = x * self.ln_std + self.ln_mu
        del self.ln_mu, self.ln_std
        return x
