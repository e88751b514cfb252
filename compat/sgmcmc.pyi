from funcsgmcmc.compat.sgmcmc import *
