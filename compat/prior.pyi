from funcsgmcmc.compat.prior import *
