from funcsgmcmc.compat.sgld import *
