"""Chains over processes: the same run alone, under torchrun and under Slurm.

python examples/scaling/chains.py
examples/scaling/torchrun.sh 4
sbatch examples/scaling/slurm.sh
"""

import argparse
import os

import torch
import torch.distributed as dist

import funcsgmcmc as fs


def loss_fn(params, batch):
    """A quadratic loss around the mean of the data."""
    return (params["w"] - batch.mean(0)).square().sum() / 2


def main() -> None:
    """Sample 12 chains, and print their estimate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", default="scaled.zarr", help="where the record is kept")
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # under torchrun; alone, it is the same run
        dist.init_process_group()
    samples = fs.sample(
        loss_fn,
        {"w": torch.zeros(3, device=device)},
        torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).to(device),
        fs.sgld(lr=1e-3, nbeta=30.0, localization=1.0),
        num_chains=12,
        num_draws=options.draws,
        num_burnin_steps=50,
        batch_size=16,
        key=fs.key(0),
        chunk_size=2,
        store=options.store,
        resume=True,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(fs.llc(samples))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
