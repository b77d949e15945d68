"""Models of Hugging Face transformers, random and small, against the reference. Nothing is downloaded."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvfunc import BatchGrad, BatchL2, DiagGGN, compute, functionalize, reference

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # what another library warns of is not ours

SMALL = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
WORDS = {"vocab_size": 7, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 7, shape)


def padded() -> dict[str, Tensor]:
    mask = (torch.arange(4) < torch.tensor([4, 2, 3])[:, None]).long()
    return {"input_ids": ids(3, 4) * mask, "attention_mask": mask}


def gpt2() -> tuple[nn.Module, Any]:
    sizes = {"n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 8}
    config = transformers.GPT2Config(vocab_size=7, **sizes, use_cache=False, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids(3, 3)}


def bert() -> tuple[nn.Module, Any]:
    config = transformers.BertConfig(**SMALL, **WORDS, num_labels=3)
    return transformers.BertForSequenceClassification(config), padded()


def vit() -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(**SMALL, image_size=4, patch_size=2, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 1, 4, 4).double()}


def llama() -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=1, use_cache=False)
    return transformers.LlamaForCausalLM(config), padded()


def t5() -> tuple[nn.Module, Any]:
    sizes = {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    words = {"vocab_size": 7, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = transformers.T5Config(**sizes, **words, relative_attention_num_buckets=4, use_cache=False)
    return transformers.T5ForConditionalGeneration(config), {**padded(), "decoder_input_ids": ids(3, 2)}


def mamba() -> tuple[nn.Module, Any]:
    sizes = {"hidden_size": 4, "state_size": 2, "num_hidden_layers": 1, "expand": 1, "time_step_rank": 2}
    config = transformers.MambaConfig(vocab_size=7, **sizes, use_cache=False, pad_token_id=0)
    return transformers.MambaForCausalLM(config), {"input_ids": ids(3, 3)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {f.__name__: f for f in (gpt2, bert, vit, llama, t5, mamba)}
models = pytest.mark.parametrize("name", MODELS)

# Parts of some are written in float32 whatever the model's own type: the squares of RMSNorm, all of Mamba's recurrence.
# Forward passes on the batch and on each sample then differ by its rounding.
TOLERANCE = {"gpt2": 1e-10, "bert": 1e-10, "vit": 1e-10, "llama": 1e-6, "t5": 1e-6, "mamba": 1e-5}


def logits(out: Any) -> Tensor:
    """Classes on axis 1, where cross-entropy wants them."""
    return out.logits.transpose(1, 2) if out.logits.ndim == 3 else out.logits


@cache
def problem(name: str) -> tuple[Any, dict[str, Tensor], Any, Tensor]:
    torch.manual_seed(0)
    module, X = MODELS[name]()
    module = module.to(torch.float32 if name == "mamba" else torch.float64).eval()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
        shape = logits(module(**X)).shape
    model_fn, params = functionalize(module, logits)
    return model_fn, params, X, torch.randint(shape[1], (shape[0], *shape[2:]))


def close(name: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal up to the tolerance times each leaf's norm, or to rounding of the largest leaf.

    The latter because the bias of a key has no influence on attention: its gradient is rounding.
    """
    largest = max(w.norm() for w in want.values())
    rounding = largest * TOLERANCE[name] * 1e-4
    for leaf, w in want.items():
        assert got[leaf].shape == w.shape
        error = (got[leaf] - w).norm()
        assert error <= TOLERANCE[name] * w.norm() + rounding, f"{leaf}: error {error:.1e} of {w.norm():.1e}"


@models
def test_first_order(name: str) -> None:
    model_fn, params, X, y = problem(name)
    grads, norms = compute(model_fn, params, X, y, (BatchGrad(), BatchL2()))
    want = reference.batch_grad(model_fn, params, X, y)
    close(name, grads, want)
    close(name, norms, {k: g.reshape(len(g), -1).square().sum(1) for k, g in want.items()})


@models
def test_diag_ggn(name: str) -> None:
    model_fn, params, X, y = problem(name)
    close(name, compute(model_fn, params, X, y, DiagGGN()), reference.diag_ggn(model_fn, params, X, y))
