"""The blocks of a Hugging Face decoder, called from outside the model's own loop.

Nothing about an architecture is built in. The model's forward pass runs on a shallow
copy of the model whose blocks are passed over: it gives the arguments that each block
is called with (masks, positions, ...) and, with another stream passed on, the logits.
"""

import copy
import inspect
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.models.walk import Walk

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a call of a block."""


def check_decoder_only(config: Any) -> None:
    """Raise ValueError if a Hugging Face config is that of an encoder-decoder model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "The model must be a decoder, which predicts each token from those before; "
            f"{config.name_or_path!r} has an encoder and a decoder (model type "
            f"{config.model_type!r}). Use a causal model such as GPT-2 or Llama."
        )


class Decoder:
    """The blocks of a model, and its forward pass without them."""

    def __init__(self, model: Any, n_layers: int, root: Any = None) -> None:
        """Find the blocks.

        Args:
            model: A Hugging Face causal language model.
            root: A TransformerBridge of the model, whose forward pass is used.
        """
        self._model, self._root = model, root
        self.blocks_name = _find_blocks(model, n_layers)
        self.blocks: Any = model.get_submodule(self.blocks_name)

    @property
    def attention_window(self) -> int | None:
        """The fewest positions that a block's attention may see; None: all."""
        config = self._model.config.get_text_config()
        windows = [getattr(config, name, None) for name in _WINDOWS]
        return min((w for w in windows if type(w) is int and w > 0), default=None)

    def calls(
        self,
        tokens: Int[Tensor, "prompt pos"],
        mask: Int[Tensor, "prompt all_pos"] | None,
        cache: Any = None,
    ) -> list[Call]:
        """The arguments with which the model would call each block.

        Args:
            mask: Of the positions in the cache, too.
            cache: Keys and values of earlier positions.
        """
        calls: list[Call] = []

        def pass_over(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if len(calls) == len(self.blocks):
                raise _AllCalled
            return self._as_returned(_hidden(args, kwargs))

        try:
            kwargs = input_kwargs(self._model, mask, cache)
            self._run_without_blocks(pass_over, tokens, kwargs)
        except _AllCalled:
            return calls
        raise ValueError(
            f"{type(self._model).__name__} called {len(calls)} of its "
            f"{len(self.blocks)} blocks in {self.blocks_name!r}"
        )

    def logits(
        self, stream: Float[Tensor, "row chunk d_model"]
    ) -> Float[Tensor, "row chunk d_vocab"]:
        """Run only what follows the blocks: final norm, unembedding, soft cap, ..."""

        def pass_over(*_: Any, **__: Any) -> Any:
            return self._as_returned(stream)

        # The tokens are not used; their embedding is passed over, too.
        tokens = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        return self._run_without_blocks(pass_over, tokens, input_kwargs(self._model))

    def residual_streams(
        self, run: Callable[[], Float[Tensor, "prompt pos d_vocab"]]
    ) -> tuple[
        list[Float[Tensor, "prompt pos d_model"]], Float[Tensor, "prompt pos d_vocab"]
    ]:
        """The residual stream before each block and after the last; logits of a run."""
        streams: list[Tensor] = []

        def before(_: Any, args: Any, kwargs: Any) -> None:
            streams.append(_hidden(args, kwargs))

        def after(_: Any, __: Any, output: Any) -> None:
            streams.append(first_output(output))

        with ExitStack() as stack:
            for block in self.blocks:
                handle = block.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(self.blocks[-1].register_forward_hook(after).remove)
            logits = run()
        return streams, logits

    @cached_property
    def _n_returned(self) -> int | None:
        """Length of the tuple that a block returns; None: it returns a tensor."""
        outputs: list[Any] = []
        handle = self.blocks[0].register_forward_hook(
            lambda _, __, output: outputs.append(output)
        )
        try:
            device = next(self._model.parameters()).device
            tokens = torch.ones(1, 1, dtype=torch.long, device=device)
            run = self._model if self._root is None else self._root
            with torch.no_grad():
                run(tokens, **input_kwargs(self._model))
        finally:
            handle.remove()
        return len(outputs[0]) if isinstance(outputs[0], tuple) else None

    def _as_returned(self, stream: Tensor) -> Any:
        if self._n_returned is None:
            return stream
        return (stream, *[None] * (self._n_returned - 1))

    def _run_without_blocks(
        self, pass_over: Callable[..., Any], tokens: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        passed = nn.ModuleList(_PassedOver(block, pass_over) for block in self.blocks)
        model = with_submodule(self._model, self.blocks_name.split("."), passed)
        if self._root is None:
            return model(tokens, **kwargs).logits
        bridge = shallow_copy(self._root)
        if "_driver" in bridge.__dict__:  # In TransformerLens 4, it holds the model.
            bridge.__dict__["_driver"] = copy.copy(bridge.__dict__["_driver"])
        # The bridge's property; a module would be registered as a submodule otherwise.
        object.__setattr__(bridge, "original_model", model)
        return bridge(tokens, return_type="logits", **kwargs)


class DecoderWalk(Walk):
    """A walk through the blocks of a Hugging Face model or a bridge."""

    def __init__(
        self,
        decoder: Decoder,
        tokens: Int[Tensor, "prompt pos"],
        mask: Int[Tensor, "prompt all_pos"] | None,
        cache: Any = None,
    ) -> None:
        """Collect the arguments of the blocks for these prompts."""
        self._decoder = decoder
        self._calls = decoder.calls(tokens, mask, cache)
        self.residual = _hidden(*self._calls[0])

    @override
    def run_block(self, stream: Tensor, block: int) -> Tensor:
        args, kwargs = self._calls[block]
        if args:
            args = (stream, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": stream}
        return first_output(self._decoder.blocks[block](*args, **kwargs))

    @override
    def logits(self, stream: Tensor) -> Tensor:
        return self._decoder.logits(stream)


def input_kwargs(
    model: Any, mask: Int[Tensor, "prompt pos"] | None = None, cache: Any = None
) -> dict[str, Any]:
    """Arguments of a Hugging Face model's forward pass besides the tokens.

    Positions are counted from the start of the text; of themselves most models count
    from the first column, padding or not. Those in the cache are left out.

    Raises:
        ValueError: If there is a cache and the model takes none.
    """
    kwargs: dict[str, Any] = {"use_cache": cache is not None}
    accepted = inspect.signature(model.forward).parameters
    n_cached = 0
    if cache is not None:
        kwargs["past_key_values"], n_cached = cache, cache.get_seq_length()
        if "past_key_values" not in accepted:
            raise ValueError(f"{type(model).__name__} takes no keys and values")
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, n_cached:]
        kwargs |= {"attention_mask": mask, "position_ids": positions}
    return {name: value for name, value in kwargs.items() if name in accepted}


@contextmanager
def keep_keys_and_values(model: Any) -> Generator[None]:
    """Passes of a Hugging Face model within continue from one another."""
    cache: Any = None

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "use_cache": True, "past_key_values": cache}

    def after(_: Any, __: Any, output: Any) -> None:
        nonlocal cache
        cache = output.past_key_values
        if cache is None:
            raise ValueError("it returns no keys and values")

    with ExitStack() as stack:
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(after).remove)
        yield


class _AllCalled(Exception):
    """Every block has been passed over; the rest of the model need not run."""


class _PassedOver(nn.Module):
    """Stands in for a block: has its attributes, runs a function instead."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        # Not as a submodule, whose hooks and parameters would count as this one's.
        self.__dict__["_block"], self.__dict__["forward"] = block, forward

    @override
    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def first_output(output: Any) -> Tensor:
    """The residual stream in the output of a block."""
    return output[0] if isinstance(output, tuple) else output


def _find_blocks(model: Any, n_layers: int) -> str:
    """The outermost list of as many modules as the model has layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    of_decoder = set(decoder.modules())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and module in of_decoder
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no list of {n_layers} modules, its blocks"
        )
    return min(names, key=lambda name: name.count("."))


def shallow_copy(module: Any) -> Any:
    """A copy of a module whose submodules can be replaced; it shares all of them."""
    shallow = object.__new__(type(module))
    shallow.__dict__.update(module.__dict__)
    shallow.__dict__["_modules"] = dict(module._modules)
    # accelerate, which spreads a model over devices, sets these on each module.
    for name in ("forward", "_old_forward"):
        if name in module.__dict__:
            shallow.__dict__[name] = _bound_to(shallow, module, module.__dict__[name])
    return shallow


def _bound_to(shallow: Any, module: Any, function: Any) -> Any:
    """The method or partial function of a module as one of its copy."""
    if isinstance(function, MethodType) and function.__self__ is module:
        return MethodType(function.__func__, shallow)
    if isinstance(function, partial) and function.args[:1] == (module,):
        return partial(function.func, shallow, *function.args[1:], **function.keywords)
    return function


def with_submodule(module: Any, path: list[str], replacement: nn.Module) -> Any:
    """A copy of a module with another submodule, which shares all the rest."""
    if not path:
        return replacement
    shallow = shallow_copy(module)
    child = shallow._modules[path[0]]
    shallow._modules[path[0]] = with_submodule(child, path[1:], replacement)
    return shallow
