"""`SGMCMC`: SGLD, RMSprop-SGLD and SGNHT with priors and preconditioners, as an optimizer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from funcsgmcmc import checks
from funcsgmcmc.compat.groups import Group, settings, warn_of_settings
from funcsgmcmc.compat.optimizer import SamplingOptimizer
from funcsgmcmc.compat.preconditioner import (
    NHTPreconditioning,
    Preconditioner,
    RMSpropPreconditioner,
    check_unsharded,
    mask_of,
    members,
    preconditioner_of,
    start_averages,
    thermostat_of,
)
from funcsgmcmc.compat.prior import Prior, gaussians, prior_of, pulls, share_initial
from funcsgmcmc.compat.sgnht import Thermostat, start_thermostat
from funcsgmcmc.compat.shards import localized, noise_of
from funcsgmcmc.compat.step import (
    StepInputs,
    StepReport,
    dense_grad,
    evaluate,
    langevin_step_,
    not_traced,
)
from funcsgmcmc.priors import displacement
from funcsgmcmc.shards import is_sharded, local
from funcsgmcmc.terms import Slope, Term

SamplingMethodLiteral = Literal["sgld", "rmsprop_sgld", "sgnht"]


class SGMCMC(SamplingOptimizer):
    """Stochastic gradient MCMC with a prior and a diagonal preconditioner.

        w' = w − (ε/2) m [G (nβ g − ∇log p(w)) − Γ] + √ε m √G σ η,    η ~ N(0, I)

    clamped to [w₀ − b, w₀ + b] if b is given; with `NHTPreconditioning`, steps of SGNHT (see
    `compat.sgnht`). g is the gradient in `.grad`; parameters where it is None stay where they are,
    and w₀ are the parameters when their group was added. Make one by `SGMCMC.sgld`,
    `SGMCMC.rmsprop_sgld` or `SGMCMC.sgnht`, which choose prior and preconditioner.

    The noise is drawn parameter by parameter, in the order of the groups, in the default dtype.

    Args:
        params: Parameters, or dicts of parameter groups with settings of their own.
        lr: Step size ε ≥ 0, in units of w².
        noise_level: σ ≥ 0. Other than 1 samples another distribution.
        nbeta: Inverse temperature nβ ≥ 0, or a function that gives it, called at every step.
        prior: p: a `Prior`; "initial" for a Gaussian around the initial parameters; a number for
            its precision; an iterable of tensors, one a parameter, for its centre; None for none.
            The precision is 1 if not given; a group may set it, under the name `localization`.
        preconditioner: G: a `Preconditioner`, "identity", "rmsprop", or None for the identity.
        preconditioner_kwargs: Settings of a preconditioner that is given by name.
        bounding_box_size: Half-width b of the box; None for no box.
        mask: m, 0 where an entry stays: one tensor for each parameter of the group, of its shape;
            a bare tensor for a group of one parameter.
        save_metrics: Whether to keep each step's norms and inner products for `get_metrics`.
        sketch_dim: Number of entries of each of a step's sketches, for `get_sketches`.
        sketch_seed: Names the sketch.

    Raises:
        TypeError, ValueError: A setting or a parameter is of the wrong type or out of its range.

    Sources: Welling and Teh 2011 (SGLD), Li et al. 2016 (preconditioner), Ding et al. 2014 (SGNHT),
    Lau et al. 2023 (localization); the equations with their numbers are in `funcsgmcmc.samplers`.
    """

    def __init__(
        self,
        params,
        *,
        lr: float = 0.01,
        noise_level: float = 1.0,
        nbeta: float = 1.0,
        prior: Prior | Literal["initial"] | Iterable[Tensor] | float | None = None,
        preconditioner: Preconditioner | Literal["identity", "rmsprop"] | None = "identity",
        preconditioner_kwargs: dict | None = None,
        bounding_box_size: float | None = None,
        mask: Tensor | None = None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ):
        if isinstance(preconditioner, Preconditioner) and preconditioner_kwargs:
            raise ValueError(
                "preconditioner_kwargs are for a preconditioner given by name, "
                f"got {preconditioner_kwargs} beside {preconditioner}"
            )
        defaults = {
            "lr": lr,
            "noise_level": noise_level,
            "nbeta": nbeta,
            "prior": prior,
            "preconditioner": preconditioner,
            "preconditioner_kwargs": preconditioner_kwargs or {},
            "bounding_box_size": bounding_box_size,
            "mask": mask,
        }
        # As published, one bare tensor or group will do, which the older classes refuse.
        groups: Any = [params] if isinstance(params, Tensor | dict) else params
        super().__init__(
            groups,
            defaults,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
        )

    def _start_group(self, group: Group) -> None:
        super()._start_group(group)
        params = group["params"]
        group["prior"] = prior_of(group["prior"], group.get("localization", 0.0))
        group["preconditioner"] = preconditioner_of(
            group["preconditioner"], group.pop("preconditioner_kwargs"), group["mask"], params
        )
        check_unsharded(group["preconditioner"], params)
        remembered = {} if group["prior"] is None else group["prior"].initialize(list(params))
        # A copy of the parameters, which only a box and metrics read; None without, as published.
        keeps_initial = group["bounding_box_size"] is not None or self.save_metrics
        for index, param in enumerate(params):
            initial = local(param.detach()).clone() if keeps_initial else None
            self.state[param] |= localized(remembered.get(param, {}), param)
            self.state[param] |= {"param_idx": index, "initial_param": initial}
            share_initial(group["prior"], self.state[param])
            if is_sharded(param):
                start_averages(group["preconditioner"], self.state[param], local(param.detach()))
        nht = thermostat_of(group["preconditioner"])
        if nht is not None:
            # In the group, where `settings` reads it and a group's own value wins.
            group.setdefault("diffusion_factor", nht.diffusion_factor)
            start_thermostat(
                group, self.state, [mask_of(group["preconditioner"], i) for i in range(len(params))]
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as `SamplingOptimizer.load_state_dict` does, with its errors."""
        super().load_state_dict(state_dict)
        # Loading makes copies: a centre and w₀ are two tensors again.
        for group in self.param_groups:
            for param in group["params"]:
                share_initial(group["prior"], self.state[param])

    @torch.no_grad()
    def step(self, closure=None, noise_generator: Generator | None = None) -> None:
        """Make one step.

        Parameters may be sharded over processes (`fully_shard`): the chain is that of the whole
        parameters.

        Args:
            closure: Evaluates the model anew and returns the loss.
            noise_generator: Where the noise is drawn from (default: the global generator). Or a key
                of the step (`fs.random.fold_in(fs.key(seed), step)`), which names each entry's
                noise: of sharded parameters a process then draws its own part only, and else the
                whole of each, of which it keeps its part.

        Returns:
            The closure's loss; None without one.
        """
        if torch.compiler.is_compiling():
            return self._untraced_step(closure, noise_generator, self._untraced_inputs)
        return self._make_step(closure, noise_generator, self._inputs)

    def _make_step(self, closure: Any, generator: Any, inputs_of: Callable[..., StepInputs]) -> Any:
        """Make one step, with a function that finds the ingredients of a parameter's."""
        loss = evaluate(closure)
        self._check_graphs()  # before anything moves
        self.check_noise(generator)
        for group, now in zip(self.param_groups, settings(self.param_groups), strict=True):
            report = StepReport(self, group)
            half_width = group["bounding_box_size"]
            thermostat = Thermostat(group, now) if thermostat_of(group["preconditioner"]) else None
            for param in group["params"]:
                if param.grad is None:  # as published, draws no noise
                    continue
                self.follow(param)
                report.begin(param)
                # The data is unseen by autograd, as published.
                state, w = self.state[param], local(param.data)
                inputs = inputs_of(group, param, now, generator)
                if thermostat is None:
                    initial = state["initial_param"]
                    langevin_step_(w, initial, inputs, now["lr"], half_width, report)
                else:
                    thermostat.step_(param, state, inputs, half_width, report)
                del inputs  # so that two parameters' temporaries are never held at once
            report.finish()
            if thermostat is not None:
                thermostat.finish()
        return loss  # despite the annotation, which is the published one

    def _check_graphs(self) -> None:
        """Refuse gradients without a graph where a preconditioner needs their derivatives.

        One gradient with a graph shows that all were made so; a parameter that enters the loss
        linearly has none.
        """
        wanted = any(
            getattr(each, "add_grad_correction", False)
            for group in self.param_groups
            for each in members(group["preconditioner"])
        )
        if not wanted:
            return
        grads = [param.grad for param in self.get_params() if param.grad is not None]
        if grads and not any(grad.requires_grad for grad in grads):
            raise ValueError(
                "add_grad_correction needs gradients with a graph, from "
                "backward(create_graph=True), got gradients without one"
            )

    def _inputs(
        self,
        group: Group,
        param: Tensor,
        now: dict[str, float],
        generator: Generator | Tensor | None,
    ) -> StepInputs:
        """The ingredients of one parameter's step."""
        state, grad = self.state[param], dense_grad(param)
        w = local(param.data)
        # `param` itself, not its data: a curvature term differentiates with respect to it.
        differentiable = w if is_sharded(param) else param
        coefs = group["preconditioner"].get_coefficients(differentiable, grad, state)
        pulled = pulls(group["prior"], w, state)
        distance = pulled.from_initial
        if self.save_metrics and distance is None:  # no pull has computed it
            distance = Term(1.0, displacement(w, state["initial_param"]))
        mask, force = coefs.mask(w), Term(now["nbeta"], grad)
        return StepInputs(
            slope=Slope(force, pulled.localization, pulled.weight_decay, distance),
            factors=coefs.factors(w, mask),
            # After coefficients and pulls, as published: both may draw from the global generator.
            noise=noise_of(param, generator, self.place),
            noise_level=now["noise_level"],
            mask=mask,
        )

    _untraced_step, _untraced_inputs = not_traced(_make_step), not_traced(_inputs)

    def get_params(self) -> Iterator[Tensor]:
        """All parameters, in the order of the groups."""
        for group in self.param_groups:
            yield from group["params"]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.get_params()).device

    @classmethod
    def sgld(
        cls,
        params,
        lr=0.01,
        noise_level=1.0,
        weight_decay=0.0,
        localization=0.0,
        nbeta=1.0,
        bounding_box_size=None,
        mask=None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ):
        """Make a sampler of localized, tempered SGLD (Welling and Teh 2011; Lau et al. 2023).

            w' = w − (ε/2) m [nβ g + γ (w − w₀) + λ w] + √ε m σ η

        Args:
            params: Parameters, or dicts of parameter groups.
            lr: Step size ε ≥ 0.
            noise_level: σ ≥ 0; other than 1 warns.
            weight_decay: Precision λ ≥ 0 of the pull to zero.
            localization: Precision γ ≥ 0 of the pull to the initial parameters.
            nbeta: Inverse temperature nβ ≥ 0, or a function that gives it; 1 warns.
            bounding_box_size: Half-width b of the box; None for no box.
            mask: m, as for `SGMCMC`.
            save_metrics: As for `SGMCMC`.
            sketch_dim: As for `SGMCMC`.
            sketch_seed: As for `SGMCMC`.

        Raises:
            TypeError, ValueError: As `SGMCMC`.
        """
        warn_of_settings(nbeta, noise_level)
        return cls(
            params,
            lr=lr,
            noise_level=noise_level,
            nbeta=nbeta,
            prior=gaussians(weight_decay, localization),
            bounding_box_size=bounding_box_size,
            mask=mask,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
        )

    @classmethod
    def rmsprop_sgld(
        cls,
        params,
        lr=0.01,
        noise_level=1.0,
        weight_decay=0.0,
        localization=0.0,
        nbeta=1.0,
        alpha=0.99,
        eps=0.1,
        add_grad_correction=False,
        bounding_box_size=None,
        mask=None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ):
        """Make a sampler of SGLD preconditioned by RMSprop (Li et al. 2016).

            V' = α V + (1 − α) g²,    G = 1/(√V' + eps)
            w' = w − (ε/2) m [G (nβ g + γ (w − w₀) + λ w) − Γ] + √ε m √G σ η

        Args:
            params: As for `sgld`.
            lr: As for `sgld`.
            noise_level: As for `sgld`.
            weight_decay: As for `sgld`.
            localization: As for `sgld`.
            nbeta: As for `sgld`.
            alpha: α in [0, 1], memory of the running average; at 1, V stays 0.
            eps: eps ≥ 0, in units of the gradient.
            add_grad_correction: Whether to add Γ = ∂G/∂w, which asks for gradients made with
                `backward(create_graph=True)`; without it Γ is 0.
            bounding_box_size: As for `sgld`.
            mask: As for `SGMCMC`.
            save_metrics: As for `SGMCMC`.
            sketch_dim: As for `SGMCMC`.
            sketch_seed: As for `SGMCMC`.

        Raises:
            TypeError, ValueError: As `SGMCMC`.
        """
        warn_of_settings(nbeta, noise_level)
        return cls(
            params,
            lr=lr,
            noise_level=noise_level,
            nbeta=nbeta,
            prior=gaussians(weight_decay, localization),
            preconditioner=RMSpropPreconditioner(alpha, eps, add_grad_correction),
            bounding_box_size=bounding_box_size,
            mask=mask,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
        )

    @classmethod
    def sgnht(
        cls,
        params,
        lr=0.01,
        diffusion_factor=0.01,
        nbeta=1.0,
        bounding_box_size=None,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ):
        """Make a sampler of the Nosé–Hoover thermostat (Ding et al. 2014); see `compat.sgnht`.

            p' = (1 − ξ) (p − ε nβ g) + √(2Aε) η,    w' = w + p',    ξ' = ξ + ‖p'‖²/d − ε

        Args:
            params: As for `sgld`.
            lr: ε ≥ 0.
            diffusion_factor: A ≥ 0; a group may set its own.
            nbeta: As for `sgld`.
            bounding_box_size: As for `sgld`.
            save_metrics: As for `SGMCMC`.
            sketch_dim: As for `SGMCMC`.
            sketch_seed: As for `SGMCMC`.

        Raises:
            TypeError, ValueError: As `SGMCMC`.
        """
        warn_of_settings(nbeta)
        return cls(
            params,
            lr=lr,
            nbeta=nbeta,
            preconditioner=NHTPreconditioning(diffusion_factor),
            bounding_box_size=bounding_box_size,
            save_metrics=save_metrics,
            sketch_dim=sketch_dim,
            sketch_seed=sketch_seed,
        )

    @classmethod
    def get_method(cls, method: SamplingMethodLiteral):
        """The factory of a method, by its name.

        Raises:
            ValueError: The name is none of "sgld", "rmsprop_sgld" and "sgnht".
        """
        return getattr(cls, checks.choice("method", method, get_args(SamplingMethodLiteral)))
