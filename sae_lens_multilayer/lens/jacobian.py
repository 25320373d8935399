"""Jacobian lenses: the mean derivative of the last layer by each layer before it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.files import check_new_file, first_sentence, partial_of
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.progress import (
    FitProgress,
    remove_finished,
    resumable_fit,
)
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.record import Record, model_fingerprints
from sae_lens_multilayer.text.prompts import Prompts, check_at_least_one, take_prompts
from sae_lens_multilayer.topk.tile import wide_dtype

Jacobians = Mapping[int, Float[Tensor, "d_in d_in"]]
"""`J[l]` with `h_final ~ J[l] h_l`, h_l the output of block l, for all but the last."""


@torch.inference_mode(False)
def fit_jacobian_lens(
    model: Any,
    tokens: Int[Tensor, "prompt pos"] | Prompts,
    hook_names: Sequence[str] | None = None,
    *,
    skip_first_positions: int = 16,
    batch_size_prompts: int = 1,
    rows_per_pass: int = 8,
    output_path: str | Path | None = None,
) -> LayerLens:
    """Fit a Jacobian lens: `z = J_l h_l`, with `J_l = E[d h_final / d h_l]`.

    h_l is the output of block l and h_final that of the last block, before the final
    norm. As in the reference code, the derivatives of all later positions are added,
    `sum_(t' >= t) d h_final[t'] / d h_l[t]`, and the mean is over positions t and
    prompts. t and t' are the counted positions, but the first ones, which attention
    treats as sinks, and the last one. The derivatives are exact: a batch of prompts
    needs one forward pass and `d_in / rows_per_pass` backward passes for all layers.

    Args:
        model: As for `as_model`, of a kind that can be run block by block.
        hook_names: The hooks of the lens returned: inputs or outputs of blocks; None:
            the outputs of all blocks.
        skip_first_positions: Positions left out at the start of each prompt.
        batch_size_prompts, rows_per_pass: Prompts in a batch and rows of J in a
            backward pass; memory grows with their product.
        output_path: New file to save to; see `save_jacobians`. The sums so far are
            saved about every minute in the folder `{output_path}.partial`. A second
            call with the same arguments resumes from them, with the same result.

    Raises:
        ValueError: If that folder is of a fit to other prompts or another model.

    References:
        Gurnee et al. (2026), the Jacobian lens; its code `anthropics/jacobian-lens`.
    """
    lm = as_model(model)
    lm.check_no_saes_attached()
    if lm.shape.n_layers < 2:
        raise ValueError(
            "A Jacobian lens maps the outputs of earlier blocks to the last one's: the "
            f"model must have at least 2 blocks; {lm.name!r} has {lm.shape.n_layers}."
        )
    if output_path is not None:
        remove_finished(Path(output_path).expanduser())
        output_path = check_new_file(output_path, "output_path")
    check_at_least_one("rows_per_pass", rows_per_pass)
    prompts = take_prompts(lm, tokens, None, batch_size_prompts)
    prompts = _without_ends(prompts, skip_first_positions)
    record = Record(
        "jacobian_fit",
        {"batch_size_prompts": batch_size_prompts, "rows_per_pass": rows_per_pass},
        {"prompts": prompts.fingerprint, **model_fingerprints(lm.module)},
    )
    with resumable_fit(output_path, record) as progress:
        batches = prompts.split(batch_size_prompts)
        jacobians = _mean_jacobians(lm, batches, rows_per_pass, progress)
        progress.save_output(lambda path: save_jacobians(path, jacobians, len(prompts)))
    if hook_names is None:
        layers = range(lm.shape.n_layers)
        hook_names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    return lens_of_jacobians(
        jacobians, hook_names, lm.shape.n_layers, lm.name, lm.unembedding_hash()
    )


def _without_ends(prompts: Prompts, skip_first_positions: int) -> Prompts:
    counted = prompts.counted.clone()
    counted[:, :skip_first_positions] = False
    counted[:, -1] = False
    if not counted.any():
        raise ValueError(
            "Prompts must have counted tokens after the first `skip_first_positions` = "
            f"{skip_first_positions} and before the last one; they have "
            f"{counted.shape[1]} tokens."
        )
    return Prompts(prompts.ids, counted)


def _mean_jacobians(
    model: Model,
    batches: Sequence[Prompts],
    rows_per_pass: int,
    progress: FitProgress,
) -> dict[int, Float[Tensor, "d_in d_in"]]:
    d_in = model.shape.d_model
    n_done, saved = progress.load()
    zeros = torch.zeros(model.shape.n_layers - 1, d_in, d_in, dtype=torch.float64)
    total = saved.get("total", zeros)
    n_positions = saved.get("n_positions", torch.tensor(0))
    passes = torch.arange(d_in).split(rows_per_pass)
    bar = tqdm(
        None, "Jacobians", len(batches) * d_in, unit="row", initial=n_done * d_in
    )
    with bar:
        for n_batches, batch in enumerate(batches[n_done:], n_done + 1):
            counted = batch.counted.to(model.device)
            *sources, final = _streams(model, batch.ids, rows_per_pass)
            for rows in passes:
                is_last = rows is passes[-1]
                grads = _gradients(sources, final, counted, rows, not is_last)
                total[:, rows] += grads
                bar.update(len(rows))
            n_positions += counted.sum().cpu()
            tensors = {"total": total, "n_positions": n_positions}
            progress.end_batch(n_batches, tensors)
    return dict(enumerate((total / n_positions).float()))


@torch.enable_grad()
def _streams(
    model: Model, tokens: Int[Tensor, "prompt pos"], n_copies: int
) -> list[Float[Tensor, "copy_prompt pos d_in"]]:
    """The outputs of all blocks, for the prompts repeated; the first is a leaf."""
    with torch.no_grad():
        walk = model.walk(tokens.repeat(n_copies, 1))
        stream = walk.run_block(walk.residual, 0)
    streams = [stream.detach().clone().requires_grad_()]
    for block in range(1, model.shape.n_layers):
        streams.append(walk.run_block(streams[-1], block))
    return streams


def _gradients(
    sources: Sequence[Float[Tensor, "copy_prompt pos d_in"]],
    final: Float[Tensor, "copy_prompt pos d_in"],
    counted: Bool[Tensor, "prompt pos"],
    rows: Int[Tensor, " row"],
    retain_graph: bool,
) -> Float[Tensor, "layer row d_in"]:
    """Rows of the Jacobians, added up over counted positions; copy i has row i."""
    if not sources:
        return torch.zeros(0, len(rows), final.shape[-1], dtype=torch.float64)
    grad = torch.zeros_like(final).view(-1, *counted.shape, final.shape[-1])
    for copy, row in enumerate(rows.tolist()):
        grad[copy, :, :, row] = counted.to(grad.dtype)
    found = torch.autograd.grad(
        final, sources, grad.view_as(final), retain_graph=retain_graph
    )
    dtype = wide_dtype(final.dtype)
    parts = [g.reshape(grad.shape)[: len(rows)].to(dtype) for g in found]
    sums = [(part * counted[:, :, None]).sum((1, 2)) for part in parts]
    return torch.stack(sums).cpu().double()


def lens_of_jacobians(
    jacobians: Jacobians,
    hook_names: Sequence[str],
    n_layers: int,
    base_model_name: str | None = None,
    unembed_hash: str | None = None,
) -> LayerLens:
    """The lens of these hooks; the output of the last block has the identity.

    Args:
        n_layers: Number of blocks of the model.
        base_model_name, unembed_hash: See `LensConfig`.
    """
    d_in = len(next(iter(jacobians.values())))
    config = LensConfig(
        list(hook_names),
        n_layers,
        d_in,
        base_model_name=base_model_name,
        unembed_hash=unembed_hash,
        kind="jacobian",
    )
    with_last = {**jacobians, n_layers - 1: torch.eye(d_in)}
    blocks = {name: config.last_block_before(name) for name in hook_names}
    if missing := [name for name, block in blocks.items() if block not in with_last]:
        raise ValueError(
            f"The Jacobian lens must have matrices for {missing}; it has those of the "
            f"outputs of blocks {sorted(jacobians)}. Leave out these hooks."
        )
    maps = [with_last[block].T for block in blocks.values()]
    return LayerLens.from_maps(config, maps, [torch.zeros(d_in)] * len(maps))


def save_jacobians(path: str | Path, jacobians: Jacobians, n_prompts: int) -> None:
    """Save to a new file in the format of the reference code and TransformerLens.

    `torch.save` of `{"J": {layer: [d, d]}, "n_prompts", "source_layers", "d_model"}`,
    in float32.
    """
    path = check_new_file(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        "J": {layer: j.float().clone() for layer, j in jacobians.items()},
        "n_prompts": n_prompts,
        "source_layers": sorted(jacobians),
        "d_model": len(next(iter(jacobians.values()))),
    }
    partial = partial_of(path)
    try:
        # A path would name the archive in the file, and must not begin with a dot.
        with partial.open("wb") as file:
            torch.save(contents, file)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read_jacobians(path: str | Path) -> dict[int, Float[Tensor, "d_in d_in"]]:
    """Read a file of `save_jacobians`, of the reference code or of TransformerLens.

    Raises:
        ValueError: If it is no such file, or a matrix is not finite or not square.
    """
    try:
        # A pickle of anything but tensors could run any code.
        contents: Any = torch.load(path, map_location="cpu", weights_only=True)
        jacobians = {int(layer): j.float() for layer, j in contents["J"].items()}
        shapes = {tuple(j.shape) for j in jacobians.values()}
    except Exception as error:  # the class depends on the bytes in the file
        raise ValueError(
            f"{path} must be the file of a Jacobian lens, with a matrix for each layer "
            f'under "J" ({first_sentence(error)}).'
        ) from error
    d_in = contents.get("d_model", next(iter(shapes), (0,))[0])
    not_finite = [n for n, j in jacobians.items() if not j.isfinite().all()]
    if shapes != {(d_in, d_in)} or min(jacobians) < 0 or not_finite:
        raise ValueError(
            f"{path} must have finite matrices [{d_in}, {d_in}] of blocks from 0; got "
            f"shapes {sorted(shapes)} of {sorted(jacobians)}, not finite: {not_finite}."
        )
    return jacobians
