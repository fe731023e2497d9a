"""What solvers cost, by name. No torch: budgets are checked before there is any."""

EVALUATIONS = {"heun": 2, "midpoint": 2, "dpm2": 2}  # a step, where not one
ORDERS = {
    "dpmpp": 3,
    "exp-ab": 3,
    "unipc": 3,
    "unipc-bh1": 3,
    "deis": 4,
    "ipndm": 4,
    "ipndm-v": 4,
}  # highest, of multistep solvers
STOCHASTIC = frozenset({"euler-maruyama"})  # solvers that add noise at every step
