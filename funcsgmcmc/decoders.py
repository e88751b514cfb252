"""Components of language models of Hugging Face by name: embeddings, layers, MLPs, heads.

They are found from the names of a model's parameters and from its config, so that no library but
torch is needed. A head is what only it reads and writes, and the keys and values that it reads:

    queries    rows of W_Q, head_dim of them       (and of its bias)
    keys       rows of W_K of the head's group     (grouped heads share them)
    values     rows of W_V of the head's group
    output     columns of W_O, head_dim of them    (its bias belongs to all heads)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcsgmcmc import checks
from funcsgmcmc.components import Entries
from funcsgmcmc.modules import first_names_of


@dataclass(frozen=True)
class _Heads:
    """Numbers of heads, of groups with keys and values of their own, and entries of a head."""

    heads: int
    groups: int
    size: int

    def group_of(self, head: int) -> int:
        return head * self.groups // self.heads

    def block(self, index: int, start: int = 0) -> Tensor:
        """The entries of one head or group, where those of the first begin at `start`."""
        return start + index * self.size + torch.arange(self.size)


Pick = Callable[[_Heads, list[int], int], Tensor]


def _queries(heads: _Heads, chosen: list[int], group: int) -> Tensor:
    return torch.cat([heads.block(head) for head in chosen])


def _of_group(heads: _Heads, chosen: list[int], group: int) -> Tensor:
    return heads.block(group)


def _one_after_the_other(heads: _Heads, chosen: list[int], group: int) -> Tensor:
    """Of a fused projection whose rows are all queries, then all keys, then all values."""
    keys = heads.heads * heads.size
    values = keys + heads.groups * heads.size
    return torch.cat(
        [_queries(heads, chosen, group), heads.block(group, keys), heads.block(group, values)]
    )


def _head_by_head(heads: _Heads, chosen: list[int], group: int) -> Tensor:
    """Of a fused projection whose rows are query, key and value of each head in turn."""
    return torch.cat([3 * head * heads.size + torch.arange(3 * heads.size) for head in chosen])


@dataclass(frozen=True)
class _Layout:
    """How a family of models names its parameters.

    Attributes:
        layers: Before the number of a layer.
        attention: The attention's module in a layer.
        mlp: The MLP's.
        parts: Of parameters of the attention that heads have parts of: the dimension, and which
            of its entries.
    """

    layers: str
    attention: str
    mlp: str
    parts: dict[str, tuple[int, Pick]]


_SEPARATE: dict[str, tuple[int, Pick]] = {
    "q_proj.weight": (0, _queries),
    "q_proj.bias": (0, _queries),
    "k_proj.weight": (0, _of_group),
    "k_proj.bias": (0, _of_group),
    "v_proj.weight": (0, _of_group),
    "v_proj.bias": (0, _of_group),
    "o_proj.weight": (1, _queries),
}

_LAYOUTS = [
    _Layout("model.layers", "self_attn", "mlp", _SEPARATE),
    _Layout(
        "gpt_neox.layers",
        "attention",
        "mlp",
        {
            "query_key_value.weight": (0, _head_by_head),
            "query_key_value.bias": (0, _head_by_head),
            "dense.weight": (1, _queries),
        },
    ),
    _Layout(
        "transformer.h",
        "attn",
        "mlp",
        {
            # Matrices of GPT-2 are transposed: inputs first.
            "c_attn.weight": (1, _one_after_the_other),
            "c_attn.bias": (0, _one_after_the_other),
            "c_proj.weight": (0, _queries),
        },
    ),
]


def components_of(model: nn.Module) -> dict[str, dict[str, Entries]]:
    """Name the components of a decoder, for `restrict` and `sample_components`.

    Args:
        model: A causal language model of Hugging Face whose attention is laid out as that of GPT-2,
            GPT-NeoX (Pythia) or Llama (Mistral, Qwen 2 and 3, …): `model.config` tells the numbers
            of heads and the size of a head.

    Returns:
        By name, the entries that each component has:

        - `embedding`: of tokens, and of positions where they are learned. `unembedding`: the output
          matrix, which is the same leaf where the two are tied.
        - `layer3`: all of a layer; `layer3.attention`, `layer3.mlp`: of these modules, without the
          norms before them.
        - `layer3.head1`: the rows of a head's queries, the columns of the output that it writes,
          and the rows of the keys and values that it reads, which heads of a group share;
          `layer3.group0`, where there are fewer keys than heads: all heads that share them.

    Raises:
        TypeError: `model` is no module, or has no config.
        ValueError: Its layout is not known, or a shape is not the config's: describe its components
            by patterns or slices.
    """
    checks.instance("model", model, nn.Module)
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"model must have a config, got {type(model).__name__} without one")
    names = list(dict(model.named_parameters()))
    layout = next((each for each in _LAYOUTS if _is_of(each, names)), None)
    if layout is None:
        raise ValueError(
            f"model must be laid out as GPT-2, GPT-NeoX or Llama, got {type(model).__name__}: "
            "describe its components by patterns or slices (see restrict)"
        )
    heads = _heads_of(config)
    found: dict[str, dict[str, Entries]] = {}
    for name, module in _embeddings(model).items():
        found[name] = dict.fromkeys(_first_names(model, module), True)
    positions = [name for name in names if name.endswith(".wpe.weight")]
    found["embedding"] |= dict.fromkeys(positions, True)
    for layer in range(_num_layers(layout, names)):
        prefix = f"{layout.layers}.{layer}."
        inside = [name for name in names if name.startswith(prefix)]
        found[f"layer{layer}"] = dict.fromkeys(inside, True)
        for part, module_name in (("attention", layout.attention), ("mlp", layout.mlp)):
            own = [name for name in inside if name.startswith(f"{prefix}{module_name}.")]
            found[f"layer{layer}.{part}"] = dict.fromkeys(own, True)
        attention = f"{prefix}{layout.attention}."
        for head in range(heads.heads):
            entries = _head_entries(model, layout, attention, heads, [head])
            found[f"layer{layer}.head{head}"] = entries
        if heads.groups < heads.heads:
            for group in range(heads.groups):
                members = [h for h in range(heads.heads) if heads.group_of(h) == group]
                entries = _head_entries(model, layout, attention, heads, members)
                found[f"layer{layer}.group{group}"] = entries
    return found


def _is_of(layout: _Layout, names: list[str]) -> bool:
    first = f"{layout.layers}.0.{layout.attention}."
    return any(name.startswith(first) and name[len(first) :] in layout.parts for name in names)


def _heads_of(config: Any) -> _Heads:
    heads: int = config.num_attention_heads
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _Heads(heads, groups, size)


def _embeddings(model: Any) -> dict[str, nn.Module]:
    return {
        "embedding": model.get_input_embeddings(),
        "unembedding": model.get_output_embeddings(),
    }


def _first_names(model: nn.Module, module: nn.Module) -> list[str]:
    """Names of a module's parameters in the model's tree, where a tied weight has its first."""
    own = {id(leaf) for leaf in module.parameters()}
    first = first_names_of(model)
    return list(dict.fromkeys(first[name] for name, leaf in _all_named(model) if id(leaf) in own))


def _all_named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _num_layers(layout: _Layout, names: list[str]) -> int:
    prefix = f"{layout.layers}."
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _head_entries(
    model: nn.Module, layout: _Layout, attention: str, heads: _Heads, chosen: list[int]
) -> dict[str, Entries]:
    """The entries of some heads of one group, by the names of leaves.

    Raises:
        ValueError: A leaf has not the size that follows from the config.
    """
    entries: dict[str, Entries] = {}
    group = heads.group_of(chosen[0])
    everyone = list(range(heads.heads))
    for suffix, (dim, pick) in layout.parts.items():
        name = attention + suffix
        leaf = dict(model.named_parameters()).get(name)
        if leaf is None:  # a model without biases
            continue
        # What the last head and the last group have ends where the leaf does.
        expected = int(pick(heads, everyone, heads.groups - 1).max()) + 1
        if leaf.shape[dim] != expected:
            raise ValueError(
                f"parameter {name!r} must have {expected} entries along dimension {dim}, as its "
                f"config says, got {tuple(leaf.shape)}"
            )
        index = pick(heads, chosen, group)
        entries[name] = (*(slice(None),) * dim, index)
    return entries
