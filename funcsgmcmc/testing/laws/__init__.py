"""The laws of an update: functions of a problem that raise AssertionError where they fail.

Laws of averages over many steps are in `stationary`.
"""

from funcsgmcmc.testing.laws.base import Law, close, identical, law
from funcsgmcmc.testing.laws.chains import (
    chunks_and_order,
    failures_stay_in_their_chain,
    schedules_are_followed,
    vmap_is_a_loop,
)
from funcsgmcmc.testing.laws.contract import (
    determinism,
    devices_are_kept,
    finiteness,
    kinds_are_kept,
    narrow_leaves_are_rounded_once,
    ownership,
    purity,
)
from funcsgmcmc.testing.laws.oracle import oracle_is_followed
from funcsgmcmc.testing.laws.potential import pulls_are_the_priors_gradient
from funcsgmcmc.testing.laws.scales import scale_of_the_loss, units_of_energy, units_of_length
from funcsgmcmc.testing.laws.settings import (
    box,
    mask_of_ones,
    masked_entries_are_not_seen,
    masked_entries_stay,
    zero_step_size,
    zero_temperature,
)
from funcsgmcmc.testing.laws.terms import (
    linearity_in_noise,
    metrics_are_norms,
    terms_add_up,
    terms_are_what_they_are_called,
)
from funcsgmcmc.testing.laws.trees import names_and_order_of_leaves, rotation, splitting_a_leaf

LAWS: tuple[Law, ...] = (
    purity,
    ownership,
    determinism,
    kinds_are_kept,
    devices_are_kept,
    finiteness,
    narrow_leaves_are_rounded_once,
    zero_step_size,
    zero_temperature,
    masked_entries_stay,
    masked_entries_are_not_seen,
    mask_of_ones,
    box,
    terms_add_up,
    terms_are_what_they_are_called,
    metrics_are_norms,
    linearity_in_noise,
    vmap_is_a_loop,
    chunks_and_order,
    failures_stay_in_their_chain,
    schedules_are_followed,
    names_and_order_of_leaves,
    splitting_a_leaf,
    rotation,
    scale_of_the_loss,
    units_of_energy,
    units_of_length,
    pulls_are_the_priors_gradient,
    oracle_is_followed,
)
"""All laws: first those of any pure function, last those of a sampler's own equation."""

__all__ = ["LAWS", "Law", "close", "identical", "law", *(each.name for each in LAWS)]
