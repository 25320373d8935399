"""A pool of token rows that is allocated once, refilled in place and drawn from."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ShuffleBuffer:
    """Slots for tokens; each holds the vectors of one token at all layers.

    Tokens are written into free slots, and shuffling permutes slot numbers, so no
    vector is moved except into its slot and out of it. Tokens are numbered in the order
    in which they are added, so the buffer can be rebuilt from these numbers.

    Attributes:
        data: The slots, [slot, layer, d_in].
        n_filled: Tokens in the buffer.
        n_added: Tokens added so far; the number of the next one.
    """

    def __init__(
        self,
        capacity: int,
        n_layers: int,
        d_in: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        """Allocate slots for `capacity` tokens.

        Args:
            generator: Of the CPU; None: serve tokens in the order of adding them.
        """
        self.data: Float[Tensor, "slot layer d_in"] = torch.empty(
            capacity, n_layers, d_in, dtype=dtype, device=device
        )
        self.n_filled = 0
        self.n_added = 0
        self._generator = generator
        # The first n_filled are full, in reverse order of serving; the others are free.
        self._slots: Int[Tensor, " slot"] = torch.arange(capacity)
        # Numbers of the tokens in the full slots. Never changed in place.
        self._numbers: Int[Tensor, " token"] = torch.empty(0, dtype=torch.long)

    @property
    def n_free(self) -> int:
        """Number of tokens that can be added."""
        return len(self._slots) - self.n_filled

    def free_slots(self, n_tokens: int) -> Int[Tensor, " token"]:
        """Slots to write the next tokens to, before `commit`."""
        assert 0 <= n_tokens <= self.n_free
        slots = self._slots[self.n_filled : self.n_filled + n_tokens]
        return slots.to(self.data.device, copy=True)

    def commit(self, n_tokens: int) -> None:
        """Count the next `n_tokens` free slots as filled."""
        old, end = self.n_filled, self.n_filled + n_tokens
        numbers = torch.arange(self.n_added, self.n_added + n_tokens)
        parts = [self._numbers[:old], numbers]
        if self._generator is None:
            # The newest are served last.
            newest = self._slots[old:end].flip(0)
            self._slots[:end] = torch.cat([newest, self._slots[:old]])
            parts = [numbers.flip(0), self._numbers[:old]]
        self._numbers = torch.cat(parts)
        self.n_filled, self.n_added = end, self.n_added + n_tokens

    def shuffle(self) -> None:
        """Put the filled slots into random order."""
        if self._generator is not None:
            order = torch.randperm(self.n_filled, generator=self._generator)
            self._slots[: self.n_filled] = self._slots[: self.n_filled][order]
            self._numbers = self._numbers[order]

    @property
    def token_numbers(self) -> Int[Tensor, " token"]:
        """Numbers of the tokens in the buffer, in reverse order of serving."""
        return self._numbers[: self.n_filled]

    def restore(
        self, token_numbers: Int[Tensor, " token"], n_added: int
    ) -> Int[Tensor, " token"]:
        """Fill an unused buffer; the slots to write the tokens' vectors to."""
        self._numbers = token_numbers
        self.n_filled, self.n_added = len(token_numbers), n_added
        return self._slots[: self.n_filled].to(self.data.device, copy=True)

    def draw(self, n_tokens: int) -> Float[Tensor, "token layer d_in"]:
        """Take tokens out of the buffer, each once; a copy."""
        assert 0 <= n_tokens <= self.n_filled
        self.n_filled -= n_tokens
        slots = self._slots[self.n_filled : self.n_filled + n_tokens].flip(0)
        return self.data[slots.to(self.data.device)]
