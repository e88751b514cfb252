"""The same seeds give the same chains, from one version to the next, to rounding.

`references/chains.json` holds what six steps of every sampler gave when it was recorded. A change
that is meant to change chains records it anew, and the changelog says so:

    python tests/test_recorded_chains.py
"""

import json
from pathlib import Path

import pytest
import torch

import funcsgmcmc as fs
from cases import CASES, Case
from problems import classification, run

RECORDED = Path(__file__).parent / "references" / "chains.json"


def chain(case: Case) -> dict[str, list[float]]:
    """Each chain's sum of losses, and the first chain's parameters after the last step."""
    samples = run(case.make(fs.params_of(classification()[0])), num_chains=2)
    leaves = [leaf[0].flatten() for leaf in samples.state.params.values(True, True)]
    return {"losses": samples.losses.sum(1).tolist(), "params": torch.cat(leaves).tolist()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_chain_is_the_recorded_one(case):
    recorded, now = json.loads(RECORDED.read_text()), chain(case)
    assert case.name in recorded, "not recorded yet: python tests/test_recorded_chains.py"
    for name, values in recorded[case.name].items():
        found, expected = torch.tensor(now[name]), torch.tensor(values)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def record() -> None:
    """Write the file, one quantity of a chain a line."""
    chains = []
    for case in CASES:
        lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in chain(case).items()]
        chains.append(f" {json.dumps(case.name)}: {{\n" + ",\n".join(lines) + "\n }")
    RECORDED.write_text("{\n" + ",\n".join(chains) + "\n}\n")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    record()
