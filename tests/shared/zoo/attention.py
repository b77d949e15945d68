"""Transformers, and what mixes tokens in their place."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import architecture, classes, noise

Made = tuple[nn.Module, object, Tensor]


class Attention(nn.Module):
    """Self-attention (Vaswani et al. 2017) with packed projections and torch's fused kernel."""

    def __init__(self, d: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, d = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(d, dim=-1))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(h.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """Attention and MLP behind norms, each beside the identity."""

    def __init__(self, d: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches as tokens, a class token in front, learned positions (Dosovitskiy et al. 2021)."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, d, 2, 2)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 5, d))
        self.blocks, self.norm, self.head = nn.Sequential(Block(d, 2), Block(d, 2)), nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


@architecture("vit")
def _() -> Made:
    return ViT(), noise(4, 1, 4, 4), classes(4, 3)


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each relative position (Liu et al. 2021)."""

    def __init__(self, d: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, math.sqrt(heads / d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.bias = nn.Parameter(torch.zeros(2 * window - 1, heads))
        self.register_buffer("index", torch.arange(window)[:, None] - torch.arange(window) + window - 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.scale
        bias = self.bias[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        h = (scores + bias.unsqueeze(0)).softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(b, t, d))


class Swin(nn.Module):
    """Windows of the sequence are folded into the batch, shifted the second time."""

    def __init__(self, d: int = 4, window: int = 2) -> None:
        super().__init__()
        self.window, self.embed = window, nn.Linear(2, d)
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.layers = nn.ModuleList([WindowAttention(d, 2, window), WindowAttention(d, 2, window)])
        self.merge, self.head = nn.Linear(2 * d, d, bias=False), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, d = x.shape
        for shift, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            windows = norm(x).roll(-shift, dims=1).view(n * t // self.window, self.window, d)
            x = x + layer(windows).view(n, t, d).roll(shift, dims=1)
        x = self.merge(torch.cat([x[:, 0::2], x[:, 1::2]], dim=-1))
        return self.head(x.mean(1))


@architecture("swin_windows_in_the_batch")
def _() -> Made:
    return Swin(), noise(4, 4, 2), classes(4, 3)


class MixerBlock(nn.Module):
    """An MLP over tokens, an MLP over channels (Tolstikhin et al. 2021).

    The former ends without bias: what it adds to all channels alike the norms would take away again.
    """

    def __init__(self, tokens: int, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.tokens = nn.Sequential(nn.Linear(tokens, 5), nn.GELU(), nn.Linear(5, tokens, bias=False))
        self.channels = nn.Sequential(nn.Linear(d, 6), nn.GELU(), nn.Linear(6, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches, blocks, mean over tokens. As many tokens as channels as samples: sizes do not tell the axes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(1, 4, 2, 2), nn.Sequential(MixerBlock(4, 4), MixerBlock(4, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT)).mean(1))


@architecture("mlp_mixer")
def _() -> Made:
    return Mixer(), noise(4, 1, 4, 4), classes(4, 4)


class GPT(nn.Module):
    """Causal language model whose head is the embedding (Radford et al. 2019); position ids of batch size 1."""

    def __init__(self, vocabulary: int = 5, d: int = 4, length: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks, self.norm = nn.ModuleList([Block(d, 2, causal=True) for _ in range(2)]), nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


@architecture("gpt_tied_head")
def _() -> Made:
    return GPT(), classes(3, 5, 3), classes(3, 5, 3)


class BERT(nn.Module):
    """Encoder with token types, a padding mask and a pooler (Devlin et al. 2019)."""

    def __init__(self, vocabulary: int = 6, d: int = 4) -> None:
        super().__init__()
        self.tokens, self.types = nn.Embedding(vocabulary, d, padding_idx=0), nn.Embedding(2, d)
        self.positions, self.norm = nn.Parameter(torch.zeros(8, d)), nn.LayerNorm(d)
        self.blocks = nn.ModuleList([Block(d, 2), Block(d, 2)])
        self.pooler, self.head = nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.types(token_type_ids) + self.positions[: input_ids.shape[1]]
        x, mask = self.norm(x), attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


@architecture("bert_padding_mask")
def _() -> Made:
    lengths = torch.tensor([4, 2, 3, 4])
    mask = (torch.arange(4) < lengths[:, None]).long()
    ids = (1 + classes(4, 5, 4)) * mask
    return BERT(), {"input_ids": ids, "token_type_ids": classes(4, 2, 4), "attention_mask": mask}, classes(4, 2)


class Translator(nn.Module):
    """torch's own encoder and decoder, sequence first or batch first, with causal and padding masks."""

    def __init__(self, batch_first: bool, norm_first: bool, d: int = 4) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.source, self.target = nn.Embedding(5, d), nn.Embedding(5, d)
        options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
        encoder = nn.TransformerEncoderLayer(d, 2, 6, **options)
        encoder = nn.TransformerEncoder(encoder, 1, nn.LayerNorm(d), enable_nested_tensor=False)
        self.transformer = nn.Transformer(d, 2, 1, 1, 6, **options, custom_encoder=encoder)
        self.head = nn.Linear(d, 5)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        s, t = self.source(source), self.target(target)
        if not self.batch_first:
            s, t = s.transpose(0, 1), t.transpose(0, 1)
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        h = self.transformer(s, t, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        h = self.head(h)
        return h.transpose(1, 2) if self.batch_first else h.permute(1, 2, 0)


def translation() -> tuple[dict[str, Tensor], Tensor]:
    padding = torch.arange(4) >= torch.tensor([4, 3, 2])[:, None]
    return {"source": classes(3, 5, 4), "target": classes(3, 5, 3), "padding": padding}, classes(3, 5, 3)


@architecture("encoder_decoder_batch_first", train=True)
def _() -> Made:
    return Translator(batch_first=True, norm_first=True), *translation()


@architecture("encoder_decoder_sequence_first", train=True)
def _() -> Made:
    return Translator(batch_first=False, norm_first=False), *translation()


class Encoder(nn.Module):
    """torch's encoder layers in evaluation mode, where they have a fused path of their own."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 2, 6, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


@architecture("transformer_encoder_in_evaluation_mode")
def _() -> Made:
    return Encoder(), noise(3, 3, 4), classes(3, 3)


class CrossAttention(nn.Module):
    """Learned queries read a sequence (Perceiver, Jaegle et al. 2021) by `nn.MultiheadAttention`, bias_k and all."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(2, d))
        self.read = nn.MultiheadAttention(d, 2, kdim=3, vdim=3, add_bias_kv=True, batch_first=True)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(2 * d, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        queries = self.latents.unsqueeze(0).repeat(len(x), 1, 1)
        h = queries + self.read(queries, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.head(self.norm(h).flatten(1))


@architecture("cross_attention_of_latents")
def _() -> Made:
    padding = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    return CrossAttention(), (noise(3, 5, 3), padding), classes(3, 3)


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, gated MLP (Touvron et al. 2023); no biases."""

    def __init__(self, d: int = 4, vocabulary: int = 5) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, d), nn.Linear(d, vocabulary, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(d, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(d, n, bias=False) for n in (d, d // 2, d // 2, d))
        self.gate, self.up, self.down = (nn.Linear(*n, bias=False) for n in ((d, 6), (d, 6), (6, d)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        n, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(n, t, -1, d // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        h = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm3(x)).movedim(2, 1)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [n, h, t, 2]."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([x[..., 0] * cos - x[..., 1] * sin, x[..., 1] * cos + x[..., 0] * sin], dim=-1)


@architecture("llama")
def _() -> Made:
    return Llama(), classes(4, 5, 4), classes(4, 5, 4)
