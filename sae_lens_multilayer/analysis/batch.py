"""The tokens of some prompts with their vectors, as analyses receive them."""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.analysis.active import ActiveLatents, active_latents
from sae_lens_multilayer.evaluation.encoder import LayerEncoder


@dataclass
class TokenBatch:
    """The tokens of some prompts that are not excluded, with their vectors."""

    prompts: Int[Tensor, "prompt pos"]
    """Token ids of the prompts, with excluded tokens; on the CPU."""
    first_prompt: int
    """Number of prompts in earlier batches."""
    prompt: Int[Tensor, " token"]
    """Index into `prompts` of each token; on the CPU."""
    position: Int[Tensor, " token"]
    """Position of each token in its prompt; on the CPU."""
    x: Float[Tensor, "token layer d_in"]
    """Vectors at all layers, in raw space."""
    encoder: LayerEncoder | None
    """None if no SAE is analysed."""

    @cached_property
    def active(self) -> ActiveLatents:
        """The SAE's activations, encoded once for all analyses."""
        assert self.encoder is not None
        return active_latents(self.encoder, self.x)

    @property
    def token_ids(self) -> Int[Tensor, " token"]:
        """The id of each token."""
        return self.prompts[self.prompt, self.position]
