"""Small models of one's own to insert into, for tests."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import GATES, MIXERS
from torch import nn

from vision_attn.layout import Residual

BLOCKS = [GATES[0], MIXERS[0]]


def layers(model) -> dict[str, Residual]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Residual)}


class Gives(nn.Module):
    """What ``function`` makes of a map."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Host(nn.Module):
    """A convolution, a place behind it, and an answer; ``size`` is the only one it takes, None: any."""

    def __init__(self, function=lambda x: x, channels=12, size=None, stride=4):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, channels, stride, stride)
        self.place = Gives(function)

    def forward(self, x):
        if self.size and tuple(x.shape[-2:]) != self.size:
            raise RuntimeError(f"takes {self.size} only")
        out = self.place(self.conv(x))
        return (out if isinstance(out, torch.Tensor) else out[0]).flatten(1).mean(1)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


class PatchEmbeddings(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.projection = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.projection(x).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    def __init__(self, dim, patch, image_size, prefix):
        super().__init__()
        self.grid = image_size // patch
        self.cls_token = nn.Parameter(torch.randn(1, prefix, dim))
        self.position_embeddings = nn.Parameter(torch.randn(1, prefix + self.grid**2, dim))
        self.patch_embeddings = PatchEmbeddings(dim, patch)
        self.image_size, self.patch, self.prefix = image_size, patch, prefix

    def forward(self, x, interpolate_pos_encoding):
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embeddings(x)], dim=1)
        if not interpolate_pos_encoding:
            assert x.shape[2:] == (self.image_size, self.image_size), "Input image size doesn't match model"
            return tokens + self.position_embeddings
        first, table = self.position_embeddings.split([self.prefix, self.grid**2], dim=1)
        table = table.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        table = F.interpolate(table, (x.shape[2] // self.patch, x.shape[3] // self.patch), mode="bicubic")
        return tokens + torch.cat([first, table.flatten(2).transpose(1, 2)], dim=1)


class QueriesKeysValues(nn.Module):
    def __init__(self, dim, heads, bias, dropout):
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, head_mask=None, output_attentions=False):
        q, k, v = (
            part(x).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        weights = self.dropout((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1))
        out = (weights @ v).transpose(1, 2).flatten(2)
        return (out, weights) if output_attentions else (out,)


class Dense(nn.Module):
    def __init__(self, dim_in, dim, dropout=0.0):
        super().__init__()
        self.dense, self.dropout = nn.Linear(dim_in, dim), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.dense(x))


class JoinedAttention(nn.Module):
    def __init__(self, dim, heads, bias, dropout, in_tuple):
        super().__init__()
        self.attention = QueriesKeysValues(dim, heads, bias, dropout)
        self.output = Dense(dim, dim, dropout)
        self.in_tuple = in_tuple

    def forward(self, x, head_mask=None, output_attentions=False):
        out, *weights = self.attention(x, head_mask, output_attentions)
        return (self.output(out), *weights) if self.in_tuple else self.output(out)


class Layer(nn.Module):
    def __init__(self, dim, heads, bias, dropout, in_tuple):
        super().__init__()
        self.attention = JoinedAttention(dim, heads, bias, dropout, in_tuple)
        self.intermediate, self.output = Dense(dim, 2 * dim), Dense(2 * dim, dim)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.in_tuple = in_tuple

    def forward(self, x, head_mask=None, output_attentions=False):
        out = self.attention(self.layernorm_before(x), head_mask, output_attentions=output_attentions)
        x = x + (out[0] if self.in_tuple else out)
        x = x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))
        return (x, *out[1:]) if self.in_tuple else x


class Encoder(nn.Module):
    def __init__(self, depth, **layer):
        super().__init__()
        self.layer = nn.ModuleList(Layer(**layer) for _ in range(depth))

    def forward(self, x, run):
        for layer in self.layer:
            out = run(layer, x)
            x = out[0] if isinstance(out, tuple) else out
        return dict(last_hidden_state=x)


class JoinedViT(nn.Module):
    """Laid out as the ViT, DeiT and DINOv2 of Hugging Face's transformers before version 5.

    ``in_tuple``: its layers and their attention give tuples, as up to 4.55.
    """

    def __init__(self, depth=2, image_size=28, prefix=1, in_tuple=True, bias=True, dropout=0.0):
        super().__init__()
        self.config = SimpleNamespace(image_size=image_size)
        self.embeddings = Embeddings(48, 4, image_size, prefix)
        self.encoder = Encoder(depth, dim=48, heads=3, bias=bias, dropout=dropout, in_tuple=in_tuple)
        self.layernorm = nn.LayerNorm(48)
        self.classifier = nn.Linear(48, 7)

    @staticmethod
    def run(layer, x):
        return layer(x)

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        x = self.embeddings(pixel_values, interpolate_pos_encoding)
        x = self.layernorm(self.encoder(x, self.run)["last_hidden_state"])
        return dict(logits=self.classifier(x[:, 0]), last_hidden_state=x)
