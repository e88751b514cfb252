from funcsgmcmc.compat.sketch import *
