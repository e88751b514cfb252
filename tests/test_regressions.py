"""Three Bayesian regressions: every sampler against a long run of NUTS (`references/`).

Step sizes are in units of the largest curvature κ of U that the posterior meets. At these, what the
schemes' exact laws for quadratics say of a variance's relative bias is at most εκ/4 for SGLD, …; the
posteriors are not quadratic, and `BIAS` states what is allowed beyond the Monte Carlo error.
"""
