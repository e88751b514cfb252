"""The components of a transformer, sampled one after the other: time and memory, against others.

    python benchmarks/restricted.py [--steps 20] [--rounds 5] [--compile]
    python benchmarks/restricted.py --memory --only layer3.mlp
    python benchmarks/restricted.py --profile shared --only layer3.mlp

A GPT-NeoX of Hugging Face of 4 layers of width 128, about 0.9 M parameters, made from its config.
Twelve components: embedding, unembedding, and of each layer its attention and its MLP; the first
layer and the last as wholes. Four chains of SGLD each, batches of 16 sequences of 32 tokens.

    shared         `sample_components(…, shared_batches=True)`
    own batches    the same, each chain with batches of its own
    published      devinterp 2.0.1's `slt.sampler.sample_single_chain`, chain after chain, with
                   `param_masks` that name the component, so that gradients of frozen parameters
                   are not taken; nothing is written to disk
    masked         `sample`, with a mask of ours for each component: all parameters are chains'

Contenders take turns, so that a noisy machine disturbs all alike; the ratios are medians over
rounds. On a busy machine give one thread and `--cpu`: the time of the process. Starts and the first
step do not count, nor compilation with it. Memory is that of processes of their own: the peak
beyond what is there before the run.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import _status, processor
from torch import Tensor, nn

import funcsgmcmc as fs
from funcsgmcmc.decoders import components_of
from funcsgmcmc.per_example import next_token_loss
from funcsgmcmc.runs.restricted import sample_components

WORDS, WIDTH, LAYERS, HEADS = 512, 128, 4, 4
EXAMPLES, TOKENS, BATCH, CHAINS = 512, 33, 16, 4
LR, NBETA, LOCALIZATION = 1e-5, 30.0, 100.0
NAMES = [
    "embedding",
    "unembedding",
    *(f"layer{i}.{part}" for i in range(LAYERS) for part in ("attention", "mlp")),
    "layer0",
    f"layer{LAYERS - 1}",
]


def language_model(attention: str) -> nn.Module:
    """The model; it has no dropout."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=TOKENS,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def texts() -> Tensor:
    return torch.randint(WORDS, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))


class Contenders:
    """Ways to sample the components.

    Each is called with a number of steps, and gives the seconds of a step of all chains of each
    component: medians over the steps after the first, with what is done between them.

    Args:
        names: The components.
        compile: Whether steps of ours are compiled.
        clock: Tells the time.
    """

    def __init__(
        self,
        names: list[str],
        *,
        compile: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        # Fused attention is the faster one without vmap.
        self.model, self.fused = language_model("eager").eval(), language_model("sdpa")
        self.loss_fn = fs.module_loss(self.model, next_token_loss)
        self.params, self.tokens = fs.params_of(self.model), texts()
        self.dataset = [{"input_ids": each} for each in self.tokens]
        components = components_of(self.model)
        self.components = {name: components[name] for name in names}
        self.compile, self.clock = compile, clock

    def shared(self, steps: int) -> dict[str, float]:
        return self._restricted(steps, shared_batches=True)

    def own_batches(self, steps: int) -> dict[str, float]:
        return self._restricted(steps)

    def masked(self, steps: int) -> dict[str, float]:
        seconds = {}
        for name, component in self.components.items():
            mask = {leaf: leaf in component for leaf, _ in self.params.items()}
            sampler = fs.sgld(LR, nbeta=NBETA, localization=LOCALIZATION, mask=mask)
            times: list[float] = []
            fs.sample(
                self.loss_fn,
                self.params,
                {"input_ids": self.tokens},
                sampler,
                shared_batches=True,
                **self._settings(steps, times),
            )
            seconds[name] = _median_step(times)
        return seconds

    def published(self, steps: int) -> dict[str, float]:
        from devinterp.optim import SGMCMC
        from devinterp.slt.lm_loss import make_evaluate_fn
        from devinterp.slt.sampler import sample_single_chain

        settings = {"lr": LR, "nbeta": NBETA, "localization": LOCALIZATION}
        seconds = dict.fromkeys(self.components, 0.0)
        for name, component in self.components.items():
            for chain in range(CHAINS):
                times: list[float] = []

                def note(*_: Any, times: list[float] = times) -> None:
                    times.append(self.clock())

                with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                    sample_single_chain(
                        self.fused,
                        self.dataset,
                        make_evaluate_fn(),
                        dict.fromkeys(component),
                        num_draws=1,
                        num_burnin_steps=steps - 1,
                        sampling_method=SGMCMC.sgld,
                        sampling_method_kwargs=settings,
                        chain=chain,
                        seed=chain,
                        dataloader_seed=0,
                        batch_size=BATCH,
                        step_callback=note,
                    )
                seconds[name] += _median_step(times)
        return seconds

    def _restricted(self, steps: int, **settings: Any) -> dict[str, float]:
        seconds = {}
        # One component a call, to time each.
        for name, component in self.components.items():
            times: list[float] = []
            sample_components(
                self.loss_fn,
                self.params,
                {"input_ids": self.tokens},
                fs.sgld(LR, nbeta=NBETA, localization=LOCALIZATION),
                {name: component},
                **settings,
                **self._settings(steps, times),
            )
            seconds[name] = _median_step(times)
        return seconds

    def _settings(self, steps: int, times: list[float]) -> dict[str, Any]:
        return {
            "num_chains": CHAINS,
            "num_draws": steps,
            "batch_size": BATCH,
            "key": fs.key(0),
            "initial_loss": 6.0,
            "full_loss": 0,
            "compile": self.compile,
            "on_draw": lambda draw: times.append(self.clock()),
        }


WAYS = ("shared", "own_batches", "masked", "published")


def _median_step(times: list[float]) -> float:
    """The median of the times between what was noted after each step, in seconds."""
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def measure(
    steps: int,
    rounds: int,
    names: list[str],
    ways: list[str],
    *,
    compile: bool,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Milliseconds of a step of all chains of each component, and ratios to the first way."""
    contenders = Contenders(names, compile=compile, clock=clock)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, times in found.items():
            times.append(getattr(contenders, way)(steps))
    report: dict[str, Any] = {}
    for name in [*names, "all"]:
        totals = {
            way: [sum(each.values()) if name == "all" else each[name] for each in times]
            for way, times in found.items()
        }
        first = totals[ways[0]]
        report[name] = {
            way: {
                "ms": round(statistics.median(times) * 1e3, 1),
                "to the first": round(
                    statistics.median(a / b for a, b in zip(times, first, strict=True)), 2
                ),
            }
            for way, times in totals.items()
        }
    return report


def peaks(names: list[str], ways: list[str]) -> dict[str, float]:
    """MiB of the peak of each way, beyond what is there before, in a process of its own."""
    found = {}
    for way in ways:
        command = [sys.executable, __file__, "--peak-of", way, "--only", *names]
        # The allocator gives freed memory back at once, so that peaks are those of tensors.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        answer = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found[way] = float(answer.stdout.splitlines()[-1])
    return found


def peak_of(way: str, names: list[str]) -> float:
    contenders = Contenders(names)
    run = getattr(contenders, way)
    run(2)  # imports, and caches that stay
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run(3)
    return _status("VmHWM") - before


def profile(name: str, way: str, steps: int) -> None:
    """Print what the operations of a component's steps take."""
    contenders = Contenders([name])
    run = getattr(contenders, way)
    run(2)
    with torch.profiler.profile() as found:
        run(steps)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, help="some components")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="some contenders")
    parser.add_argument("--cpu", action="store_true", help="time of the process, not of the clock")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peaks, in place of times")
    parser.add_argument("--peak-of", choices=WAYS, help="in this process")
    parser.add_argument("--profile", choices=WAYS, help="operations of the first component")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.peak_of:
        print(peak_of(given.peak_of, given.only))
    elif given.profile:
        profile(given.only[0], given.profile, given.steps)
    else:
        clock = time.process_time if given.cpu else time.perf_counter
        print(processor(), f"{torch.get_num_threads()} threads")
        if given.memory:
            report = {name: peaks([name], given.ways) for name in given.only}
        else:
            report = measure(
                given.steps,
                given.rounds,
                given.only,
                given.ways,
                compile=given.compile,
                clock=clock,
            )
        for name, figures in report.items():
            print(f"{name:20s}", json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
