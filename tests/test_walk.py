"""Runs from the middle of Hugging Face models and bridges of many architectures.

Reference: whole passes with PyTorch's or TransformerLens' hooks; and for padding, each
prompt alone. All models are small, random and built from Transformers' configurations.
"""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from conftest import D_VOCAB, tiny_model
from sae_lens.load_model import HookedProxyLM
from saes import random_sae
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.evaluation.splicing import (
    HookSplicer,
    ResidualSplicer,
    make_splicer,
)
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.walk import Alike, Walk, find_alike

N_LAYERS, N_POS = 4, 12
LLAMA = {"num_key_value_heads": 2, "head_dim": 8}
# The settings that differ from one family to the next, beside the common ones below.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Mistral": {**LLAMA, "sliding_window": 4},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": LLAMA,
    "Gemma2": {
        **LLAMA,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "final_logit_softcapping": 0.5,
        "attn_logit_softcapping": 0.5,
    },
    "Gemma3Text": {**LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "Phi": {},
    "Olmo2": {},
    "Falcon": {"multi_query": True},
    "Mixtral": {**LLAMA, "num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "Bloom": {},
}


def random_model(architecture: str, tokenizer: Any = None, **changes: Any) -> Any:
    """A random model of a family, whose embedding is not tiny beside its blocks."""
    config_class = getattr(transformers, f"{architecture}Config")
    common = {
        "num_hidden_layers": N_LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": D_VOCAB,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    config = config_class(**common | ARCHITECTURES[architecture] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Biases and norms are 0 and 1 otherwise, which hides what is left out.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return HookedProxyLM(model, tokenizer, [*block_names(model)])


def block_names(model: nn.Module) -> list[str]:
    names = ("model.layers", "gpt_neox.layers", "transformer.h", "model.decoder.layers")
    found = dict(model.named_modules())
    (name,) = (name for name in names if name in found)
    return [f"{name}.{i}" for i in range(N_LAYERS)]


def edits_of(n_layers: int) -> list[dict[int, Any]]:
    """One edit at each layer, and two at several layers."""

    def edit(layer: int, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(layer)
        return x + x.std() * torch.randn(x.shape, generator=generator)

    one = [{layer: partial(edit, layer)} for layer in range(n_layers)]
    return [*one, {0: one[0][0], 2: one[2][2]}, {1: one[1][1], 3: one[3][3]}]


@torch.no_grad()
def largest_difference(raw: Any, hook_names: list[str], tokens: Tensor) -> float:
    """Between the logits from the middle and those of whole passes with hooks."""
    model, edits = as_model(raw), edits_of(len(hook_names))
    joint = make_splicer(model, hook_names, max_prompts=8, from_middle=True)
    assert isinstance(joint, ResidualSplicer)
    everywhere = slice(0, None)
    ((clean, runs),) = joint.runs(tokens, edits)
    expected: dict[int, Tensor] = {}
    for whole, one in HookSplicer(model, hook_names).runs(tokens, edits):
        expected |= {i: run(everywhere) for i, run in one.items()}
        expected[-1] = whole(everywhere)
    found = {i: run(everywhere) for i, run in runs.items()}
    found[-1] = clean(everywhere)
    assert found.keys() == expected.keys()
    # The edits do something, else any logits would agree.
    assert all((expected[i] - expected[-1]).abs().max() > 1e-3 for i in runs)
    return max(float((found[i] - expected[i]).abs().max()) for i in expected)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, D_VOCAB, (3, N_POS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runs_from_the_middle_of_every_architecture(architecture, tokens):
    raw = random_model(architecture)
    names = block_names(raw.model)
    assert largest_difference(raw, names, tokens) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "trunk"), [("Llama", "model"), ("GPT2", "transformer")]
)
def test_runs_from_the_middle_of_a_model_spread_over_devices(
    architecture, trunk, tokens, tmp_path
):
    """By accelerate, as with `device_map`: every second block is on the disk."""
    raw = random_model(architecture)
    names = block_names(raw.model)
    main_device: Any = "cpu"
    devices: dict[str, Any]
    devices = {name: ("cpu", "disk")[i % 2] for i, name in enumerate(names)}
    others = [n for n, _ in raw.model.get_submodule(trunk).named_children()]
    devices |= {f"{trunk}.{n}": "cpu" for n in others if n not in ("layers", "h")}
    dispatch_model(
        raw.model,
        devices | {"lm_head": "cpu"},
        main_device=main_device,
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    assert next(raw.model.get_submodule(names[1]).parameters()).is_meta
    assert largest_difference(raw, names, tokens) < 1e-5


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each row, as bitsandbytes and GPTQ hold them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (linear.weight / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).T


def test_runs_from_the_middle_of_a_model_with_quantised_weights(tokens):
    raw = random_model("Llama")
    names = block_names(raw.model)
    for layer in raw.model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    assert largest_difference(raw, names, tokens) < 1e-5


BRIDGED = ["Llama", "GPT2", "Gemma2", "Gemma3Text", "Olmo2", "Falcon", "Mixtral"]


def bridge_of(architecture: str, tokenizer: Any, folder: Any) -> Any:
    """A bridge of a random model; `TransformerBridge` reads its configuration."""
    hf_model = random_model(architecture).model
    for module in hf_model.modules():
        module._forward_hooks.clear()
    hf_model.config.architectures = [type(hf_model).__name__]
    hf_model.config.save_pretrained(folder)
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=hf_model, tokenizer=tokenizer, device="cpu"
    )


@pytest.mark.parametrize("architecture", BRIDGED)
def test_runs_from_the_middle_of_a_bridge(architecture, tokens, tokenizer, tmp_path):
    bridge = bridge_of(architecture, tokenizer, tmp_path)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    assert largest_difference(bridge, names, tokens) < 1e-5


# The interface itself


def test_a_walk_runs_only_the_blocks_called_and_leaves_the_model_alone(tokens):
    raw = random_model("Gemma2")
    model, calls = as_model(raw), []
    before = list(raw.model.named_modules())
    assert model.walk_obstacle is None
    for i, layer in enumerate(raw.model.model.layers):
        original = layer.forward
        layer.forward = partial(record_call, calls, i, original)
    walk = model.walk(tokens)
    assert calls == []
    walk.run_block(walk.residual, 2)
    walk.logits(walk.residual)
    assert calls == [2]
    assert list(raw.model.named_modules()) == before


def record_call(calls: list[int], i: int, forward: Any, *args: Any, **kwargs: Any):
    calls.append(i)
    return forward(*args, **kwargs)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_gradients_from_the_middle_are_those_of_the_whole_pass(architecture, tokens):
    raw = random_model(architecture)
    model = as_model(raw)
    walk = model.walk(tokens)
    stream = walk.residual.detach().requires_grad_()
    after = stream
    for block in range(N_LAYERS):
        after = walk.run_block(after, block)
    walk.logits(after)[:, -1, 7].sum().backward()
    inputs: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> Any:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[0], *args[1:]), kwargs

    raw.model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    raw.model(tokens).logits[:, -1, 7].sum().backward()
    assert stream.grad is not None
    torch.testing.assert_close(stream.grad, inputs[0].grad)


@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Falcon"])
def test_residual_streams_are_the_hidden_states(architecture, tokens):
    raw = random_model(architecture)
    with torch.no_grad():
        streams, logits = as_model(raw).residual_streams(tokens)
        expected = raw.model(tokens, output_hidden_states=True)
    assert len(streams) == N_LAYERS + 1
    # The last one of Hugging Face is after the final norm.
    for found, state in zip(streams[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(found, state)
    torch.testing.assert_close(logits, expected.logits)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)]
)
def test_half_precision(dtype, tolerance, tokens):
    raw = random_model("Llama")
    raw.model.to(dtype)
    largest = raw.model(tokens).logits.abs().max()
    difference = largest_difference(raw, block_names(raw.model), tokens)
    assert difference < tolerance * largest


# Padding


@pytest.fixture
def left_tokenizer(tokenizer):
    """Its pad token is its BOS, as for GPT-2 and Pythia."""
    other = copy.deepcopy(tokenizer)
    other.padding_side, other.pad_token = "left", tokenizer.bos_token
    return other


@pytest.mark.parametrize("as_bridge", [False, True])
@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "OPT", "Gemma2", "GPTNeoX"])
@torch.no_grad()
def test_padding_on_the_left_is_masked(
    architecture, as_bridge, left_tokenizer, tmp_path
):
    """Reference: the padded prompt alone, in whole passes and from the middle."""
    if as_bridge:
        raw = bridge_of(architecture, left_tokenizer, tmp_path)
        raw.cfg.default_prepend_bos = False
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    else:
        raw = random_model(architecture, left_tokenizer)
        names = block_names(raw.model)
    model = as_model(raw)
    padded = torch.randint(1, D_VOCAB, (2, N_POS))
    padded[0, :5] = left_tokenizer.pad_token_id
    alone = padded[:1, 5:]
    expected = model.logits(alone)
    torch.testing.assert_close(
        model.logits(padded)[:1, 5:], expected, atol=1e-4, rtol=1e-4
    )
    (vectors,) = model.vectors(padded, names[2:3])
    (expected_vectors,) = model.vectors(alone, names[2:3])
    torch.testing.assert_close(vectors[:1, 5:], expected_vectors, atol=1e-4, rtol=1e-4)
    ((clean, _),) = make_splicer(model, names, 8, True).runs(padded, [])
    torch.testing.assert_close(
        clean(slice(5, None))[:1], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("make", [random_model, None])
def test_the_side_of_padding_does_not_matter_without_padding(make, left_tokenizer):
    """A prompt may start with the BOS, which is this tokenizer's pad token."""
    right_tokenizer = copy.deepcopy(left_tokenizer)
    right_tokenizer.padding_side = "right"
    prompts = torch.randint(1, D_VOCAB, (2, N_POS))
    prompts[0, 0] = left_tokenizer.bos_token_id
    found: list[Tensor] = []
    for one in (right_tokenizer, left_tokenizer):
        raw: Any = random_model("Llama", one) if make else tiny_model(one)
        name = block_names(raw.model)[1] if make else "blocks.1.hook_resid_post"
        with torch.no_grad():
            found.append(as_model(raw).vectors(prompts, [name])[0])
    torch.testing.assert_close(found[0], found[1])


# Whole passes instead


def leave_state(model: Any) -> None:
    """Each block adds what the block before it got, without being called with it."""
    held: list[Tensor] = []

    def before(_: Any, args: Any) -> Any:
        held.append(args[0])
        same = len(held) > 1 and held[-2].shape == args[0].shape
        return (args[0] + (0.1 * held[-2] if same else 0), *args[1:])

    before.__module__ = "transformers.made_up"
    for layer in model.layers:
        layer.register_forward_pre_hook(before)


def mix_prompts(model: Any) -> None:
    """As quantised activations do, whose scale is that of the batch."""

    def after(_: Any, __: Any, output: Any) -> Any:
        return output * (1 + 0.1 * output.abs().max())

    after.__module__ = "transformers.made_up"
    model.layers[1].register_forward_hook(after)


def hide_blocks(model: Any) -> None:
    layers = model.layers
    model.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})
    model.layers.__class__ = type(
        "Blocks", (nn.ModuleDict,), {"__getitem__": lambda *_: list(layers)}
    )


def treat_one_prompt(model: Any) -> None:
    def after(_: Any, __: Any, output: Any) -> Any:
        return torch.cat([2 * output[:1], output[1:]])

    model.layers[1].register_forward_hook(after)


def compile_it(model: Any) -> None:
    """What `model.compile()` does, which takes half a minute."""
    model._compiled_call_impl = model._call_impl


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (leave_state, "block . gives other vectors"),
        (mix_prompts, "block 1 gives other vectors"),
        (hide_blocks, "has no list of 4 modules"),
        (treat_one_prompt, r"hooks of its user at .*layers\.1"),
        (compile_it, "called 0 of its 4 blocks"),
    ],
)
def test_a_model_that_cannot_start_in_the_middle_takes_whole_passes(
    change, reason, tokens, caplog
):
    raw = random_model("Llama")
    names = block_names(raw.model)
    change(raw.model.model)
    model = as_model(raw)
    with caplog.at_level(logging.WARNING):
        splicer = make_splicer(model, names, 8, None)
    assert isinstance(splicer, HookSplicer)
    assert "whole forward pass" in caplog.text
    with pytest.raises(ValueError, match=reason):
        make_splicer(model, names, 8, True)
    assert torch.isfinite(model.logits(tokens)).all()


def test_hooks_on_a_hook_point_take_whole_passes(tokenizer, tokens):
    model: Any = tiny_model(tokenizer)
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert isinstance(make_splicer(as_model(model), names, 8, None), HookSplicer)
    model.reset_hooks()
    assert isinstance(make_splicer(as_model(model), names, 8, None), ResidualSplicer)


if __name__ == "__main__":
    for name in ARCHITECTURES:
        raw = random_model(name)
        prompts = torch.randint(1, D_VOCAB, (3, N_POS))
        difference = largest_difference(raw, block_names(raw.model), prompts)
        print(f"{name:12} {difference:.1e}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer_range", [0.1, 0.3])
def test_ablated_runs_of_blocks_that_read_the_tokens_again_keep_their_prompts(
    dtype, initializer_range
):
    """Zamba 2's blocks take the embeddings; reference: whole passes."""
    config = transformers.Zamba2Config(
        vocab_size=D_VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        mamba_d_state=8,
        n_mamba_heads=2,
        mamba_ngroups=1,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"],
        adapter_rank=4,
        initializer_range=initializer_range,
        pad_token_id=0,
    )
    hf_model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert_ablation_is_that_of_whole_passes(
        hf_model, Alike(prompts=False, positions=False)
    )


def test_ablated_runs_of_softmax_attention_need_one_position():
    hf_model = random_model("Llama").model
    assert_ablation_is_that_of_whole_passes(
        hf_model, Alike(prompts=True, positions=True)
    )


def assert_ablation_is_that_of_whole_passes(hf_model: Any, alike: Alike) -> None:
    names = ["model.layers.0", "model.layers.1"]
    no_tokenizer: Any = None
    model = as_model(HookedProxyLM(hf_model, no_tokenizer, names))
    assert model.walk_obstacle is None
    assert model.alike == alike
    tokens = torch.randint(1, D_VOCAB, (3, N_POS))
    sae = random_sae(d_in=model.shape.d_model)
    sae.cfg.metadata.hook_names = names
    for ablation in ("zero", "mean"):
        found, expected = (
            evaluate(
                sae, model.module, tokens, from_middle=from_middle, ablation=ablation
            ).ce_loss_ablated
            for from_middle in (True, False)
        )
        rtol = 1e-6 if hf_model.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


class NoisyWalk(Walk):
    """Each position has its own relative error of `scale` epsilons of float32."""

    def __init__(self, scale: float) -> None:
        self.residual = torch.zeros(2, N_POS, 8)
        self._error = torch.linspace(0, scale * 2.0**-23, N_POS).unsqueeze(1)

    def run_block(self, stream: Tensor, block: int) -> Tensor:
        return stream * (1 + self._error)

    def logits(self, stream: Tensor) -> Tensor:
        return stream


@pytest.mark.parametrize(("n_eps", "is_rounding"), [(16, True), (64, False)])
def test_positions_are_alike_up_to_rounding(n_eps, is_rounding):
    """Products of 1,536 float32 terms in SmolLM2 differ by up to 8 epsilons."""
    assert find_alike(NoisyWalk(n_eps), 1) == Alike(True, is_rounding)


@pytest.mark.parametrize("n_key_value_heads", [None, 1])
@pytest.mark.parametrize("gated_mlp", [False, True])
def test_a_walk_lays_out_the_weights_of_a_hooked_transformer_once(
    n_key_value_heads, gated_mlp, tokens
):
    """Reference: the whole pass. Hooks run; the model and its gradients are its own."""
    config = {"n_key_value_heads": n_key_value_heads, "gated_mlp": gated_mlp}
    config |= {"n_ctx": N_POS, "d_vocab": D_VOCAB, "act_fn": "relu", "d_mlp": 24}
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8}
    model: Any = HookedTransformer(HookedTransformerConfig(**sizes, **config))
    places = {name: x.data_ptr() for name, x in model.named_parameters()}
    walk: Any = as_model(model).walk(tokens)
    seen: list[Tensor] = []
    for point in (model.blocks[1].attn.hook_z, model.unembed.hook_out):
        point.add_hook(lambda x, hook: seen.append(x))
    stream = walk.residual
    for block in (0, 1):
        stream = walk.run_block(stream, block)
    attn, mlp = walk._with_block.blocks[1].attn, walk._with_block.blocks[1].mlp
    logits = walk.logits(stream)
    assert len(seen) == 2
    assert torch.equal(logits, model(tokens))
    logits.sum().backward()
    weights = dict(model.named_parameters())
    assert {name: x.data_ptr() for name, x in weights.items()} == places
    assert all(x.grad is not None for name, x in weights.items() if "W_" in name)
    copied = [walk._head.unembed.W_U.T, attn.W_Q.mT, attn.W_O.permute(2, 0, 1)]
    assert all(x.is_contiguous() for x in copied)
    assert mlp.W_in.T.is_contiguous() == gated_mlp


def test_ablated_runs_of_blocks_that_count_positions_keep_their_positions():
    """Attention sinks take a share that falls with the position; as above."""
    config = transformers.GptOssConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "full_attention"],
        initializer_range=0.3,
    )
    hf_model = AutoModelForCausalLM.from_config(config).eval()
    assert_ablation_is_that_of_whole_passes(
        hf_model, Alike(prompts=True, positions=False)
    )
