"""The learning coefficient over training: a small transformer that learns to add modulo 11.

Keeps eight checkpoints of its training, samples all of them at two step sizes in one run, prints a
table with error and verdict for each, and writes `over_training.png`. Takes about two minutes.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs

P, WIDTH, HEADS = 11, 24, 4
CHECKPOINTS = (20, 50, 100, 150, 200, 300, 600, 1200)


class Transformer(nn.Module):
    """One layer of attention and a perceptron on the tokens a, b, =, read at the last."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(P + 1, WIDTH), nn.Embedding(3, WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, P)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight
        shape = (*x.shape[:-1], 3, HEADS, WIDTH // HEADS)
        query, key, value = self.mix(x).view(shape).permute(2, 0, 3, 1, 4).unbind()
        weights = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return self.head((x + self.down(torch.relu(self.up(x))))[:, -1])


def problem() -> tuple[Tensor, Tensor]:
    """Every pair of numbers with =, and their sum modulo P."""
    first, second = torch.cartesian_prod(torch.arange(P), torch.arange(P)).unbind(1)
    return torch.stack([first, second, torch.full_like(first, P)], 1), (first + second) % P


def train(model: nn.Module, tokens: Tensor, sums: Tensor) -> dict[str, TensorDict]:
    """Minimize the cross-entropy, and keep checkpoints."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    kept = {}
    for step in range(1, CHECKPOINTS[-1] + 1):
        optimizer.zero_grad()
        cross_entropy(model(tokens), sums).backward()
        optimizer.step()
        if step in CHECKPOINTS:
            kept[f"step {step}"] = fs.params_of(model)
    return kept


def main() -> None:
    torch.manual_seed(0)
    tokens, sums = problem()
    model = Transformer()
    checkpoints = train(model, tokens, sums)
    swept = fs.sweep(
        fs.module_loss(model, cross_entropy),
        fs.params_of(model),
        (tokens, sums),
        fs.baoa,
        grid={
            "checkpoint": {name: {"params": params} for name, params in checkpoints.items()},
            "lr": [0.012, 0.02],
            "nbeta": fs.default_nbeta(len(sums)),
            "localization": 100.0,
        },
        chains_per_cell=4,
        num_draws=125,
        num_burnin_steps=200,
        num_steps_between_draws=4,
        key=fs.key(0),
        full_loss=25,
    )
    print(swept)
    chosen = swept.recommend()
    print(f"\nrecommended: {chosen}")
    for cell in chosen.cells:
        print(f"{cell.labels['checkpoint']:>10}: {cell.llc} [{cell.verdict.name}]")
    fs.plots.plot_sweep(swept).savefig("over_training.png", dpi=150)
    print("wrote over_training.png")


if __name__ == "__main__":
    main()
