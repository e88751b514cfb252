"""The page that the documentation shows: targets, tables and plots of one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = dict[str, Any]

PARTS = ("gradient", "noise", "update", "metrics")
LINES = {
    "published loop": ("devinterp, loop", "tab:olive", "-"),
    "bare loop": ("forward and backward alone, loop", "0.4", ":"),
    "posteriors, vmapped": ("posteriors, vmap", "tab:green", "-"),
    "blackjax, jit": ("blackjax, jit and vmap", "tab:orange", "-"),
    "blackjax, scan": ("blackjax, steps in a scan", "tab:orange", "--"),
    "eager": ("funcsgmcmc, eager", "tab:blue", "--"),
    "compiled": ("funcsgmcmc, compiled", "tab:blue", "-"),
    "compiled, blocks": ("funcsgmcmc, compiled in blocks", "tab:blue", "-."),
}


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at.

    Attributes:
        what: What is compared.
        aim: The bound.
        values: By case, for instance by workload.
        at_most: Whether the bound is from above.
    """

    what: str
    aim: float
    values: dict[str, float]
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether every case keeps to the bound."""
        return all(
            value <= self.aim if self.at_most else value >= self.aim
            for value in self.values.values()
        )

    def row(self) -> list[str]:
        """Cells of a table."""
        bound = f"{'≤' if self.at_most else '≥'} {self.aim:g}"
        values = ", ".join(f"{case} {value:.3g}".strip() for case, value in self.values.items())
        return [self.what, bound, values, "yes" if self.met else "**no**"]


def targets(report: Report) -> list[Target]:
    """All that the report has figures for."""
    found: list[Target] = []
    chains = {name: found["milliseconds"] for name, found in report.get("chains", {}).items()}

    def compare(
        what: str, aim: float, names: str, over: str, under: str | Sequence[str], **sense: bool
    ) -> None:
        unders = [under] if isinstance(under, str) else under
        values = {
            name: chains[name][over] / sum(chains[name][part] for part in unders)
            for name in names
            if name in chains and {over, *unders} <= chains[name].keys()
        }
        if values:
            found.append(Target(what, aim, values, **sense))

    everywhere = "".join(chains)
    compare("compiled / bare loop", 0.5, "A", "compiled", "bare loop")
    compare("published / compiled", 8, "A", "published loop", "compiled", at_most=False)
    compare(
        "published / compiled, metrics on both sides",
        25,
        "A",
        "published loop, metrics",
        "compiled, metrics",
        at_most=False,
    )
    compare("posteriors / compiled", 3, "AB", "posteriors, vmapped", "compiled", at_most=False)
    compare("blackjax jit / compiled", 1.5, "AB", "blackjax, jit", "compiled", at_most=False)
    blocks = "compiled, blocks"
    compare("blackjax scan / blocks", 1.6, "A", "blackjax, scan", blocks, at_most=False)
    compare("blackjax scan / blocks", 1, "BC", "blackjax, scan", blocks, at_most=False)
    compare("published / blocks", 8, "A", "published loop", blocks, at_most=False)
    compare("blocks / compiled", 1, everywhere, blocks, "compiled")
    compare("eager / posteriors", 1, "ABC", "eager", "posteriors, vmapped")
    best = {
        name: chains[name][report["chains"][name]["auto"]] / chains[name]["bare loop"]
        for name in "DE"
        if name in chains
    }
    if best:
        found.append(Target('`chain_method="auto"`, compiled / bare loop', 0.9, best))
    compare("compiled, with / without metrics", 1.08, everywhere, "compiled, metrics", "compiled")
    compare("eager, with / without metrics", 1.18, everywhere, "eager, metrics", "eager")
    compare("noise, compiled / `normal_`", 0.5, "AB", "noise, compiled", "noise, normal_")
    compare("noise, eager / `normal_`", 2, "AB", "noise, eager", "noise, normal_")
    compare(
        "compiled step / (gradient + noise)",
        1.1,
        everywhere,
        "compiled",
        ("gradient, compiled", "noise, compiled"),
    )
    starting = report.get("starting", {})
    for name, cold, warm in (("noise", 7, 2.5), ("step", 12, 3.5)):
        if name in starting:
            for how, aim in (("cold", cold), ("warm", warm)):
                what = f"first call of the compiled {name}, {how}, s"
                found.append(Target(what, aim, {"": starting[name][how]}))
    imports = ("import funcsgmcmc beyond tensordict", "funcsgmcmc, for a run")
    found += [
        Target(f"{name}, s", 0.15, {"": starting[name]}) for name in imports if name in starting
    ]
    if "update" in report:
        peak = report["update"]["peak, MiB"]
        size, leaf = report["update"]["parameters, MiB"], report["update"]["largest leaf, MiB"]
        copies = {"": peak["update, compiled"] / size}
        found.append(Target("F: peak memory, compiled, in copies of the parameters", 1, copies))
        ours = {"": peak["compat"] / leaf}
        found.append(Target("F: peak memory, compat, in largest leaves", 2, ours))
        if report["device_type"] == "cuda":
            share = _bandwidth(report, "update, compiled") / _bandwidth(report, "copy")
            what = "F: bandwidth of the compiled update / of a copy"
            found.append(Target(what, 0.8, {"": share}, at_most=False))
    if "large" in report:
        for name, aim in (("sgld", 3.5), ("rmsprop_sgld", 5.5), ("sgnht", 4.5)):
            value = {"": report["large"]["samplers"][name]["copies"]}
            what = f"one large chain: peak memory of {name}, in copies of the parameters"
            found.append(Target(what, aim, value))
        steps = {name: value["leaves"] for name, value in report["large"]["samplers"].items()}
        found.append(Target("a step of 2,000 leaves, s", 0.1, steps))
    if "keeping" in report:
        kept, bare = (report["keeping"][name] for name in ("with draws on disk", "without draws"))
        more = {"": kept["peak, MiB"] - bare["peak, MiB"]}
        found.append(Target("draws on disk: MiB beyond a run without draws", 300, more))
        times = {"": kept["seconds"] / bare["seconds"]}
        found.append(Target("draws on disk / without draws, every step a draw", 1.15, times))
    for suffix, aim in (("", 1.0), (", metrics", 0.45)):
        for part, methods in report.get("optimizers", {}).items():
            values = {
                method.removesuffix(", metrics"): both["compat"] / both["published"]
                for method, both in methods.items()
                if method.endswith(", metrics") == bool(suffix)
            }
            found.append(Target(f"H: compat / published, {part}{suffix}", aim, values))
    return found


def front_page(report: Report) -> str:
    """The table of speed in `README.md`, and the sentences below it, of a run on a CPU."""
    chains = {name: found["milliseconds"] for name, found in report["chains"].items()}

    def ratios(over: str, under: str) -> list[float | None]:
        return [
            figures[over] / figures[under] if over in figures else None
            for figures in chains.values()
        ]

    rows = [
        [title, *("" if ratio is None else _two_digits(ratio) for ratio in ratios(over, under))]
        for title, over, under in _FRONT_ROWS
    ]
    table = _table(["", *(_FRONT_HEADS[name] for name in chains)], rows)
    first = report["starting"]["step"]
    bare, posteriors = ratios("bare loop", "eager"), ratios("posteriors, vmapped", "eager")
    faster = [sum(ratio < 1 for ratio in each) for each in (bare, posteriors)]
    return "\n\n".join(
        [
            table,
            f"Compiling takes {first['cold']:.0f} s the first time on a machine and "
            f"{first['warm']:.0f} s later. Without it a step takes "
            f"{_range(ratios('eager', 'compiled'))} times as long.",
            f"Against that eager step the bare loop takes {_range(bare)} times as long and is "
            f"faster on {faster[0]} of {len(chains)} networks, posteriors {_range(posteriors)} "
            f"and faster on {faster[1]}.",
        ]
    )


_FRONT_HEADS = {
    "A": "A: MLP, 32 chains",
    "B": "B: wide MLP, 8",
    "C": "C: small MLP, 64",
    "D": "D: convnet, 16",
    "E": "E: transformer, 8",
}
_FRONT_ROWS = (
    ("bare loop of forward and backward", "bare loop", "compiled"),
    ("devinterp's loop", "published loop", "compiled"),
    ("devinterp's loop, metrics on both sides", "published loop, metrics", "compiled, metrics"),
    ("posteriors, vmapped", "posteriors, vmapped", "compiled"),
    ("blackjax, jit", "blackjax, jit", "compiled"),
    ("blackjax, scan", "blackjax, scan", "compiled"),
)


def _two_digits(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:#.2g}"


def _range(ratios: Sequence[float]) -> str:
    return f"{_two_digits(min(ratios))} to {_two_digits(max(ratios))}"


_LARGE = (
    "Twelve linear layers of 2048 units, 50,331,648 parameters, batch 8; and a tree of 2,000 "
    "leaves of ten entries, on {device}. Memory is that of the pages in use, in a process that "
    "hands freed memory back at once (`MALLOC_MMAP_THRESHOLD_=4194304`); glibc's default keeps "
    "about one copy more."
)


def write(report: Report, folder: Path, name: str) -> None:
    """Write `<name>.md` and its plots.

    Args:
        report: What `run.py` has measured.
        folder: Where to.
        name: Of the machine: `cpu` or `cuda`.
    """
    where = f"{report['device']}, {report['threads']} threads"
    command = "make bench" if name == "cpu" else "make bench-gpu"
    versions = ", ".join(f"{package} {v}" for package, v in report["versions"].items())
    page = [
        "# Benchmarks",
        f"Measured by `{command}` on {where}; {versions}. All contenders take turns in one "
        "process; figures are medians, in milliseconds, of one step of all chains. "
        f"[All figures]({name}.json).",
    ]
    if "chains" in report:
        page += ["## Networks", *_titles(report), _chains_table(report)]
        _plot_parts(report, folder / f"{name}-parts.png")
        page.append(f"![Time of a step by its parts]({name}-parts.png)")
    if "sweep" in report:
        page += ["## Number of chains", "Network A, batch 64.", _sweep_table(report)]
        _plot_sweep(report, folder / f"{name}-chains.png")
        page.append(f"![Time of a step against the number of chains]({name}-chains.png)")
    if "update" in report:
        page += ["## The update alone", _update_text(report), _update_table(report)]
    if "large" in report:
        text = _LARGE.format(device=report["large"]["device"])
        page += ["## One large chain", text, _large_table(report)]
    if "keeping" in report:
        text = _KEEPING.format(device=report["keeping"]["device"])
        page += ["## Draws on disk", text, _keeping_table(report)]
    if "optimizers" in report:
        page += ["## compat", _optimizers_table(report)]
    if "starting" in report:
        page += ["## Before the first step", _starting_table(report)]
    rows = [target.row() for target in targets(report)]
    page += ["## Targets", _table(["ratio of medians", "target", "measured", "met"], rows)]
    (folder / f"{name}.md").write_text("\n\n".join(page) + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _titles(report: Report) -> list[str]:
    return ["\n".join(f"- {found['title']}" for found in report["chains"].values())]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _by_contender(columns: dict[str, dict[str, float]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [[name, *(_cell(column.get(name)) for column in columns.values())] for name in names]


def _chains_table(report: Report) -> str:
    columns = {name: found["milliseconds"] for name, found in report["chains"].items()}
    return _table(["", *columns], _by_contender(columns))


def _sweep_table(report: Report) -> str:
    return _table(["chains", *report["sweep"]], _by_contender(report["sweep"]))


def _bandwidth(report: Report, contender: str) -> float:
    """GiB/s: a copy reads one tree and writes one, an update reads four (w, w₀, g, η)."""
    trees = 2 if contender == "copy" else 5
    size = report["update"]["parameters, MiB"] / 1024
    return trees * size / report["update"]["milliseconds"][contender] * 1e3


def _update_text(report: Report) -> str:
    copy, eager, compiled = (
        f"{_bandwidth(report, contender):.0f}"
        for contender in ("copy", "update, eager", "update, compiled")
    )
    return (
        f"F: one chain of 10 M parameters ({report['update']['parameters, MiB']:.0f} MiB), peak "
        f"memory beyond what is there before. A copy moves {copy} GiB/s; the update, which reads "
        f"four trees and writes one, {eager} GiB/s eager, {compiled} GiB/s compiled."
    )


def _update_table(report: Report) -> str:
    figures = report["update"]
    rows = [
        [name, f"{ms:.3g}", f"{figures['peak, MiB'][name]:.0f}"]
        for name, ms in figures["milliseconds"].items()
    ]
    return _table(["", "ms", "peak, MiB"], rows)


def _optimizers_table(report: Report) -> str:
    rows = [
        [
            method,
            *(
                cell
                for part in ("iteration", "step")
                for cell in (
                    f"{report['optimizers'][part][method]['compat']:.3g}",
                    f"{report['optimizers'][part][method]['published']:.3g}",
                    f"{_ratio(report['optimizers'][part][method]):.2f}",
                )
            ),
        ]
        for method in report["optimizers"]["step"]
    ]
    head = [
        f"{part}: {what}" for part in ("iteration", "step") for what in ("", "published", "ratio")
    ]
    return _table(["H: one chain of network A", *head], rows)


def _ratio(both: dict[str, float]) -> float:
    return both["compat"] / both["published"]


_KEEPING = (
    "200 chains of a network of 4,999 parameters, batch 32, eager, 1,000 steps, each of which is a "
    "draw that goes to disk, on {device}."
)


def _keeping_table(report: Report) -> str:
    rows = [
        [name, *(f"{figures[what]:.4g}" for what in ("peak, MiB", "seconds", "MiB on disk"))]
        for name, figures in report["keeping"].items()
        if isinstance(figures, dict)
    ]
    return _table(["run", "peak, MiB", "seconds", "MiB on disk"], rows)


def _large_table(report: Report) -> str:
    rows = [
        [name, *(f"{figures[what]:.3g}" for what in ("copies", "seconds", "leaves"))]
        for name, figures in report["large"]["samplers"].items()
    ]
    head = ["peak beyond the parameters, copies", "s a step", "2,000 leaves: s a step"]
    return _table(["eager, one chain in a loop", *head], rows)


def _starting_table(report: Report) -> str:
    rows = []
    for name, value in report["starting"].items():
        both = value if isinstance(value, dict) else {"warm": value}
        rows.append([name, *(_cell(both.get(how)) for how in ("cold", "warm", "from a file"))])
    return _table(["seconds", "cold", "warm", "from a file"], rows)


def _plot_parts(report: Report, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharex=True)
    for axis, how in zip(axes, ("eager", "compiled"), strict=True):
        left = [0.0] * len(report["chains"])
        for part in PARTS:
            widths = []
            for found in report["chains"].values():
                figures = found["milliseconds"]
                if part == "metrics":
                    time = max(0.0, figures[f"{how}, metrics"] - figures[how])
                else:
                    time = figures[f"{part}, {how}"]
                widths.append(time / figures["bare loop"])
            axis.barh(list(report["chains"]), widths, left=left, label=part, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.axvline(1, color="0.3", linewidth=1, linestyle=":")
        axis.set_title(how)
        axis.set_xlabel("time / bare loop over chains")
    axes[0].invert_yaxis()
    axes[1].set_yticks(range(len(report["chains"])), list(report["chains"]))
    axes[1].invert_yaxis()
    axes[1].legend(frameon=False, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_sweep(report: Report, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    chains = [int(number) for number in report["sweep"]]
    for contender, (label, color, style) in LINES.items():
        times = [found.get(contender) for found in report["sweep"].values()]
        if None not in times:
            width = 2.2 if label.startswith("funcsgmcmc") else 1.2
            axis.plot(chains, times, color=color, linestyle=style, linewidth=width, label=label)
    axis.set(xscale="log", yscale="log", xlabel="chains", ylabel="ms per step of all chains")
    axis.set_xticks(chains, [str(number) for number in chains])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize="small")
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summary(report: Report) -> str:
    """The targets, for the terminal."""
    return "\n".join(
        f"{'met   ' if target.met else 'missed'}  {': '.join(target.row()[:1])}  "
        f"{target.row()[1]}  measured {target.row()[2]}"
        for target in targets(report)
    )
