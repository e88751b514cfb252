from funcsgmcmc.compat.preconditioner import *
