from funcsgmcmc.compat.sgnht import *
