"""Ways to break the update mathematics; a single capital letter stands for any expression."""

from mutant import Mutant


def _of(where: str, *changes: tuple[str, ...]) -> list[Mutant]:
    return [Mutant(where, *change) for change in changes]


CONSTANT, SIGN, ROOT, MASK, STATE = "constant", "sign", "root", "mask", "state swapped or stale"
ALIAS, DTYPE, SETTING, NOISE, DROPPED = (
    "aliasing",
    "dtype",
    "wrong setting",
    "noise",
    "term dropped",
)
CHAIN, KEY, NAN, FIRST_ORDER, REFUSAL = (
    "chains mixed up",
    "key used again",
    "not a number",
    "first order",
    "refusal dropped",
)

MUTANTS = [
    # What all overdamped samplers share.
    *_of(
        "LangevinSampler.factors",
        ("scaling.gain", "None", DROPPED),
        ("self.mask", "None", MASK),
        ("scaling.drift_grads is not None", "False", DROPPED),
        ("scaling.correction is not None", "False", DROPPED),
        ("Term(self.nbeta, X)", "Term(self.temperature, X)", SETTING),
        ("Term(self.temperature, X)", "Term(self.nbeta, X)", SETTING),
        ("scaled(X, self.mask)", "X", MASK),
        ("scaling.state", "state.preconditioner", STATE),
    ),
    *_of(
        "SGLD.advance",
        ("self.lr / 2", "self.lr", CONSTANT),
        ("self.lr / 2", "self.lr * 0.51", CONSTANT),
        ("X ** 0.5 * self.noise_level", "X * self.noise_level", ROOT),
        ("(self.lr * X) ** 0.5", "(1.01 * self.lr * X) ** 0.5", CONSTANT),
        ("(self.lr * X) ** 0.5", "(2 * self.lr * X) ** 0.5", CONSTANT),
        ("self.lr * self.temperature", "self.lr", SETTING),
        ("self.lr * self.temperature", "self.lr * self.temperature ** 2", ROOT),
        ("X * self.noise_level", "X", SETTING),
        ("X * self.noise_level", "X * self.noise_level ** 2", ROOT),
        ("self.boxed(X, Y)", "X", DROPPED),
        ("state.step + 1", "state.step", STATE),
        (
            "state.replace(params=X, preconditioner=Y, step=Z)",
            "state.replace(params=X, step=Z)",
            STATE,
        ),
    ),
    *_of(
        "rmsprop_sgld",
        ("rmsprop(alpha, eps, curvature=X)", "rmsprop(eps, alpha + 0.1)", SETTING),
        (
            "sgld(lr, noise_level=noise_level, preconditioner=X, **shared)",
            "sgld(lr, preconditioner=X, **shared)",
            SETTING,
        ),
    ),
    *_of(
        "cyclical_sgld",
        ("checks.hyperparameter('lr', lr)", "checks.hyperparameter('lr', lr) / 2", CONSTANT),
        ("sgld(X, preconditioner=preconditioner, **shared)", "sgld(X, **shared)", SETTING),
        (
            "sampling_phases(X, num_steps_per_cycle=Y, exploration=Z)",
            "sampling_phases(X, num_steps_per_cycle=Y)",
            SETTING,
        ),
    ),
    # The contract.
    *_of(
        "Sampler.start",
        ("params.clone()", "params", ALIAS),
        ("self.anchor is None", "self.anchor is not None", STATE),
    ),
    *_of(
        "Sampler.slope",
        ("displacement(X, Y)", "displacement(Y, X)", SIGN),
        ("self.center(state)", "state.params", STATE),
        ("torch.add", "torch.sub", SIGN),
        ("Term(self.nbeta, X)", "Term(self.temperature, X)", SETTING),
        (
            "Term(self.weight_decay, state.params)",
            "Term(self.weight_decay, distance.direction)",
            STATE,
        ),
        (
            "Term(self.localization, distance.direction)",
            "Term(self.weight_decay, distance.direction)",
            SETTING,
        ),
        ("gaussian_pull(X, self.localization)", "gaussian_pull(X, self.weight_decay)", SETTING),
    ),
    *_of(
        "Sampler.at",
        ("setting(step)", "setting(step + 1)", STATE),
        ("setting(step)", "setting(0 * step)", STATE),
        ("setting(step)", "setting(step.clamp(max=4))", STATE),
    ),
    *_of(
        "Sampler.center",
        (
            "self.anchor is None",
            "state.anchor is not None",
            STATE,
            "`init` leaves an anchor in the state exactly where the sampler has none",
        ),
        ("state.anchor", "state.params", STATE),
    ),
    *_of(
        "clamp_leaf",
        ("X - width", "X - 2 * width", CONSTANT),
        ("X + width", "X", DROPPED),
        ("X.to(leaf.dtype)", "X.double()", DTYPE),
    ),
    *_of(
        "settings.build",
        ("setting('lr', lr)", "setting('lr', lr) * 1.02", CONSTANT),
        ("each.check(X, given.get(X, each.default))", "each.check(X, each.default)", SETTING),
    ),
    *_of(
        "_half_width",
        ("checks.hyperparameter(X, Y, exclusive=True)", "checks.hyperparameter(X, Y)", REFUSAL),
    ),
    # The potential and the terms of a step.
    *_of(
        "displacement",
        ("tree.widened(leaf) - tree.widened(X)", "tree.widened(leaf) + tree.widened(X)", SIGN),
        ("tree.widened(leaf) - tree.widened(X)", "leaf - X", DTYPE),
    ),
    *_of("gaussian_pull", ("view(leaf) * leaf", "precision.mean() * leaf", CHAIN)),
    *_of("log_prior_pull", ("-X", "X", SIGN)),
    *_of("Term.value", ("tree.widened(leaf)", "leaf.abs()", SIGN)),
    *_of("Term.times", ("factor * self.coefficient", "self.coefficient", DROPPED)),
    *_of("Terms.down", ("self.weight_decay", "self.localization", DROPPED)),
    *_of(
        "Terms.up",
        ("self.correction", "None", DROPPED),
        ("self.momentum", "None", DROPPED),
    ),
    *_of("Terms.total", ("self.down()", "self.down()[:1]", DROPPED)),
    *_of(
        "Terms.rescaled",
        ("self.noise.times(noise)", "self.noise", DROPPED),
        ("times(drift, self.weight_decay)", "self.weight_decay", DROPPED),
        ("times(drift, self.localization)", "times(noise, self.localization)", SETTING),
    ),
    *_of(
        "diagonal_factors",
        ("Factors(mask, mask, mask)", "Factors(mask, mask, None)", MASK),
        ("Factors(mask, mask, mask)", "Factors(mask, None, mask)", MASK),
        ("Factors(mask, mask, mask)", "Factors(None, mask, mask)", MASK),
        ("tree.map_leaves(torch.sqrt, X)", "X", ROOT),
        ("Factors(X, X, scaled(Y, mask))", "Factors(X, X, Y)", MASK),
        ("scaled(preconditioner, mask)", "preconditioner", MASK),
    ),
    *_of("scaled", ("wide * X", "wide.mul_(X)", ALIAS)),
    *_of(
        "step_terms",
        (
            "Term(shock.coefficient, scaled(shock.direction, X))",
            "Term(1.0, scaled(shock.direction, X))",
            DROPPED,
        ),
        ("scaled(shock.direction, X)", "shock.direction", MASK),
        ("factors.drift_grad or slope.grad", "slope.grad", STATE),
        (
            "_applied(drift, slope.localization, X)",
            "_applied(drift, slope.localization, None)",
            MASK,
        ),
        (
            "_applied(drift, factors.correction, None)",
            "_applied(drift, factors.correction, factors.grad)",
            MASK,
        ),
        (
            "_applied(drift, slope.weight_decay, X)",
            "_applied(shock.coefficient, slope.weight_decay, X)",
            SETTING,
        ),
        ("_applied(drift, slope.grad, None)", "_applied(drift, slope.grad, factors.grad)", MASK),
    ),
    *_of("_applied", ("drift * X", "drift", DROPPED)),
    *_of("terms.combine", ("(-1, term)", "(1, term)", SIGN)),
    *_of(
        "_combine_leaf",
        ("tree.widened(leaf)", "leaf", DTYPE),
        ("torch.addcmul(X, Y, Z, value=V)", "X.addcmul_(Y, Z, value=V)", ALIAS),
        ("X.to(leaf.dtype)", "X", DTYPE),
    ),
    # Metrics.
    *_of("norms.metrics", ("tree.count(X, mask)", "tree.count(X)", MASK)),
    *_of(
        "_from_products",
        ("X ** 0.5", "X", ROOT),
        ("left * right * X", "left * X", DROPPED),
        ("norm(_UNSCALED)", "norm(_GRAD)", STATE),
        ("dot(_GRAD, _PRIOR)", "dot(_GRAD, _PRIOR) / 2", CONSTANT),
    ),
    *_of(
        "_measured", ("(terms.localization, terms.weight_decay)", "(terms.localization,)", DROPPED)
    ),
    # Momenta.
    *_of(
        "MomentumSampler.euler_terms",
        ("1 - friction", "1 + friction", SIGN),
        ("2 * diffusion_factor", "diffusion_factor", CONSTANT),
        ("X ** 0.5", "X", ROOT),
        ("renewal * self.momentum_variance()", "renewal", DROPPED),
        ("Term(remaining, X)", "Term(1 - friction, X)", STATE),
        ("self.lr", "self.lr / 2", CONSTANT),
    ),
    *_of(
        "momentum.reflect_at_box",
        ("-momentum", "momentum", SIGN),
        ("torch.where(X, momentum, Y)", "torch.where(X, Y, momentum)", SIGN),
        ("clamp_to_box(X, Y, Z)", "X", DROPPED),
    ),
    *_of(
        "fresh_momentum",
        ("variance ** 0.5", "variance", ROOT),
        ("scaled(noise, mask)", "noise", MASK),
    ),
    *_of(
        "MomentumSampler.start_with_momentum",
        ("fresh_momentum(noise, X, Y)", "noise", ALIAS),
        ("self.at(X)", "self.at(X + 1)", STATE),
    ),
    *_of(
        "MomentumSampler.with_refresh",
        ("(step + 1) % X == 0", "step % X == 0", STATE),
        ("(step + 1) % X == 0", "step + 1 == X", STATE),
        ("torch.where(X, 0.0, remaining)", "remaining", STATE),
        ("torch.where(X, 1.0, renewal)", "torch.where(X, 2.0, renewal)", CONSTANT),
        ("torch.where(X, 1.0, renewal)", "renewal", STATE),
    ),
    *_of("MomentumSampler.mask_factors", ("self.mask", "None", MASK)),
    *_of(
        "ThermostatSampler.init",
        ("self.diffusion_factor.expand(X)", "0 * self.diffusion_factor.expand(X)", STATE),
    ),
    *_of("SGHMC.momentum_variance", ("self.lr * self.temperature", "self.lr", DROPPED)),
    *_of(
        "SGHMC.advance",
        ("self.friction - self.noise_estimate", "self.friction", DROPPED),
        ("self.friction - self.noise_estimate", "self.friction + self.noise_estimate", SIGN),
        ("Term(1.0, momentum)", "Term(1.0, state.momentum)", STATE),
        ("self.reflect_at_box(state, X, Y)", "(X, Y)", DROPPED),
        ("state.step + 1", "state.step", STATE),
    ),
    *_of(
        "SGNHT.momentum_variance",
        ("self.lr * self.temperature", "self.lr * self.temperature ** 2", ROOT),
    ),
    *_of(
        "SGNHT.advance_entries",
        ("state.thermostat", "self.diffusion_factor", STATE),
        ("Term(1.0, momentum)", "Term(1.0, state.momentum)", STATE),
    ),
    *_of(
        "SGNHT.couple",
        ("before.thermostat", "self.diffusion_factor", STATE),
        ("self.mean_energy(moved.momentum)", "self.mean_energy(before.momentum)", STATE),
    ),
    *_of(
        "update_in_pieces",
        ("settings.couple(X, Y)", "Y", DROPPED),
        ("piece.of(settings)", "settings", MASK),
    ),
    *_of(
        "next_thermostat",
        ("X - variance", "X - variance ** 0.5", ROOT),
        ("thermostat + X - variance", "thermostat - X + variance", SIGN),
    ),
    *_of(
        "ThermostatSampler.mean_energy",
        ("energy(momentum, self.mask)", "energy(momentum, None)", MASK),
        ("tree.count(momentum, self.mask)", "tree.count(momentum)", MASK),
        ("X / num_sampled", "X", DROPPED),
    ),
    *_of("_inverse", ("1 / factor", "factor", STATE)),
    # Splittings.
    *_of("kick", ("force.down()", "force.down()[:1]", DROPPED)),
    *_of(
        "damp",
        ("Term(remaining, X)", "Term(1 - remaining, X)", STATE),
        ("renewal ** 0.5", "renewal", ROOT),
    ),
    *_of(
        "position_terms",
        ("lr * (1 + remaining) / 2", "lr * (1 - remaining) / 2", SIGN),
        ("lr * renewal ** 0.5 / 2", "lr * renewal ** 0.5", CONSTANT),
        ("Term(carried, X)", "Term(lr, X)", STATE),
    ),
    *_of(
        "BAOA.advance",
        ("torch.exp(-self.friction * self.lr)", "1 - self.friction * self.lr", FIRST_ORDER),
        ("-2 * self.friction * self.lr", "-self.friction * self.lr", CONSTANT),
        ("self.temperature ** 0.5", "self.temperature", ROOT),
        ("step_terms(X, Y, Z, drift=self.lr)", "step_terms(X, Y, Z, drift=self.lr / 2)", CONSTANT),
        ("Term(self.lr / 2, kicked)", "Term(self.lr / 2, momentum)", STATE),
        ("Term(self.lr / 2, kicked)", "Term(self.lr, kicked)", CONSTANT),
        ("Term(self.lr / 2, momentum)", "Term(self.lr / 2, kicked)", STATE),
        ("damp(kicked, X, Y, Z)", "damp(state.momentum, X, Y, Z)", STATE),
        ("self.reflect_at_box(state, X, Y)", "(X, Y)", DROPPED),
    ),
    *_of(
        "BAOA.momentum_variance",
        ("self.temperature", "self.temperature ** 2", ROOT),
        ("self.temperature", "torch.ones_like(self.temperature)", DROPPED),
    ),
    *_of(
        "BADODA.half_step",
        ("self.lr / 2", "self.lr", CONSTANT),
        ("X / self.thermostat_mass", "X", DROPPED),
        ("X > 0", "X >= 0", MASK),
        ("X - self.temperature", "X", DROPPED),
    ),
    *_of(
        "BADODA.advance",
        ("state.thermostat + X", "state.thermostat", DROPPED),
        (
            "friction + self.half_step(state, momentum)",
            "friction + self.half_step(state, kicked)",
            STATE,
        ),
        ("self.temperature ** 0.5", "self.temperature", ROOT),
        ("Term(self.lr / 2, kicked)", "Term(self.lr / 2, momentum)", STATE),
    ),
    *_of("BADODA.momentum_variance", ("self.temperature", "self.temperature ** 2", ROOT)),
    *_of(
        "ornstein_uhlenbeck",
        ("diffusion_factor * time", "diffusion_factor ** 2 * time", ROOT),
        ("-2 * friction * lr", "-friction * lr", CONSTANT),
        ("2 * lr", "lr", CONSTANT),
        ("friction == 0", "friction <= 0", SIGN),
    ),
    # The lattice random walk.
    *_of(
        "mean_fall",
        ("[terms.correction]", "[]", DROPPED),
    ),
    *_of(
        "lattice_move",
        ("torch.where(up, X, Y)", "torch.where(up, Y, X)", SIGN),
        ("(1 - X) / 2", "(1 + X) / 2", SIGN),
        ("fall / X", "2 * fall / X", CONSTANT),
    ),
    *_of(
        "SGLRW.advance",
        ("torch.add", "torch.sub", SIGN),
        ("Term(shock.coefficient, X)", "Term(shock.coefficient ** 2, X)", ROOT),
        ("scaled(X, factors.noise)", "X", MASK),
        ("self.lr / 2", "self.lr", CONSTANT),
    ),
    # Contour SGLD.
    *_of(
        "EnergyPartition.place",
        ("X / self.width + 1", "X / self.width", CONSTANT),
    ),
    *_of(
        "ContourSGLD.advance",
        ("self.flatness * self.temperature * X", "self.flatness * X", DROPPED),
        ("1 + X", "1 - X", SIGN),
        ("self.flatness * log_psi", "log_psi", DROPPED),
        ("self.weight_lr * X", "X", DROPPED),
        ("X.clamp(max=1)", "X", DROPPED),
        ("self.lr / 2 * X", "self.lr * X", CONSTANT),
        ("(self.lr * X) ** 0.5", "self.lr * X", ROOT),
    ),
    *_of(
        "ContourSGLD.energy",
        ("X / 2", "X", CONSTANT),
        ("X - log_prior.double()", "X + log_prior.double()", SIGN),
        ("self.nbeta * X", "X", DROPPED),
    ),
    *_of(
        "next_theta",
        ("X - theta", "X", DROPPED),
        ("rate.unsqueeze(-1) * X", "X", DROPPED),
    ),
    *_of(
        "ContourSGLD.limits",
        ("-(1 + X) * widths", "(1 - X) * widths", SIGN),
        ("(self.max_multiplier - 1) * X", "self.max_multiplier * X", CONSTANT),
    ),
    *_of(
        "log_density",
        ("(start + end) / 2", "start", FIRST_ORDER),
        ("(3 * start + end) / 8", "(start + end) / 4", CONSTANT),
        ("(here(start) + rise) / 2 * share", "here(start) * share", FIRST_ORDER),
        ("(here(end) - here(start)) * share", "here(end) - here(start)", FIRST_ORDER),
        ("X - total", "X", DROPPED),
    ),
    # Preconditioners.
    *_of(
        "moving_average",
        ("1 - beta", "beta", STATE),
        ("tree.widened(value)", "value", DTYPE),
    ),
    *_of("square_average", ("X.square()", "X.abs()", ROOT)),
    *_of(
        "rmsprop_gain",
        ("average.sqrt()", "average", ROOT),
        ("floor(average)", "1e-08", SETTING),
    ),
    *_of(
        "rmsprop_correction",
        ("-forget", "forget", SIGN),
        ("gain.square()", "gain", ROOT),
        ("1 - alpha", "1", CONSTANT),
        ("average > 0", "average >= 0", NAN),
    ),
    *_of("_unbiased", ("1 - beta ** count", "1 - beta", STATE)),
    *_of(
        "Adam.update",
        ("state['count'] + 1", "state['count'] + 2", STATE),
        ("moving_average(X, grads, self.beta1)", "moving_average(X, grads, self.beta2)", SETTING),
    ),
    *_of(
        "Composite.update",
        (
            "((a.correction, b.gain), (b.correction, a.gain))",
            "((a.correction, a.gain), (b.correction, b.gain))",
            STATE,
        ),
        ("reduce(_times, gains)", "gains[0]", DROPPED),
    ),
    *_of("_zeros", ("tree.working_dtype(leaf)", "leaf.dtype", DTYPE)),
    # Schedules.
    *_of(
        "PolynomialDecay.__call__",
        ("-self.power", "self.power", SIGN),
        ("self.offset + step", "1 + step", SETTING),
    ),
    *_of(
        "Cosine.__call__",
        ("X.clamp(max=1)", "X", CONSTANT),
        ("self.start - self.end", "self.start", DROPPED),
    ),
    *_of("SamplingPhases.__call__", ("X < self.exploration", "X <= self.exploration", CONSTANT)),
    *_of("_half_cosine", ("math.pi * X", "2 * math.pi * X", CONSTANT)),
    *_of("_share_of_cycle", ("step % X", "step", STATE)),
    # Trees, keys and noise.
    *_of("expand_right", ("value.to(working_dtype(leaf))", "value.to(leaf.dtype)", DTYPE)),
    *_of("tree.dot", ("leaf * other", "(leaf * other).abs()", SIGN)),
    *_of("_sum_over_leaf", ("range(chains, X)", "range(X)", CHAIN)),
    *_of("tree.count", ("_sum_over_leaf(nonzero, X)", "_sum_over_leaf(nonzero, 0)", CHAIN)),
    *_of(
        "factor_of",
        ("factor.ndim > factors.batch_dims", "True", CHAIN),
    ),
    *_of("unflatten", ("flat.split(X, -1)", "[flat[..., :size] for size in X]", NOISE)),
    *_of("normal_like", ("noise_dtype(like)", "torch.float32", DTYPE)),
    *_of(
        "_box_muller",
        ("math.pi * 2.0 ** -31", "math.pi * 2.0 ** -32", NOISE),
        ("X.mul_(-2)", "X.mul_(-2.02)", NOISE),
        ("angle.sin_()", "angle.cos()", NOISE),
    ),
    *_of("threefry2x32", ("X % 4 == 3", "X % 4 == 2", NOISE)),
    *_of("random.fold_in", ("_as_word((X >> 32) | _FOLD)", "_as_word(X >> 32)", NOISE)),
    *_of(
        "StepKeys._keys_of",
        ("random.fold_in(X, steps)", "random.fold_in(X, 0 * steps)", KEY),
        ("random.fold_in(X, steps)", "random.fold_in(X, steps // 2)", KEY),
    ),
    *_of(
        "RunKeys.noise",
        ("random.fold_in(X, self.chains)", "random.fold_in(X, 0 * self.chains)", KEY),
    ),
    *_of("RunKeys.momenta", ("self._children(2)", "self._children(1)", KEY)),
    *_of("RunKeys.minibatches", ("self._children(0)", "self._children(1)", KEY)),
]
