"""Language models of Hugging Face: their components by name, and runs of them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import funcsgmcmc as fs
from decoders import CONFIGS, decoder, sentences
from funcsgmcmc.components import restrict
from funcsgmcmc.decoders import components_of
from funcsgmcmc.per_example import losses_on, next_token_loss, next_token_losses
from funcsgmcmc.runs.restricted import sample_components

NAMES = list(CONFIGS)


def only(model: nn.Module, component: dict, inside: str) -> dict[str, torch.Tensor]:
    """The model's parameters; those of a module are zero outside a component."""
    leaves = {name: leaf.detach() for name, leaf in model.named_parameters()}
    kept = {}
    for name, leaf in leaves.items():
        if not name.startswith(inside) or "_norm" in name:
            kept[name] = leaf
        else:
            kept[name] = torch.zeros_like(leaf)
            if name in component:
                index = ... if component[name] is True else component[name]
                kept[name][index] = leaf[index]
    return kept


def output_of(model: nn.Module, module: str, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a module gives."""
    seen = []

    def hook(_, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(module).register_forward_hook(hook)
    functional_call(model, params, (), {**sentences(), "use_cache": False})
    handle.remove()
    return seen[0].detach()


@pytest.mark.parametrize("kind", ["head", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_the_sum_of_its_heads(name, kind):
    """Each alone, with all else of the attention zero: no head has an entry too few or too many."""
    model = decoder(name)
    parts = components_of(model)
    for layer in range(2):
        whole = parts[f"layer{layer}.attention"]
        module = ".".join(next(iter(whole)).split(".")[:4])
        entries = [part for key, part in parts.items() if key.startswith(f"layer{layer}.{kind}")]
        if kind == "group" and name in ("gpt2", "gpt_neox"):
            assert entries == []
            continue
        assert len(entries) == (4 if kind == "head" else 2)
        biases = {key: True for key in whole if key.endswith((".dense.bias", ".c_proj.bias"))}
        common = output_of(model, module, only(model, biases, module))
        alone = [output_of(model, module, only(model, part, module)) for part in entries]
        assert min(float(each.abs().max()) for each in alone) > 1e-3
        full = output_of(model, module, dict(model.named_parameters()))
        torch.testing.assert_close(common + sum(alone), full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_silent_without_its_component(name):
    """With a component zero its module gives nothing; with all outside of it zero, the same."""
    model = decoder(name)
    parts = components_of(model)
    leaves = dict(model.named_parameters())
    for key in ("layer1.attention", "layer1.mlp"):
        module = ".".join(next(iter(parts[key])).split(".")[:4])
        without = {n: torch.zeros_like(v) if n in parts[key] else v for n, v in leaves.items()}
        assert output_of(model, module, without).abs().max() == 0
        assert set(parts[key]) <= set(parts["layer1"])
        assert {n for n in leaves if n.startswith(f"{module}.")} == set(parts[key])
    for key in ("embedding", "unembedding"):
        assert all(entry is True for entry in parts[key].values())
    layers = set(parts["layer0"]) | set(parts["layer1"])
    rest = set(leaves) - layers - set(parts["embedding"]) - set(parts["unembedding"])
    assert all("norm" in n or "ln_f" in n for n in rest)
    assert (parts["embedding"].keys() == parts["unembedding"].keys()) == (name == "qwen3")


def test_what_is_no_known_decoder():
    with pytest.raises(TypeError, match="model must have a config, got Linear without one"):
        components_of(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a Module"):
        components_of(3)
    other = nn.Linear(2, 2)
    other.config = CONFIGS["llama"]
    with pytest.raises(ValueError, match="model must be laid out as GPT-2"):
        components_of(other)
    model = decoder("llama")
    model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match=r"k_proj.weight' must have 16 entries .* got \(8, 16\)"):
        components_of(model)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_tokens_are_those_of_the_model(name):
    """Their mean is the loss that the model itself gives; padding has none."""
    model, batch = decoder(name), sentences()
    labels = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    params = fs.params_of(model)
    own = fs.module_loss(model)(params, {**batch, "labels": labels})
    mean = fs.module_loss(model, next_token_loss)(params, batch)
    torch.testing.assert_close(mean.float(), own)  # the model computes its loss in float32
    losses = fs.module_loss(model, next_token_losses)(params, batch)
    assert losses.shape == (6, 6)
    assert losses[0].isnan().tolist() == [False] * 3 + [True] * 3
    torch.testing.assert_close(losses.nanmean(), mean)


def test_padding_on_the_left_predicts_nothing():
    batch = {"input_ids": torch.tensor([[0, 0, 3, 4, 5]]), "attention_mask": torch.ones(1, 5)}
    batch["attention_mask"][0, :2] = 0
    losses = next_token_losses(torch.randn(1, 5, 9), batch)
    assert losses.isnan().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("name", NAMES)
def test_chains_of_a_decoder(name):
    """Each chain's batches are its own; keys and values are not kept; tied weights appear once."""
    model, batch = decoder(name), sentences()
    kept = []
    model.register_forward_hook(lambda _, args, output: kept.append(output.past_key_values))
    loss = fs.module_loss(model, next_token_loss)
    losses = losses_on(fs.module_loss(model, next_token_losses), batch, batch_size=4)
    runs = [
        fs.sample(
            loss,
            fs.params_of(model),
            batch,
            fs.sgld(1e-4, nbeta=2.0, localization=10.0),
            num_chains=2,
            num_draws=2,
            batch_size=3,
            key=fs.key(0),
            observables={"tokens": losses},
            chain_method=method,
        )
        for method in ("vmap", "loop")
    ]
    assert set(kept) == {None}
    assert runs[0].observables["tokens"].shape == (2, 2, 6, 6)
    torch.testing.assert_close(runs[0].losses, runs[1].losses)
    torch.testing.assert_close(runs[0].state.params, runs[1].state.params)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_fused_attention_takes_batches_that_chains_share():
    """With batches of their own its chains are looped over."""
    model, batch = decoder("llama", "sdpa"), sentences()
    settings = {"num_chains": 2, "num_draws": 2, "key": fs.key(0)}
    sampler = fs.sgld(1e-4, nbeta=2.0)
    loss, params = fs.module_loss(model, next_token_loss), fs.params_of(model)
    shared = fs.sample(loss, params, [batch], sampler, **settings)
    assert shared.chain_method == "vmap"
    with pytest.warns(UserWarning, match="chains are looped over, since they do not vmap"):
        own = fs.sample(loss, params, batch, sampler, batch_size=3, chain_method="auto", **settings)
    assert own.chain_method == "loop"


def test_heads_are_sampled():
    """The rows of a head alone move, those of the model at their place."""
    model, batch = decoder("qwen3"), sentences()
    parts = components_of(model)
    chosen = {name: parts[name] for name in ("layer0.head1", "layer1.group0")}
    params = fs.params_of(model)
    runs = sample_components(
        fs.module_loss(model, next_token_loss),
        params,
        batch,
        fs.sgld(1e-3, nbeta=2.0),
        chosen,
        num_chains=2,
        num_draws=3,
        record=["draws"],
        key=fs.key(0),
    )
    head = restrict(lambda params: params, params, chosen["layer0.head1"]).function
    last = head(runs["layer0.head1"].draws[1, -1])
    moved = {name for name, leaf in last.items() if not torch.equal(leaf, params[name])}
    assert moved == set(chosen["layer0.head1"])
    rows = (
        last["model.layers.0.self_attn.q_proj.weight"]
        != params["model.layers.0.self_attn.q_proj.weight"]
    ).any(1)
    assert rows.nonzero().flatten().tolist() == list(range(6, 12))
