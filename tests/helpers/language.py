"""A small causal language model, and a language for it: words that follow others, and some that follow none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.between(x))


class LanguageModel(nn.Module):
    """Logits (N, T, V) of the next word at each position, of two layers."""

    def __init__(self, num_words: int, *, width: int = 32, length: int = 32, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words, self.places = nn.Embedding(num_words, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_words)

    def from_embeddings(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x + self.places.weight[: x.shape[1]])))

    def forward(self, ids: Tensor) -> Tensor:
        return self.from_embeddings(self.words(ids))


def texts(count: int, length: int, num_words: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Ids (count, length), and the next words."""
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(num_words, (num_words, 4), generator=torch.Generator().manual_seed(0))
    frequencies = 1 / torch.arange(1.0, num_words + 1)
    ids = torch.multinomial(frequencies, count * (length + 1), replacement=True, generator=generator)
    ids = ids.view(count, length + 1)
    follows = torch.rand(count, length, generator=generator) < 0.8
    which = torch.randint(4, (count, length), generator=generator)
    for t in range(length):
        ids[:, t + 1] = torch.where(follows[:, t], followers[ids[:, t], which[:, t]], ids[:, t + 1])
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def train(model: LanguageModel, steps: int, *, length: int, num_words: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids, words = texts(16, length, num_words, seed=1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).transpose(1, 2), words).backward()
        optimizer.step()
