"""How a policy is evaluated: metrics from K samples, with intervals."""
