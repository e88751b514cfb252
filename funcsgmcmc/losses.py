"""The loss of a module, as a function of a parameter tree and a batch.

The module is evaluated with the tree's parameters in place of its own, and with its own for those
that the tree lacks.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.modules import first_names_of, is_fully_sharded, listed


def module_loss(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> "ModuleLoss":
    """Make a loss function from a module.

    What is called depends on the batch:

        (inputs, targets)     criterion(model(inputs), targets)
        a dict                criterion(model(**batch), batch)
        a tensor, or (x,)     criterion(model(x), x)
        without a criterion   model(*batch), model(**batch) or model(x): the loss, or an output
                              that has it as `.loss`, as models of Hugging Face return

    A dict's entries are keyword arguments, inputs that are a dict likewise. Where there is a
    criterion, entries of a batch that `forward` does not name are left to it. A model that could
    keep keys and values for a next token (`use_cache`) is told not to.

    Args:
        model: Any module. Its buffers are used as they are and not sampled. Parameters that the
            tree given to the loss lacks keep the module's values. Of a module that `fully_shard`
            has sharded the tree's parameters overwrite its own at each evaluation; processes may
            have other batches of one size, over which the loss is the mean.
        criterion: The mean loss over the batch, of the model's output and the targets, for instance
            `torch.nn.functional.cross_entropy`; one that does not average makes a per-example loss,
            for `losses_on`. Default: the model returns its loss.
        dtype: The dtype to evaluate the model in, for instance `torch.bfloat16`: parameters,
            buffers and floating inputs are cast to it. The criterion sees outputs in the dtype of
            the parameters, float32 at least, which is also that of gradients and updates.
            Default: the model is called with the parameters as they are.

    Returns:
        `loss_fn(params, batch) -> scalar`, where `params` is as `params_of(model)`.

    Raises:
        TypeError: `model` is no module, `criterion` no function or `dtype` not floating; when
            called, if the batch is none of the above, or its entries are not those of `forward`.
        ValueError: Now or when called, if `model` has dropout or batch normalization in train
            mode: the loss must be a function of its arguments alone. When called, if `params` has a
            name that is no parameter of the model, or both names of a tied weight.
    """
    checks.instance("model", model, nn.Module)
    if criterion is not None:
        checks.function("criterion", criterion)
        if inspect.isclass(criterion):
            raise TypeError(
                f"criterion must be a function, got the class {criterion.__name__}: call it first, "
                f"{criterion.__name__}()"
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a real floating dtype, got {dtype!r}")
    return ModuleLoss(model, criterion, dtype)


class ModuleLoss:
    """The loss of a module, a function of a parameter tree and a batch; see `module_loss`.

    An object rather than a closure, so that it can be pickled with its model and criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._model, self._criterion, self._dtype = model, criterion, dtype
        self._keywords = _Keywords(model)
        self._first_names = first_names_of(model)
        self._shapes = {name: leaf.shape for name, leaf in model.named_parameters()}
        self._impure = _impure_layers(model)
        # Here too: a mistake shows where the loss is made.
        self._check_mode()

    def fixed(self, sampled: Collection[str]) -> dict[str, Any]:
        """What the loss is made of beside the sampled parameters, by name.

        Args:
            sampled: Dotted names of the parameters that a tree gives.

        Returns:
            The module's layers, as text; its buffers, and its other parameters.
        """
        tensors = {**dict(self._model.named_buffers()), **dict(self._model.named_parameters())}
        kept = {f"model[{name!r}]": each for name, each in tensors.items() if name not in sampled}
        return {"model": repr(self._model), **kept}

    def __call__(self, params: TensorDict, batch: Any) -> Tensor:
        """L(w) on a batch, a scalar."""
        # At every call: `model.train()` may be called between two runs.
        self._check_mode()
        # `functional_call` knows dotted names; those of a nested tree are tuples.
        leaves = {tree.dotted(name): leaf for name, leaf in tree.leaves(params)}
        self._check_leaves(leaves)
        if is_fully_sharded(self._model):
            return self._of_sharded(leaves, batch)
        args, kwargs, targets = self._split(batch)
        kwargs = self._keywords.with_defaults(kwargs)
        if self._dtype is None:
            output = functional_call(self._model, leaves, args, kwargs)
        else:
            everything = _cast(self._with_the_rest(leaves), self._dtype)
            args, kwargs = _cast(args, self._dtype), _cast(kwargs, self._dtype)
            output = functional_call(self._model, everything, args, kwargs)
            # A mean over a batch in half precision would have three digits.
            output = _cast(output, tree.noise_dtype(params))
        if self._criterion is not None:
            return self._criterion(output, targets)
        loss = self._own_loss(output)
        return loss if self._dtype is None else _cast(loss, tree.noise_dtype(params))

    def _of_sharded(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """L(w) of a module that `fully_shard` has sharded: its mean over the processes.

        Raises:
            TypeError: A leaf is not sharded as the module's parameter is, or a dtype was given.
            ValueError: A parameter is frozen.
        """
        if self._dtype is not None:
            raise TypeError(
                "a module sharded by fully_shard has the dtype of its MixedPrecisionPolicy, got "
                f"dtype={self._dtype}"
            )
        for each in self._model.modules():
            if isinstance(each, FSDPModule):
                each.reshard()  # a forward pass alone leaves it gathered, at older parameters
        named = dict(self._model.named_parameters())
        own = [named[self._first_names[name]] for name in leaves]
        for (name, leaf), param in zip(leaves.items(), own, strict=True):
            if not (shards.is_sharded(leaf) and shards.is_sharded(param)):
                raise TypeError(
                    f"params[{name!r}] must be sharded as the module that fully_shard has sharded, "
                    f"got a {type(leaf).__name__}: its hooks work with autograd, and not within "
                    "torch.func.grad or torch.vmap"
                )
            if not param.requires_grad:
                raise ValueError(
                    f"params[{name!r}] must not be frozen in a module that fully_shard has sharded"
                )

        def evaluate() -> Tensor:
            args, kwargs, targets = self._split(batch)
            output = self._model(*args, **self._keywords.with_defaults(kwargs))
            loss = (
                self._own_loss(output)
                if self._criterion is None
                else self._criterion(output, targets)
            )
            return checks.scalar("loss_fn", loss)

        value: Tensor = _OfShardedModule.apply(evaluate, own, *leaves.values())
        return value

    def _check_mode(self) -> None:
        """Refuse layers that make the loss more than a function of its arguments."""
        for name, layer in self._impure:
            # Dropout of probability 0 is pure; normalization has no p.
            if layer.training and getattr(layer, "p", 1.0) > 0:
                raise ValueError(
                    f"the loss must be a function of its arguments alone, but layer {name!r} "
                    f"({type(layer).__name__}) is in train mode: call model.eval(), or keep train "
                    "mode for the others and call .eval() on this layer"
                )

    def _check_leaves(self, leaves: Mapping[str, Tensor]) -> None:
        """Refuse leaves that are not the model's parameters, each once.

        Raises:
            ValueError: A name is unknown, two names are those of one tied weight, or a shape is not
                the parameter's.
        """
        seen: dict[str, str] = {}
        for name, leaf in leaves.items():
            first = self._first_names.get(name)
            if first is None:
                raise ValueError(
                    f"params has {name!r}, which is no parameter of the model; parameters are "
                    f"{listed(self._first_names)}"
                )
            if first in seen:
                raise ValueError(
                    f"params has {seen[first]!r} and {name!r}, which are one tied weight: keep one "
                    "(funcsgmcmc.params_of(model) does)"
                )
            seen[first] = name
            shape = self._shapes[first]
            if leaf.shape != shape:
                raise ValueError(
                    f"params[{name!r}] has shape {tuple(leaf.shape)}, the model's parameter has "
                    f"{tuple(shape)} (many chains are one tree of batch size [C], such as "
                    "torch.stack([params_of(a), params_of(b)]))"
                )

    def _with_the_rest(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters and buffers of the model, some of them replaced."""
        replaced = {self._first_names[name] for name in leaves}
        own = {name: leaf for name, leaf in self._model.named_parameters() if name not in replaced}
        return {**own, **dict(self._model.named_buffers()), **leaves}

    def _split(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Positional and keyword arguments of the model, and the targets, of a batch.

        Raises:
            TypeError: The batch is no tensor, tuple, list or dict, or has another number of parts.
        """
        if isinstance(batch, TensorDictBase | Mapping):
            return (), self._keywords.of(batch, has_rest=self._criterion is not None), batch
        if isinstance(batch, Tensor):
            return (batch,), {}, batch
        if not isinstance(batch, tuple | list):
            raise TypeError(
                "a batch must be (inputs, targets), a dict or a tensor, got "
                f"{type(batch).__name__}: for others, write loss_fn(params, batch) yourself with "
                "torch.func.functional_call"
            )
        if self._criterion is None:
            self._keywords.check_number(len(batch))
            return tuple(batch), {}, None
        if len(batch) == 1:
            return tuple(batch), {}, batch[0]
        if len(batch) != 2:
            raise TypeError(f"a batch must be (inputs, targets), got {len(batch)} parts")
        inputs, targets = batch
        if isinstance(inputs, TensorDictBase | Mapping):
            return (), self._keywords.of(inputs, has_rest=False), targets
        return (inputs,), {}, targets

    def _own_loss(self, output: Any) -> Tensor:
        """The loss in the output of a model that returns it.

        Raises:
            TypeError: There is none.
        """
        if isinstance(output, Tensor):
            return output
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, Mapping):
            loss = output.get("loss")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"without a criterion, {type(self._model).__name__} must return its loss, or an "
                f"output with a tensor as .loss, got {type(output).__name__} with loss {loss!r} "
                "(models of Hugging Face return one where the batch has labels)"
            )
        return loss


class _OfShardedModule(torch.autograd.Function):
    """The loss of a module that `fully_shard` has sharded, as a function of its parameters.

    Its hooks gather the parameters that the module has, whatever `functional_call` put in their
    place: so they are overwritten, and their gradients, by torch's own backward pass, are taken.
    Processes may have other batches: the loss is the mean over them, as the gradients are.
    """

    @staticmethod
    def forward(
        ctx: Any, evaluate: Callable[[], Tensor], own: Sequence[nn.Parameter], *leaves: Tensor
    ) -> Tensor:
        kept = [param.grad for param in own]
        for param, leaf in zip(own, leaves, strict=True):
            shards.local(param.detach()).copy_(shards.part_of(leaf.detach(), param))
            param.grad = None
        try:
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                loss = evaluate()
                if loss.requires_grad:
                    loss.backward()
            # One that the loss does not use has none.
            ctx.grads = [
                torch.zeros_like(param.detach()) if param.grad is None else param.grad
                for param in own
            ]
        finally:
            for param, grad in zip(own, kept, strict=True):
                param.grad = grad
        return shards.mean_over_processes(loss.detach(), own)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        grads = [shards.on_parts(lambda leaf: leaf * slope, grad) for grad in ctx.grads]
        return None, None, *grads


class _Keywords:
    """The keyword arguments that a model's `forward` takes, found in batches that are dicts."""

    def __init__(self, model: nn.Module) -> None:
        self._forward = f"{type(model).__name__}.forward"
        parameters = inspect.signature(model.forward).parameters.values()
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [each for each in parameters if each.kind in by_name]
        self._known = {each.name for each in named}
        # How many arguments by position; None: any number.
        places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, by_name[0])]
        takes_all = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        self._most = None if takes_all else len(places)
        self._needed = [each.name for each in named if each.default is each.empty]
        self._takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)

    def with_defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments with those that a loss needs to be evaluated once.

        Models of Hugging Face would keep the keys and values of every layer for a next token.
        """
        return {"use_cache": False, **given} if "use_cache" in self._known else given

    def check_number(self, number: int) -> None:
        """Refuse a batch of more parts than `forward` takes, where the model has its own loss.

        Raises:
            TypeError: There are more.
        """
        if self._most is not None and number > self._most:
            raise TypeError(
                f"without a criterion, {self._forward} is called with all parts of a batch and "
                f"must return the loss, but it takes {self._most} of {number}: give one, "
                "module_loss(model, criterion)"
            )

    def of(self, entries: TensorDictBase | Mapping[str, Any], *, has_rest: bool) -> dict[str, Any]:
        """The keyword arguments in the entries of a dict.

        Args:
            entries: The dict.
            has_rest: Whether entries that `forward` does not name are the criterion's.

        Raises:
            TypeError: An entry is not named by `forward`, or one that it needs is missing.
        """
        given = dict(entries.items())
        for name in self._needed:
            if name not in given:
                raise TypeError(
                    f"the batch's entries are keyword arguments: {self._forward} needs {name!r}, "
                    f"got {', '.join(map(str, given))}"
                )
        unknown = [] if self._takes_any else [name for name in given if name not in self._known]
        if unknown and not has_rest:
            raise TypeError(
                f"the batch's entries are keyword arguments: {self._forward} has no "
                f"{unknown[0]!r}, only {', '.join(sorted(self._known))}"
            )
        return {name: value for name, value in given.items() if name not in unknown}


def _impure_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that may draw random numbers or update buffers, depending on their mode."""
    # The base classes of dropout and of batch normalization are private in torch. Without running
    # statistics a normalization is a function of its batch.
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.dropout._DropoutNd)
        or (isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats)
    ]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A value with its floating tensors in another dtype."""

    def cast_leaf(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast_leaf, value)
