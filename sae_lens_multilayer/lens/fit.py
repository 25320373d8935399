"""Fits a tuned lens to any model SAELens can load, in the format of tuned-lens."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from tuned_lens import TunedLens
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer.files import check_writable, complete_or_absent
from sae_lens_multilayer.lens.progress import (
    FitProgress,
    remove_finished,
    resumable_fit,
)
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.optimizer_state import (
    load_optimizer_tensors,
    optimizer_tensors,
)
from sae_lens_multilayer.record import Record, hash_of_tensors, model_fingerprints
from sae_lens_multilayer.text.prompts import check_at_least_one, check_prompts
from sae_lens_multilayer.topk.tile import wide_dtype

Optimizer = Literal["sgd", "adam"]

_RECIPE_TOKENS_PER_STEP = 2**18
_MOMENTUM = 0.9


def new_tuned_lens(model: Any) -> TunedLens:
    """A tuned lens of zeros for a model: the logit lens.

    `TunedLens.from_model` does this for Hugging Face models only.
    """
    model = as_model(model)
    config = TunedLensConfig(
        base_model_name_or_path=model.name,
        d_model=model.shape.d_model,
        num_hidden_layers=model.shape.n_layers,
    )
    lens = TunedLens(model.unembed(), config)
    return lens.to(lens.unembed.unembedding.weight.device)


@torch.inference_mode(False)
def fit_tuned_lens(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    *,
    n_steps: int = 250,
    batch_size_prompts: int | None = None,
    forward_batch_size_prompts: int = 8,
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    weight_decay: float = 1e-3,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    output_path: str | Path | None = None,
) -> TunedLens:
    """Train a tuned lens: per layer, an affine map whose logits match the model's.

    Minimises, for the residual stream h_i before each block i,
    `KL(model's output || unembed(norm(h_i + W_i h_i + b_i)))`, the mean over all
    positions, in nats. The model stays as it is, and one forward pass serves all
    layers. W and b start at 0 and the learning rate falls linearly to 0. This is
    the recipe of tuned-lens in float32 instead of bfloat16.

    Args:
        model: As for `as_model`, without SAEs attached.
        tokens: Prompts to train on, shuffled anew in each pass over them.
        batch_size_prompts: Prompts per step; None: 2**18 tokens as in the paper, at
            most all prompts.
        forward_batch_size_prompts: Prompts per forward pass, which needs memory for
            about four times their logits in float32.
        optimizer: "sgd" is the paper's, with Nesterov momentum 0.9; "adam" is AMSGrad
            with a warm-up over the first fifth of the steps, at most 1000.
        lr: Largest learning rate; None: 1.0 for SGD and 1e-3 for Adam. As in
            tuned-lens, that of SGD is multiplied by 1 - momentum.
        weight_decay: Coefficient of the L2 penalty on W and b.
        max_grad_norm: Largest norm of the gradient of all layers together.
        output_path: New or empty folder to save to, in the format that
            `TunedLens.from_unembed_and_pretrained` loads. The state of the fit is saved
            about every minute in the folder `{output_path}.partial`. A second call with
            the same arguments resumes from it, with the same result.

    Returns:
        The lens in the model's dtype.

    Raises:
        ValueError: If that folder is of a fit with other arguments or another model.

    References:
        Belrose et al. (2023), arXiv:2303.08112, and tuned-lens' `train_loop.py`.
    """
    model = as_model(model)
    model.check_no_saes_attached()
    tokens = check_prompts(model, tokens)
    if output_path is not None:
        output_path = Path(output_path).expanduser()
        remove_finished(output_path)
        check_writable(output_path, "output_path")
    recipe = _Recipe(
        n_steps,
        batch_size_prompts,
        forward_batch_size_prompts,
        optimizer,
        lr,
        weight_decay,
        max_grad_norm,
        seed,
    )
    inputs = {"prompts": hash_of_tensors({"ids": tokens})}
    inputs |= model_fingerprints(model.module)
    record = Record("tuned_fit", asdict(recipe), inputs)
    with resumable_fit(output_path, record) as progress:
        lens = _fit(model, tokens, recipe, progress)
        progress.save_output(lambda path: _save(lens, path))
    return lens


def _save(lens: TunedLens, path: Path) -> None:
    with complete_or_absent(path) as folder:
        lens.save(folder)


def lens_kl(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    lens: TunedLens | None = None,
    forward_batch_size_prompts: int = 8,
) -> Float[Tensor, " n_layers"]:
    """KL of the model's output from the prediction of a lens before each block.

    `KL(model || lens)`, the mean over all positions, in nats: 0 where the predictions
    agree.

    Args:
        lens: None for the logit lens: no translators.
    """
    model = as_model(model)
    model.check_no_saes_attached()
    tokens = check_prompts(model, tokens)
    lens = lens or new_tuned_lens(model)
    total = torch.zeros(len(lens), dtype=torch.float64)
    with torch.no_grad():
        for part in tokens.split(forward_batch_size_prompts):
            streams, log_p = _run(model, part)
            for i, h in enumerate(streams[:-1]):
                total[i] += _kl(log_p, lens, h, i).item()
    return total / tokens.numel()


@dataclass(frozen=True)
class _Recipe:
    """The settings of a fit; see `fit_tuned_lens`."""

    n_steps: int
    batch_size_prompts: int | None
    forward_batch_size_prompts: int
    optimizer: str
    lr: float | None
    weight_decay: float
    max_grad_norm: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_size_prompts", "forward_batch_size_prompts"):
            value = getattr(self, name)
            check_at_least_one(name, 1 if value is None else value)
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(
                f"`optimizer` must be 'sgd' or 'adam'; got {self.optimizer!r}."
            )

    def new_optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        shared: Any = {"lr": self.lr_of_step(0), "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, momentum=_MOMENTUM, nesterov=True, **shared)
        return torch.optim.Adam(
            params, betas=(_MOMENTUM, 0.999), amsgrad=True, **shared
        )

    def lr_of_step(self, step: int) -> float:
        if self.optimizer == "sgd":
            # PyTorch's momentum multiplies the step by 1 / (1 - momentum).
            largest = (1.0 if self.lr is None else self.lr) * (1 - _MOMENTUM)
            warmup_steps = 0
        else:
            largest = 1e-3 if self.lr is None else self.lr
            warmup_steps = min(1000, self.n_steps // 5)
        rising = (step + 1) / (warmup_steps + 1)
        falling = (self.n_steps - step) / (self.n_steps - warmup_steps)
        return largest * min(rising, falling)

    def batches(self, tokens: Tensor) -> Iterator[Tensor]:
        n_prompts, n_pos = tokens.shape
        batch_size = self.batch_size_prompts
        if batch_size is None:
            batch_size = min(n_prompts, math.ceil(_RECIPE_TOKENS_PER_STEP / n_pos))
        generator = torch.Generator().manual_seed(self.seed)
        remaining = torch.empty(0, dtype=torch.int64)
        for _ in range(self.n_steps):
            while len(remaining) < batch_size:
                order = torch.randperm(n_prompts, generator=generator)
                remaining = torch.cat([remaining, order])
            chosen, remaining = remaining.tensor_split([batch_size])
            yield tokens[chosen.to(tokens.device)]


def _fit(
    model: Model, tokens: Tensor, recipe: _Recipe, progress: FitProgress
) -> TunedLens:
    lens = new_tuned_lens(model)
    translators, dtype = lens.layer_translators, lens.unembed.unembedding.weight.dtype
    translators.to(wide_dtype(dtype))
    _train(model, lens, tokens, recipe, progress)
    translators.to(dtype).requires_grad_(False)
    for tensor in translators.state_dict().values():
        _check_finite("The fitted lens", tensor)
    return lens


def _train(
    model: Model,
    lens: TunedLens,
    tokens: Tensor,
    recipe: _Recipe,
    progress: FitProgress,
) -> None:
    params = list(lens.layer_translators.parameters())
    optimizer = recipe.new_optimizer(params)
    n_done, saved = progress.load()
    if saved:
        _load_state(lens, optimizer, saved)
    batches = islice(recipe.batches(tokens), n_done, None)
    bar = tqdm(batches, "Fitting the tuned lens", recipe.n_steps, initial=n_done)
    with bar, torch.enable_grad():
        for step, batch in enumerate(bar, n_done):
            losses = _backward(model, lens, batch, recipe.forward_batch_size_prompts)
            _check_finite("The KL of each layer", losses)
            bar.set_postfix(kl=f"{losses.mean():.4f}", refresh=False)
            nn.utils.clip_grad_norm_(params, recipe.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_of_step(step)
            optimizer.step()
            optimizer.zero_grad()
            progress.end_batch(step + 1, _state(lens, optimizer))


def _state(lens: TunedLens, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    weights = lens.layer_translators.state_dict(prefix="lens.")
    return {**weights, **optimizer_tensors(optimizer)}


def _load_state(
    lens: TunedLens, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    weights = lens.layer_translators.state_dict(prefix="lens.")
    lens.layer_translators.load_state_dict(
        {name.removeprefix("lens."): saved[name] for name in weights}
    )
    load_optimizer_tensors(optimizer, saved)


def _backward(
    model: Model, lens: TunedLens, batch: Tensor, forward_batch_size_prompts: int
) -> Float[Tensor, " n_layers"]:
    """Add the gradients of the mean KL of each layer; returns these means."""
    losses = torch.zeros(len(lens), dtype=torch.float64)
    for part in batch.split(forward_batch_size_prompts):
        streams, log_p = _run(model, part)
        # One layer at a time, to hold the logits of one layer only.
        for i, h in enumerate(streams[:-1]):
            loss = _kl(log_p, lens, h, i) / batch.numel()
            loss.backward()
            losses[i] += loss.item()
    return losses


def _kl(log_p: Tensor, lens: TunedLens, h: Tensor, i: int) -> Tensor:
    """KL(p || the lens' prediction before block i), summed over positions."""
    dtype = next(lens[i].parameters()).dtype
    z = lens.transform_hidden(h.to(dtype), i)
    log_q = lens.unembed(z.to(h.dtype)).to(log_p.dtype).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


@torch.no_grad()
def _run(
    model: Model, tokens: Tensor
) -> tuple[list[Tensor], Float[Tensor, "prompt pos d_vocab"]]:
    """The residual stream before each block and after the last; log-probabilities."""
    streams, logits = model.residual_streams(tokens)
    dtype = wide_dtype(logits.dtype)
    return streams, logits.to(dtype).log_softmax(-1)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise FloatingPointError(
            f"{name} is not finite in {tensor.dtype}. Use a lower `lr` or "
            "`weight_decay`, and look for NaN in the model's activations."
        )
