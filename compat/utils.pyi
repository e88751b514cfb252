from funcsgmcmc.compat.utils import *
