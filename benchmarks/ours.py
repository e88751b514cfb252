"""Our side of the comparison: one step of all chains, whole and in its parts."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from measuring import Call
from networks import Workload, criterion
from peers import LOCALIZATION, LR, NBETA
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from funcsgmcmc import tree
from funcsgmcmc.gradients import estimator_of
from funcsgmcmc.memory import chunk_size
from funcsgmcmc.samplers import Sampler
from funcsgmcmc.stepping import StepKeys, StepNoise, chain_step, chains_step, step_noise

Wrap = Callable[..., Any]
STEPS_PER_BLOCK = 16


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """What eager code does in place of `fs.compiled`."""
    return function


class Ours:
    """A workload's loss, sampler, keys and start."""

    def __init__(self, workload: Workload) -> None:
        model = workload.make()
        self.workload = workload
        self.loss_fn, self.params = fs.module_loss(model, criterion), fs.params_of(model)
        self.sampler = fs.sgld(LR, nbeta=NBETA, localization=LOCALIZATION, anchor=self.params).to(
            tree.device(self.params)
        )
        key = fs.key(0, tree.device(self.params))
        self.keys = fs.random.fold_in(key, torch.arange(workload.chains))
        self.start = self.sampler.init(self.params.expand(workload.chains))

    def vmapped(self, wrap: Wrap, **settings: Any) -> Call:
        """A step with gradients under vmap, in the chunks that `sample` makes by default."""
        kernel = wrap(chains_step(self.loss_fn, batch_dim=None, **settings))
        size = chunk_size(self.start.params)
        states = list(self.start.split(size))
        keys, steps = [StepKeys(part) for part in self.keys.split(size)], itertools.count()

        def step() -> None:
            index = next(steps)
            for chunk, state in enumerate(states):
                step_keys = keys[chunk].at(index)
                states[chunk], _ = kernel(self.sampler, state, self.workload.batch, None, step_keys)

        return step

    def blocks(self) -> Call:
        """Blocks of `STEPS_PER_BLOCK` steps, as `sample` makes them between draws."""
        step = chains_step(self.loss_fn, batch_dim=None)

        def of_block(state: Any, keys: torch.Tensor, sampler: Sampler, batch: Any) -> Any:
            return step(sampler, state, batch, None, keys)

        kernel = fs.compiled(of_block, num_steps=STEPS_PER_BLOCK)
        size = chunk_size(self.start.params)
        states = list(self.start.split(size))
        keys, firsts = [StepKeys(part) for part in self.keys.split(size)], itertools.count()

        def block() -> None:
            first = next(firsts) * STEPS_PER_BLOCK
            for chunk, state in enumerate(states):
                step_keys = keys[chunk].of_steps(first, STEPS_PER_BLOCK)
                states[chunk], _ = kernel(state, step_keys, self.sampler, self.workload.batch)

        return block

    def looped(self, wrap: Wrap, **settings: Any) -> Call:
        """A step of one chain after the other."""
        kernel = wrap(chain_step(self.loss_fn, **settings))
        states = list(self.start.unbind(0))
        keys, steps = [StepKeys(key) for key in self.keys], itertools.count()

        def step() -> None:
            index = next(steps)
            for chain, state in enumerate(states):
                step_key = keys[chain].at(index)
                states[chain], _ = kernel(self.sampler, state, self.workload.batch, None, step_key)

        return step

    def steps(self) -> dict[str, Call]:
        """Every way to make a step."""
        ways = {
            "eager": self.vmapped(as_it_is),
            "eager, metrics": self.vmapped(as_it_is, metrics=True),
            "eager, compiled noise": self.vmapped(
                as_it_is, noise=StepNoise(fs.compiled(step_noise))
            ),
            "compiled": self.vmapped(fs.compiled),
            "compiled, metrics": self.vmapped(fs.compiled, metrics=True),
            "compiled, blocks": self.blocks(),
            "loop, eager": self.looped(as_it_is),
            "loop, compiled": self.looped(fs.compiled),
        }
        if tree.device(self.params).type == "cuda":
            ways["compiled, CUDA graphs"] = self.vmapped(graphed)
        return ways

    def compiled_noise(self) -> Call:
        """The noise of a step."""
        draw, size = fs.compiled(step_noise), tree.size(self.params)
        keys, steps = StepKeys(self.keys), itertools.count()
        return lambda: draw(keys.at(next(steps)), size, tree.noise_dtype(self.params))

    def parts(self, wrap: Wrap) -> dict[str, Call]:
        """Gradient, noise and update, each alone."""
        size, dtype = tree.size(self.params), tree.noise_dtype(self.params)
        evaluate = estimator_of(self.loss_fn).evaluate
        evaluate = wrap(torch.vmap(evaluate, in_dims=(0, None, None)))
        draw, update = wrap(step_noise), wrap(Sampler.update)
        params, keys, steps = self.start.params, StepKeys(self.keys), itertools.count()
        evaluation = evaluate(params, self.workload.batch, None)
        noise = tree.unflatten(draw(keys.at(0), size, dtype), params)
        return {
            "gradient": lambda: evaluate(params, self.workload.batch, None),
            "noise": lambda: draw(keys.at(next(steps)), size, dtype),
            "update": lambda: update(self.sampler, self.start, evaluation, noise),
        }

    def chosen(self) -> str:
        """The way that `chain_method="auto"` takes, compiled."""
        samples = fs.sample(
            self.loss_fn,
            self.params,
            [self.workload.batch],
            self.sampler,
            num_chains=self.workload.chains,
            num_draws=1,
            key=fs.key(0),
            chain_method="auto",
            compile=True,
        )
        return "compiled" if samples.chain_method == "vmap" else "loop, compiled"


def graphed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, with CUDA graphs; what they return is cloned, since the next call overwrites it."""
    run = fs.compiled(function, cuda_graphs=True)

    def call(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map(torch.clone, run(*arguments))

    return call
