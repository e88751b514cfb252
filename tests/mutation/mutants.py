"""Ways to break the update mathematics: in a function, one expression gives way to another."""

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change of one expression.

    Attributes:
        module: Below `funcsgmcmc`.
        where: Qualified name of the function or class.
        old: The expression; its first occurrence there is changed.
        new: What stands in its place.
        error: What kind of mistake it is.
        equivalent: Why it is none after all, and no test can notice; empty if one must.
    """

    module: str
    where: str
    old: str
    new: str
    error: str
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.where}: {self.old} → {self.new}"

    def applied(self, source: str) -> ast.Module:
        """The module's tree with the change.

        Raises:
            ValueError: The function has no such expression, or there is no such function.
        """
        module = ast.parse(source)
        scope: ast.AST = module
        for name in self.where.split("."):
            scope = _definition(scope, name)
        replacement = _Replacement(_expression(self.old), _expression(self.new))
        replacement.visit(scope)
        if not replacement.done:
            raise ValueError(f"{self.module}.{self.where} has no {self.old!r}")
        return ast.fix_missing_locations(module)


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def _definition(scope: ast.AST, name: str) -> ast.AST:
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = getattr(scope, "body", [])
    found = [node for node in body if isinstance(node, kinds) and node.name == name]
    if not found:
        raise ValueError(f"there is no {name} to change")
    return found[-1]  # overloads come before


class _Replacement(ast.NodeTransformer):
    """Puts one expression in the place of the first that equals another."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new, self.done = ast.dump(old), new, False

    def visit(self, node: ast.AST) -> ast.AST:
        if not self.done and isinstance(node, ast.expr) and ast.dump(node) == self.old:
            self.done = True
            return self.new
        return self.generic_visit(node)


def _of(module: str, *changes: tuple[str, ...]) -> list[Mutant]:
    return [Mutant(module, *change) for change in changes]


CONSTANT, SIGN, ROOT, MASK, STATE = "constant", "sign", "root", "mask", "state swapped or stale"
ALIAS, DTYPE, SETTING, NOISE, DROPPED = (
    "aliasing",
    "dtype",
    "wrong setting",
    "noise",
    "term dropped",
)
CHAIN = "chains mixed up"

MUTANTS = [
    *_of(
        "samplers.langevin",
        ("langevin", "lr / 2", "lr", CONSTANT),
        ("langevin", "lr / 2", "lr * 0.51", CONSTANT),
        ("langevin", "lr ** 0.5", "lr", ROOT),
        ("langevin", "lr ** 0.5", "(1.01 * lr) ** 0.5", CONSTANT),
        ("langevin", "lr ** 0.5", "(2 * lr) ** 0.5", CONSTANT),
        ("LangevinSampler.preconditioned", "scaling.gain", "None", DROPPED),
        ("LangevinSampler.preconditioned", "scaling.drift_grads is not None", "False", DROPPED),
        ("LangevinSampler.preconditioned", "scaling.correction is not None", "False", DROPPED),
        (
            "LangevinSampler.preconditioned",
            "cast(Tensor, self.temperature)",
            "cast(Tensor, self.nbeta)",
            SETTING,
        ),
        ("LangevinSampler.preconditioned", "scaling.state", "state.preconditioner", STATE),
        ("LangevinSampler.arrived", "self.boxed(moved, self.center(state))", "moved", DROPPED),
        ("LangevinSampler.arrived", "state.step + 1", "state.step", STATE),
    ),
    *_of(
        "samplers.sgld",
        ("SGLD.advance", "self.noise_level * coefficient", "coefficient", SETTING),
        (
            "SGLD.advance",
            "self.noise_level * coefficient",
            "self.noise_level ** 2 * coefficient",
            ROOT,
        ),
        ("SGLD.advance", "terms.up()", "terms.up()[-1:]", DROPPED),
        ("SGLD.advance", "terms.down()", "terms.down()[:1]", DROPPED),
        (
            "rmsprop_sgld",
            "rmsprop(alpha, eps, curvature=curvature)",
            "rmsprop(eps, alpha + 0.1)",
            SETTING,
        ),
    ),
    *_of(
        "samplers.cyclical_sgld",
        (
            "cyclical_sgld",
            "checks.hyperparameter('lr', lr)",
            "checks.hyperparameter('lr', lr) / 2",
            CONSTANT,
        ),
        ("cyclical_sgld", "weight_decay", "localization", SETTING),
    ),
    *_of(
        "samplers.base",
        ("Sampler.start", "params.clone()", "params", ALIAS),
        ("Sampler.start", "self.anchor is None", "self.anchor is not None", STATE),
        (
            "Sampler.parts",
            "displacement(state.params, self.center(state))",
            "displacement(self.center(state), state.params)",
            SIGN,
        ),
        ("Sampler.parts", "self.center(state)", "state.params", STATE),
        ("Sampler.parts", "torch.add", "torch.sub", SIGN),
        (
            "Sampler.parts",
            "cast(Tensor, self.temperature) ** 0.5",
            "cast(Tensor, self.temperature)",
            ROOT,
        ),
        (
            "Sampler.parts",
            "Term(self.weight_decay, state.params)",
            "Term(self.weight_decay, distance.direction)",
            STATE,
        ),
        ("Sampler.parts", "self.mask", "None", MASK),
        (
            "Sampler.parts",
            "Term(self.localization, distance.direction)",
            "Term(self.weight_decay, distance.direction)",
            SETTING,
        ),
        ("Sampler.at", "setting(step)", "setting(step + 1)", STATE),
        ("Sampler.at", "setting(step)", "setting(0 * step)", STATE),
        (
            "Sampler.center",
            "self.anchor is None",
            "state.anchor is not None",
            STATE,
            "`init` leaves an anchor in the state exactly where the sampler has none",
        ),
        ("Sampler.center", "state.anchor", "state.params", STATE),
        ("boxed", "middle - width", "middle - 2 * width", CONSTANT),
        ("boxed", "middle + width", "middle", DROPPED),
        (
            "boxed",
            "torch.clamp(leaf, middle - width, middle + width).to(leaf.dtype)",
            "torch.clamp(leaf, middle - width, middle + width).double()",
            DTYPE,
        ),
        ("shared_settings", "setting('nbeta', nbeta)", "setting('nbeta', lr)", SETTING),
        (
            "shared_settings",
            "checks.hyperparameter('weight_decay', weight_decay)",
            "checks.hyperparameter('localization', localization)",
            SETTING,
        ),
        (
            "shared_settings",
            "checks.hyperparameter('bounding_box_size', box, exclusive=True)",
            "checks.hyperparameter('bounding_box_size', box)",
            "refusal dropped",
        ),
    ),
    *_of(
        "priors",
        (
            "displacement",
            "tree.widened(leaf) - tree.widened(middle)",
            "tree.widened(leaf) + tree.widened(middle)",
            SIGN,
        ),
        ("displacement", "tree.widened(leaf) - tree.widened(middle)", "leaf - middle", DTYPE),
        (
            "gaussian_pull",
            "tree.expand_right(precision, leaf) * leaf",
            "precision.mean() * leaf",
            CHAIN,
        ),
        ("log_prior_pull", "-value", "value", SIGN),
    ),
    *_of(
        "terms",
        ("Term.value", "tree.widened(leaf)", "leaf.abs()", SIGN),
        ("Terms.down", "self.weight_decay", "self.localization", DROPPED),
        ("Terms.up", "self.correction", "()", DROPPED),
        ("gains", "Gains(mask, mask, mask, mask)", "Gains(mask, mask, None, mask)", MASK),
        ("gains", "Gains(mask, mask, mask, mask)", "Gains(mask, None, mask, mask)", MASK),
        ("gains", "Gains(mask, mask, mask, mask)", "Gains(None, mask, mask, mask)", MASK),
        ("gains", "tree.map_leaves(torch.sqrt, preconditioner)", "preconditioner", ROOT),
        (
            "gains",
            "scaled(tree.map_leaves(torch.sqrt, preconditioner), mask)",
            "tree.map_leaves(torch.sqrt, preconditioner)",
            MASK,
        ),
        ("gains", "scaled(preconditioner, mask)", "preconditioner", MASK),
        (
            "scaled",
            "wide * (factor if factor.dtype == wide.dtype else factor.to(wide.dtype))",
            "leaf.mul_(factor)",
            ALIAS,
        ),
        ("decompose", "diffusion * noise.coefficient", "diffusion", DROPPED),
        ("decompose", "parts.drift_grad or parts.grad", "parts.grad", STATE),
        (
            "decompose",
            "_applied(drift, parts.localization, gains.prior)",
            "_applied(drift, parts.localization, None)",
            MASK,
        ),
        (
            "decompose",
            "_applied(drift, parts.correction, gains.mask)",
            "_applied(drift, parts.correction, gains.grad)",
            MASK,
        ),
        (
            "decompose",
            "_applied(drift, parts.weight_decay, gains.prior)",
            "_applied(diffusion, parts.weight_decay, gains.prior)",
            SETTING,
        ),
        ("_applied", "drift * term.coefficient", "drift", DROPPED),
        ("rescaled", "noise * terms.noise.coefficient", "terms.noise.coefficient", DROPPED),
        ("rescaled", "times(drift, terms.weight_decay)", "terms.weight_decay", DROPPED),
        ("_move_leaf", "((-1, minus), (1, plus))", "((1, minus), (-1, plus))", SIGN),
        ("_move_leaf", "tree.widened(leaf)", "leaf", DTYPE),
        (
            "_move_leaf",
            "torch.addcmul(total, direction, coefficient, value=sign)",
            "total.addcmul_(direction, coefficient, value=sign)",
            ALIAS,
        ),
        ("_move_leaf", "total.to(leaf.dtype)", "total", DTYPE),
    ),
    *_of(
        "metrics",
        ("_from_products", "product[a, a] ** 0.5", "product[a, a]", ROOT),
        ("_from_products", "left * right * product[a, b]", "left * product[a, b]", DROPPED),
        ("_from_products", "norm(_UNSCALED)", "norm(_GRAD)", STATE),
        ("_from_products", "dot(_GRAD, _PRIOR)", "dot(_GRAD, _PRIOR) / 2", CONSTANT),
        ("_measured", "(terms.localization, terms.weight_decay)", "(terms.localization,)", DROPPED),
        (
            "metrics",
            "tree.count(cast(TensorDict, terms.noise.direction), mask)",
            "tree.count(cast(TensorDict, terms.noise.direction))",
            MASK,
        ),
    ),
    *_of(
        "samplers.momentum",
        ("underdamped", "1 - friction.coefficient", "1 + friction.coefficient", SIGN),
        ("underdamped", "2 * diffusion_factor * lr", "diffusion_factor * lr", CONSTANT),
        ("underdamped", "(2 * diffusion_factor * lr) ** 0.5", "2 * diffusion_factor * lr", ROOT),
        ("push", "Term(1.0, momentum)", "Term(1.0, start)", STATE),
        ("push", "(friction, *terms.down())", "terms.down()", DROPPED),
        ("bounced", "-momentum", "momentum", SIGN),
        (
            "bounced",
            "torch.where(inside, momentum, -momentum)",
            "torch.where(inside, -momentum, momentum)",
            SIGN,
        ),
        ("bounced", "boxed(params, center, half_width)", "params", DROPPED),
        ("first_momentum", "variance ** 0.5", "variance", ROOT),
        ("first_momentum", "scaled(noise, mask)", "noise", MASK),
        ("MomentumSampler.init", "first_momentum(noise, variance, self.mask)", "noise", ALIAS),
        ("MomentumSampler.refreshes", "(step + 1) % interval == 0", "step % interval == 0", STATE),
        ("MomentumSampler.pushed", "torch.where(refreshed, 1.0, friction)", "friction", STATE),
        (
            "MomentumSampler.pushed",
            "torch.where(refreshed, 0.5, diffusion_factor)",
            "torch.where(refreshed, 1.0, diffusion_factor)",
            CONSTANT,
        ),
        (
            "ThermostatSampler.init",
            "self.diffusion_factor.expand(start.shape).clone()",
            "0 * self.diffusion_factor.expand(start.shape).clone()",
            STATE,
        ),
        ("MomentumSampler.arrived", "state.step + 1", "state.step", STATE),
    ),
    *_of(
        "samplers.sghmc",
        (
            "SGHMC.momentum_variance",
            "cast(Tensor, self.lr) * cast(Tensor, self.temperature)",
            "cast(Tensor, self.lr)",
            DROPPED,
        ),
        ("SGHMC.advance", "self.friction - self.noise_estimate", "self.friction", DROPPED),
        (
            "SGHMC.advance",
            "self.friction - self.noise_estimate",
            "self.friction + self.noise_estimate",
            SIGN,
        ),
    ),
    *_of(
        "samplers.sgnht",
        ("regulated", "energy / sampled", "energy", DROPPED),
        (
            "regulated",
            "thermostat + energy / sampled - variance",
            "thermostat + energy / sampled - variance ** 0.5",
            ROOT,
        ),
        (
            "regulated",
            "thermostat + energy / sampled - variance",
            "thermostat - energy / sampled + variance",
            SIGN,
        ),
        (
            "SGNHT.advance",
            "tree.dot(momentum, momentum)",
            "tree.dot(state.momentum, state.momentum)",
            STATE,
        ),
        ("SGNHT.advance", "tree.count(state.params, self.mask)", "tree.count(state.params)", MASK),
        ("SGNHT.advance", "state.thermostat", "self.diffusion_factor", STATE),
    ),
    *_of(
        "samplers.splitting",
        (
            "kick",
            "decompose(parts, drift=lr, diffusion=1.0)",
            "decompose(parts, drift=lr / 2, diffusion=1.0)",
            CONSTANT,
        ),
        ("damp", "1 - remaining", "remaining", STATE),
        ("damp", "noise_scale * noise.coefficient", "noise_scale", DROPPED),
        ("drift", "Term(half, kick.momentum)", "Term(half, momentum)", STATE),
        ("drift", "lr / 2", "lr", CONSTANT),
        ("position_terms", "lr * (1 + remaining) / 2", "lr * (1 - remaining) / 2", SIGN),
        ("position_terms", "lr * noise_scale / 2", "lr * noise_scale", CONSTANT),
    ),
    *_of(
        "samplers.baoa",
        ("BAOA.advance", "torch.exp(-self.friction * lr)", "1 - self.friction * lr", "first order"),
        ("BAOA.advance", "-2 * self.friction * lr", "-self.friction * lr", CONSTANT),
        (
            "BAOA.advance",
            "(-torch.expm1(-2 * self.friction * lr)) ** 0.5",
            "-torch.expm1(-2 * self.friction * lr)",
            ROOT,
        ),
        ("BAOA.advance", "torch.where(refreshed, 0.0, remaining)", "remaining", STATE),
        (
            "BAOA.momentum_variance",
            "cast(Tensor, self.temperature)",
            "cast(Tensor, self.temperature) ** 2",
            ROOT,
        ),
    ),
    *_of(
        "samplers.badoda",
        ("BADODA.half_step", "lr / 2", "lr", CONSTANT),
        ("BADODA.half_step", "lr / 2 * excess / self.thermostat_mass", "lr / 2 * excess", DROPPED),
        (
            "BADODA.half_step",
            "tree.count(state.params, self.mask)",
            "tree.count(state.params)",
            MASK,
        ),
        ("BADODA.half_step", "sampled > 0", "sampled >= 0", MASK),
        (
            "BADODA.advance",
            "friction + self.half_step(state, momentum)",
            "friction + self.half_step(state, kicked.momentum)",
            STATE,
        ),
        (
            "BADODA.advance",
            "state.thermostat + self.half_step(state, kicked.momentum)",
            "state.thermostat",
            DROPPED,
        ),
        ("ornstein_uhlenbeck", "-2 * friction * lr", "-friction * lr", CONSTANT),
        ("ornstein_uhlenbeck", "2 * lr", "lr", CONSTANT),
        (
            "ornstein_uhlenbeck",
            "(diffusion_factor * time) ** 0.5",
            "diffusion_factor * time ** 0.5",
            ROOT,
        ),
        ("ornstein_uhlenbeck", "friction == 0", "friction <= 0", SIGN),
    ),
    *_of(
        "samplers.sglrw",
        (
            "lattice_move",
            "torch.where(up, spacing, -spacing)",
            "torch.where(up, -spacing, spacing)",
            SIGN,
        ),
        ("lattice_move", "(1 - fall / spacing) / 2", "(1 + fall / spacing) / 2", SIGN),
        ("lattice_move", "fall / spacing", "2 * fall / spacing", CONSTANT),
        ("mean_fall", "[terms.correction] if terms.correction else []", "[]", DROPPED),
        ("spacing", "terms.noise.coefficient", "terms.noise.coefficient ** 2", ROOT),
        ("SGLRW.advance", "torch.add", "torch.sub", SIGN),
    ),
    *_of(
        "samplers.contour_sgld",
        (
            "EnergyPartition.locate",
            "(energy - self.low) / self.width + 1",
            "(energy - self.low) / self.width",
            CONSTANT,
        ),
        ("EnergyPartition.locate", "place - part", "place - part + 0.1", CONSTANT),
        (
            "ContourSGLD.advance",
            "self.flatness * temperature * rise / self.partition.width",
            "self.flatness * rise / self.partition.width",
            DROPPED,
        ),
        ("ContourSGLD.advance", "1 + slope", "1 - slope", SIGN),
        (
            "ContourSGLD.advance",
            "log_density(theta, part, share)",
            "log_density(state.theta, part, share)",
            STATE,
        ),
        ("ContourSGLD.advance", "self.flatness * log_psi", "log_psi", DROPPED),
        ("ContourSGLD.energy", "pulls / 2", "pulls", CONSTANT),
        (
            "ContourSGLD.energy",
            "potential - log_prior.double()",
            "potential + log_prior.double()",
            SIGN,
        ),
        (
            "reweighted",
            "theta.gather(-1, part) ** flatness.unsqueeze(-1)",
            "theta.gather(-1, part)",
            DROPPED,
        ),
        ("reweighted", "is_here.to(theta.dtype) - theta", "is_here.to(theta.dtype)", DROPPED),
        ("log_density", "(part - 1).clamp(min=0)", "part", STATE),
    ),
    *_of(
        "preconditioners",
        ("mixed", "1 - beta", "beta", STATE),
        ("mixed", "tree.widened(value)", "value", DTYPE),
        ("square_average", "tree.widened(grad).square()", "tree.widened(grad).abs()", ROOT),
        ("rmsprop_gain", "average.sqrt()", "average", ROOT),
        ("rmsprop_gain", "tree.expand_right(eps, average)", "1e-08", SETTING),
        (
            "rmsprop_curvature",
            "-forget * grad * hessian * gain.square() / average.sqrt()",
            "forget * grad * hessian * gain.square() / average.sqrt()",
            SIGN,
        ),
        ("rmsprop_curvature", "gain.square()", "gain", ROOT),
        ("rmsprop_curvature", "1 - alpha", "1", CONSTANT),
        ("rmsprop_curvature", "average > 0", "average >= 0", "not a number"),
        ("_unbiased", "1 - beta ** count", "1 - beta", STATE),
        (
            "Adam.update",
            "mixed(state['first'], grads, self.beta1)",
            "mixed(state['first'], grads, self.beta2)",
            SETTING,
        ),
        ("Adam.update", "state['count'] + 1", "state['count'] + 2", STATE),
        (
            "Composite.update",
            "((a.correction, b.gain), (b.correction, a.gain))",
            "((a.correction, a.gain), (b.correction, b.gain))",
            STATE,
        ),
        ("Composite.update", "reduce(_times, gains)", "gains[0]", DROPPED),
        ("_zeros", "tree.working_dtype(leaf)", "leaf.dtype", DTYPE),
    ),
    *_of(
        "schedules",
        ("PolynomialDecay.__call__", "-self.power", "self.power", SIGN),
        ("PolynomialDecay.__call__", "self.offset + step", "1 + step", SETTING),
        (
            "Cosine.__call__",
            "(step / self.num_steps).clamp(max=1)",
            "step / self.num_steps",
            CONSTANT,
        ),
        ("Cosine.__call__", "self.start - self.end", "self.start", DROPPED),
        (
            "SamplingPhases.__call__",
            "_share_of_cycle(step, self.num_steps_per_cycle) < self.exploration",
            "_share_of_cycle(step, self.num_steps_per_cycle) <= self.exploration",
            CONSTANT,
        ),
        ("_half_cosine", "math.pi * share", "2 * math.pi * share", CONSTANT),
        ("_share_of_cycle", "step % num_steps_per_cycle", "step", STATE),
    ),
    *_of(
        "tree",
        ("expand_right", "value.to(working_dtype(leaf))", "value.to(leaf.dtype)", DTYPE),
        (
            "dot",
            "leaf.to(dtype) * b[name].to(dtype)",
            "leaf.to(dtype) * b[name].to(dtype).abs()",
            SIGN,
        ),
        ("_sum_over_leaf", "range(chains, leaf.ndim)", "range(leaf.ndim)", CHAIN),
        ("count", "mask.batch_dims", "0", CHAIN),
        ("unflatten", "stop", "start", NOISE),
        ("normal_like", "noise_dtype(like)", "torch.float32", DTYPE),
    ),
    *_of(
        "random",
        ("normal", "math.pi * 2.0 ** -31", "math.pi * 2.0 ** -32", NOISE),
        ("normal", "uniform.log_().mul_(-2)", "uniform.log_().mul_(-2.02)", NOISE),
        ("normal", "angle.sin_()", "angle.cos()", NOISE),
        ("threefry2x32", "round_ % 4 == 3", "round_ % 4 == 2", NOISE),
        ("fold_in", "_as_word((wide >> 32) | _FOLD)", "_as_word(wide >> 32)", NOISE),
    ),
    *_of(
        "kernel",
        ("step_noise", "random.fold_in(key, step)", "key", "key used again"),
        (
            "step_noise",
            "random.fold_in(key, step)",
            "random.fold_in(key, step // 2)",
            "key used again",
        ),
    ),
    *_of(
        "running",
        (
            "Run.add_chunks",
            "random.fold_in(self.key, self.chains)",
            "random.fold_in(self.key, 0 * self.chains)",
            "key used again",
        ),
    ),
    *_of(
        "sampling",
        (
            "sample",
            "random.fold_in(momentum_key, chains)",
            "random.fold_in(start_key, chains)",
            "key used again",
        ),
    ),
]
