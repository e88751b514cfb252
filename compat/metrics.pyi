from funcsgmcmc.compat.metrics import *
