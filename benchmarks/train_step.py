"""Time of one full TopK training step: forward, gradients, unit norm, Adam.

Claim: with k = 32 active latents, the sparse step takes little longer than the float32
matrix product of the encoder, and less with certified bfloat16 candidates. It is
several times faster than the dense step of SAELens and the sparse step of
`eai-sparsify`.

First, losses and gradients of the sparse step are compared with autograd of the dense
definition, and reconstructions with those of SAELens and sparsify for equal weights.
Then all steps are timed alternately. SAELens uses the Adam of its trainer, all others a
fused Adam. Memory is the peak of the first step in a new process minus the memory
before, without parameters and Adam's state.

With `--residuals` the vectors are standardised residuals of SmolLM2, 128 tokens x 30
layers, instead of Gaussian mixtures. They have outlier dimensions, which make bfloat16
errors larger; the number of vectors without proof is printed for both.

    python -m benchmarks.train_step [--small | --large] [--residuals] [--repeats N]

On a shared machine, `--threads 1 --cpu-time` gives the most stable results.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn

from benchmarks._common import (
    announced,
    peak_rss_mib,
    print_versions,
    synchronize,
)
from benchmarks._step_case import AUX_COEFFICIENT, K_AUX, Case, K
from sae_lens_multilayer.topk.reference import training_loss
from sae_lens_multilayer.topk.sparse import decode_topk, encode_topk
from sae_lens_multilayer.topk.step import training_step
from sae_lens_multilayer.topk.update import (
    normalize_decoder,
    project_decoder_gradient,
    update_weights,
)
from sae_lens_multilayer.training.memory import keep_freed_memory

LEARNING_RATE, ADAM_EPS = 1e-4, 6.25e-10
Step = Callable[[], object]
Sizes = tuple[int, float, str, bool, int]


def fused_adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=ADAM_EPS, fused=True)


def ours(case: Case, certified: bool) -> Step:
    keep_freed_memory()  # As the trainer does; for all steps of this process.
    rows, W_dec, b_dec = case.parameters()
    # The weights of a latent are contiguous, as in the SAE.
    W_enc = nn.Parameter(rows.detach().T)
    optimizer = fused_adam([W_enc, W_dec, b_dec])

    def step() -> None:
        training_step(
            case.z,
            W_enc,
            W_dec,
            b_dec,
            micro_batch_size=case.n_vectors,
            certified=certified,
            **case.loss_options(),
        )
        update_weights(optimizer, W_enc, W_dec)

    return step


def dense_reference(case: Case) -> Step:
    rows, W_dec, b_dec = case.parameters()
    optimizer = fused_adam([rows, W_dec, b_dec])

    def step() -> None:
        optimizer.zero_grad()
        options = case.loss_options()
        training_loss(case.z, rows.T, W_dec, b_dec, **options).loss.backward()
        normalize_decoder(W_dec)
        project_decoder_gradient(W_dec)
        optimizer.step()

    return step


def host_sae(case: Case) -> TopKTrainingSAE:
    config = TopKTrainingSAEConfig(
        d_in=case.d_in, d_sae=case.d_sae, k=K, device=case.device
    )
    sae = TopKTrainingSAE(config)
    sae.W_enc.data, sae.W_dec.data = case.rows.T.contiguous(), case.rows.clone()
    return sae


def sae_lens(case: Case) -> Step:
    sae = host_sae(case)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    step_input = TrainStepInput(
        sae_in=case.x,
        coefficients={},
        dead_neuron_mask=case.dead,
        n_training_steps=0,
        is_logging_step=False,
    )

    def step() -> None:
        optimizer.zero_grad()
        sae.training_forward_pass(step_input).loss.backward()
        optimizer.step()

    return step


def sparse_coder(case: Case):
    # Not a dependency; compared if it is installed.
    from sparsify import (  # pyright: ignore[reportMissingImports]
        SparseCoder,
        SparseCoderConfig,
    )

    config = SparseCoderConfig(num_latents=case.d_sae, k=K)
    coder = SparseCoder(case.d_in, config, device=case.device, dtype=torch.float32)
    coder.encoder.weight.data = case.rows.clone()
    coder.W_dec = nn.Parameter(case.rows.clone())
    return coder


def sparsify(case: Case) -> Step:
    coder = sparse_coder(case)
    optimizer = fused_adam(coder.parameters())

    def step() -> None:
        optimizer.zero_grad()
        out = coder(case.x, dead_mask=case.dead)
        (out.fvu + AUX_COEFFICIENT * out.auxk_loss).backward()
        coder.set_decoder_norm_to_unit_norm()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()

    return step


def encoder_product(case: Case, dtype: torch.dtype) -> Step:
    x, W_enc = case.x.to(dtype), case.rows.to(dtype).T
    return lambda: x @ W_enc


def variants(case: Case) -> dict[str, Callable[[], Step]]:
    found = {
        "encoder product, float32": lambda: encoder_product(case, torch.float32),
        "encoder product, bfloat16": lambda: encoder_product(case, torch.bfloat16),
        "this package, float32": lambda: ours(case, certified=False),
        "this package, certified": lambda: ours(case, certified=True),
        "sae-lens TopK": lambda: sae_lens(case),
        "dense reference": lambda: dense_reference(case),
    }
    if has_sparsify():
        found["sparsify"] = lambda: sparsify(case)
    return found


def has_sparsify() -> bool:
    if find_spec("sparsify") is None:
        return False
    try:
        import sparsify  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def check_equality(case: Case) -> None:
    """Gradients on some vectors against autograd; all reconstructions against ours."""
    z = case.x[:128].unsqueeze(1)
    dense = case.parameters()
    losses = training_loss(z, dense[0].T, dense[1], dense[2], **case.loss_options())
    losses.loss.backward()
    for certified in (False, True):
        rows, W_dec, b_dec = case.parameters()
        W_enc = rows.detach().T
        step = training_step(
            z,
            W_enc,
            W_dec,
            b_dec,
            micro_batch_size=100,
            certified=certified,
            **case.loss_options(),
        )
        torch.testing.assert_close(step.loss.float(), losses.loss.detach())
        assert W_enc.grad is not None
        check_close(W_enc.grad.T, dense[0].grad, 1e-5)
        check_close(W_dec.grad, dense[1].grad, 1e-5)
        check_close(b_dec.grad, dense[2].grad, 1e-5)
    check_reconstructions(case)


@torch.no_grad()
def check_reconstructions(case: Case) -> None:
    bias = case.x.new_zeros(case.d_in)
    for certified in (False, True):
        acts = encode_topk(
            case.x,
            case.rows.T,
            bias,
            K,
            standardize_inputs=False,
            certified=certified,
        )
        x_hat = decode_topk(acts, case.rows, bias)
        check_close(x_hat, host_sae(case)(case.x), 1e-5)
        if has_sparsify():
            check_close(x_hat, sparse_coder(case)(case.x).sae_out, 1e-5)


def print_unproven(case: Case) -> None:
    """Print for how many vectors the certificate proves nothing."""
    rows, W_dec, b_dec = case.parameters()
    options = {
        **case.loss_options(),
        "certified": True,
        "micro_batch_size": case.n_vectors,
    }
    step = training_step(case.z, rows.detach().T, W_dec, b_dec, **options)
    of_dead = " and as many selections of dead latents" if case.dead_share else ""
    print(f"without proof: {step.n_unproven} of {len(case.x)} vectors{of_dead}")


def check_close(actual: Tensor | None, expected: Tensor | None, bound: float) -> None:
    assert actual is not None
    assert expected is not None
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error < bound:
        raise AssertionError(f"relative error {error:.1e} is not below {bound:.0e}")


def time_steps(
    case: Case, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each variant's steps, run alternately after one warm-up step."""
    steps = {name: make() for name, make in variants(case).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            synchronize()
            start = clock()
            step()
            synchronize()
            if turn > 0:
                times[name].append(clock() - start)
    return times


def peak_memory(name: str, sizes: Sizes) -> float:
    """Peak memory of the first step minus the memory before, in MiB."""
    expansion, dead_share, device, residuals, threads = sizes
    torch.set_num_threads(threads)
    case = Case(expansion, dead_share, device, residuals)
    step = variants(case)[name]()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_rss_mib(step)


def peak_memories(names: list[str], sizes: Sizes) -> list[float]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        arguments = [(name, sizes) for name in names]
        return pool.starmap(peak_memory, arguments, chunksize=1)


def report(case: Case, times: dict[str, list[float]], memory: dict[str, float]) -> None:
    print(f"\nz {list(case.z.shape)}, k {K}, d_sae {case.d_sae:,}, ", end="")
    print(f"{case.dead_share:.0%} dead, k_aux {K_AUX}; ms per step, {case.device}")
    print(f"{'':28}{'median':>8}{'min':>8}{'max':>8}{'/ product':>11}{'peak MiB':>10}")
    product = statistics.median(times["encoder product, float32"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = (median, min(seconds), max(seconds))
        numbers = "".join(f"{1e3 * s:8.0f}" for s in spread)
        peak = f"{memory[name]:10.0f}" if name in memory else f"{'-':>10}"
        print(f"{name:28}{numbers}{median / product:11.2f}{peak}")
    for other in ("sae-lens TopK", "sparsify", "dense reference"):
        if other in times:
            print_ratios(other, times)


def print_ratios(other: str, times: dict[str, list[float]]) -> None:
    """Print ratios of medians and of minima."""
    for name in ("this package, float32", "this package, certified"):
        medians = statistics.median(times[other]) / statistics.median(times[name])
        least = min(times[other]) / min(times[name])
        print(f"{other} / {name}: {medians:.1f} (minima: {least:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="R = 16 only")
    parser.add_argument("--large", action="store_true", help="add R = 256")
    parser.add_argument("--residuals", action="store_true", help="vectors of SmolLM2")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time instead of wall time"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_versions("torch", "sae-lens", "eai-sparsify")
    if not has_sparsify():
        print("sparsify cannot be imported and is skipped")
    cases = [(16, 0.0), (16, 0.3)]
    cases += [] if arguments.small else [(64, 0.0)]
    cases += [(256, 0.0)] if arguments.large else []
    for expansion, dead_share in cases:
        of_case = expansion, dead_share, arguments.device, arguments.residuals
        case = Case(*of_case)
        with announced(f"R {expansion}, {dead_share:.0%} dead: equality of results"):
            check_equality(case)
        print_unproven(case)
        repeats = arguments.repeats or (5 if arguments.small else 9)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        times = time_steps(case, repeats, clock)
        memory: dict[str, float] = {}
        if not arguments.small:
            names = list(times)
            sizes = (*of_case, arguments.threads)
            memory = dict(zip(names, peak_memories(names, sizes), strict=True))
        report(case, times, memory)


if __name__ == "__main__":
    main()
