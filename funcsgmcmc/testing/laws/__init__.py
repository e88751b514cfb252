"""The laws of an update, each a function of a problem that raises AssertionError where it fails.

Laws of averages over many steps stand in `stationary`.
"""

from funcsgmcmc.testing.laws.chains import (
    chunks_and_order,
    failures_stay_in_their_chain,
    schedules_are_followed,
    vmap_is_a_loop,
)
from funcsgmcmc.testing.laws.law import Law, close, identical, law
from funcsgmcmc.testing.laws.potential import pulls_are_the_priors_gradient
from funcsgmcmc.testing.laws.purity import (
    determinism,
    devices_are_kept,
    finiteness,
    kinds_are_kept,
    narrow_leaves_are_rounded_once,
    ownership,
    purity,
)
from funcsgmcmc.testing.laws.reference import reference
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
    reference,
)
"""All laws, from what a function must be to what this one must do."""

__all__ = ["LAWS", "Law", "close", "identical", "law", *(each.name for each in LAWS)]
