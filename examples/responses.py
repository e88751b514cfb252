"""What each part of a small transformer has learned: modular addition, from a record of its draws.

Trains a transformer of two layers on a + b mod 11 and samples its local posterior: the whole
network, its layers at three checkpoints, and each of its eight heads. Prints learning coefficients,
and how much of its influence each pair has with its mirror image b + a; writes
`responses_susceptibilities.png`, `responses_influence.png` and `responses_traces.png`. Takes about
two minutes on two cores.
"""

import time
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.components import Component
from funcsgmcmc.runs.restricted import sample_components

MODULUS, WIDTH, HEADS, LAYERS = 11, 24, 4, 2
CHECKPOINTS = (40, 100, 600)


class Block(nn.Module):
    """Attention and an MLP, each added to the stream that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, stream: Tensor) -> Tensor:
        """The stream `[b, 2, width]` after both."""
        shape = (*stream.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (
            part(stream).reshape(shape).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        stream = stream + self.output((weights @ value).transpose(1, 2).reshape(stream.shape))
        return stream + self.mlp(stream)


class Adder(nn.Module):
    """A transformer that reads two numbers, and gives logits of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Embedding(MODULUS, WIDTH)
        self.places = nn.Parameter(torch.randn(2, WIDTH) / WIDTH**0.5)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.sums = nn.Linear(WIDTH, MODULUS, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits `[b, modulus]` of pairs `[b, 2]`."""
        stream = self.numbers(pairs) + self.places
        for block in self.blocks:
            stream = block(stream)
        return self.sums(stream[:, -1])


def head(layer: int, index: int) -> Component:
    """The rows of a head's queries, keys and values, and the columns of its output."""
    size = WIDTH // HEADS
    rows = slice(index * size, (index + 1) * size)
    inputs: dict[str, slice | tuple[slice, ...]] = {
        f"blocks.{layer}.{part}.weight": rows for part in ("query", "key", "value")
    }
    return inputs | {f"blocks.{layer}.output.weight": (slice(None), rows)}


def train(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[int, TensorDict]:
    """Train on all pairs; the parameters at the checkpoints."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CHECKPOINTS[-1])
    kept = {}
    for step in range(1, CHECKPOINTS[-1] + 1):
        optimizer.zero_grad()
        cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
        schedule.step()
        if step in CHECKPOINTS:
            kept[step] = fs.params_of(model)
    return kept


def main() -> None:
    torch.manual_seed(0)
    start = time.perf_counter()
    numbers = torch.arange(MODULUS)
    pairs = torch.cartesian_prod(numbers, numbers)
    data = (pairs, pairs.sum(1) % MODULUS)
    model = Adder()
    checkpoints = train(model, data)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    loss = fs.module_loss(model, cross_entropy)
    losses = fs.losses_on(fs.module_loss(model, partial(cross_entropy, reduction="none")), data)
    settings = {"num_chains": 4, "num_burnin_steps": 150, "batch_size": 64, "key": fs.key(0)}
    sampler = fs.sgld(5e-4, nbeta=fs.default_nbeta(len(pairs)), localization=300.0)

    parts = {"whole": None, "embedding": "numbers.*", "layer 0": "blocks.0.*"}
    parts |= {"layer 1": "blocks.1.*", "output": "sums.*"}
    print("\n| step | loss | " + " | ".join(parts) + " |\n|" + "---|" * (len(parts) + 2))
    for step, params in checkpoints.items():
        runs = sample_components(loss, params, data, sampler, parts, num_draws=150, **settings)
        cells = [f"{each.mean:.2f} ± {each.error:.2f}" for each in map(fs.llc, runs.values())]
        print(
            f"| {step} | {float(loss(params, data)):.4f} | " + " | ".join(cells) + " |", flush=True
        )

    params = checkpoints[CHECKPOINTS[-1]]
    heads: dict[str, Component | None] = {"full": None}
    heads |= {f"head {i}.{j}": head(i, j) for i in range(LAYERS) for j in range(HEADS)}
    runs = sample_components(
        loss, params, data, sampler, heads, num_draws=300, observables={"pairs": losses}, **settings
    )
    by_sum = data[1].argsort(stable=True)
    found = fs.susceptibilities(runs, "pairs")
    print(f"\nsusceptibilities: {found}")
    ordered = fs.response.Response(
        found.values[:, by_sum],
        found.mcse[:, by_sum],
        found.num_chains,
        found.num_frozen,
        found.components,
    )
    fs.plots.plot_susceptibilities(ordered).savefig("responses_susceptibilities.png", dpi=120)

    correlations = fs.influence(runs["full"], "pairs", normalized=True)
    print(f"influence of pairs on each other: {correlations}")
    fs.plots.plot_influence(correlations, by_sum).savefig("responses_influence.png", dpi=120)
    mirror = pairs[:, 1] * MODULUS + pairs[:, 0]
    others = correlations.values[pairs[:, 0] != pairs[:, 1]]
    swapped = mirror[pairs[:, 0] != pairs[:, 1]]
    with_mirror = others.gather(1, swapped[:, None]).mean()
    same = (data[1][:, None] == data[1]) & ~torch.eye(len(pairs), dtype=torch.bool)
    print(
        f"mean correlation of a + b with b + a {float(with_mirror):.3f}, with pairs of the same "
        f"sum {float(correlations.values[same].mean()):.3f}, of another "
        f"{float(correlations.values[data[1][:, None] != data[1]].mean()):.3f}"
    )
    fs.plots.plot_traces(runs["full"], "pairs", [1, MODULUS, 5]).savefig(
        "responses_traces.png", dpi=120
    )
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
