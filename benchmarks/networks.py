"""The networks that the benchmarks sample, with a batch for each."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Workload:
    """A network with its data, and how many chains sample it.

    Attributes:
        title: What it is.
        make: Makes the network, the same at every call.
        batch: One minibatch.
        chains: C.
        sizes: Widths of a multilayer perceptron, for peers that build their own; None else.
    """

    title: str
    make: Callable[[], nn.Module]
    batch: tuple[Tensor, Tensor]
    chains: int
    sizes: tuple[int, ...] | None = None

    def on(self, device: torch.device) -> Self:
        """The same on a device."""
        inputs, targets = self.batch
        batch = (inputs.to(device), targets.to(device))
        return replace(self, make=lambda: self.make().to(device), batch=batch)

    def with_chains(self, chains: int) -> Self:
        """The same for another number of chains."""
        return replace(self, chains=chains)


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes along the last dimension."""
    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


def perceptron(sizes: tuple[int, ...]) -> nn.Module:
    """A fully connected network with ReLU between its layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Module:
    """Two convolutions and a linear layer on 1 × 28 × 28."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 25, 10),
    )


class Block(nn.Module):
    """Causal attention and a perceptron, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("future", torch.ones(length, length).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], 3, self.heads, x.shape[-1] // self.heads)
        query, key, value = self.mix(self.norms[0](x)).view(shape).permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(self.future, -torch.inf).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """A decoder-only transformer on tokens."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, length) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.register_buffer("places", torch.arange(length))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place(self.places))))


def transformer() -> nn.Module:
    """Two layers of width 64, 64 tokens, 32 places."""
    torch.manual_seed(0)
    return Transformer(vocabulary=64, width=64, layers=2, heads=4, length=32)


def vectors(sizes: tuple[int, ...], examples: int) -> tuple[Tensor, Tensor]:
    """Random inputs and labels for a perceptron."""
    return torch.randn(examples, sizes[0]), torch.randint(sizes[-1], (examples,))


def _perceptron(name: str, sizes: tuple[int, ...], chains: int, examples: int) -> Workload:
    title = f"{name}: MLP {'-'.join(map(str, sizes))}, {chains} chains, batch {examples}"
    return Workload(title, lambda: perceptron(sizes), vectors(sizes, examples), chains, sizes)


torch.manual_seed(1)
WORKLOADS = {
    "A": _perceptron("A", (64, 128, 128, 10), 32, 64),
    "B": _perceptron("B", (64, 512, 512, 10), 8, 64),
    "C": _perceptron("C", (64, 64, 10), 64, 128),
    "D": Workload(
        "D: convnet on 1 x 28 x 28, 16 chains, batch 32",
        convnet,
        (torch.randn(32, 1, 28, 28), torch.randint(10, (32,))),
        16,
    ),
    "E": Workload(
        "E: transformer, 2 layers of width 64, 8 chains, batch 8 x 32",
        transformer,
        (torch.randint(64, (8, 32)), torch.randint(64, (8, 32))),
        8,
    ),
}
