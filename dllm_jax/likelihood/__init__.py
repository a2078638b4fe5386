"""How probable a model finds a text: exactly, for an order of decoding, or from below. In nats.

log_likelihood(model, params, [prompt], [answer], recipe=recipes.llada())
bound(model, params, [prompt], [answer], key=jax.random.key(0))
score_choices(model, params, [prompt], [[yes, no]], recipe=recipes.llada())
"""

from dllm_jax.likelihood.bounds import Bound, bound
from dllm_jax.likelihood.choices import Choices, score_choices
from dllm_jax.likelihood.exact import Likelihood, check_deterministic, is_greedy, log_likelihood

__all__ = [
    "Bound",
    "Choices",
    "Likelihood",
    "bound",
    "check_deterministic",
    "is_greedy",
    "log_likelihood",
    "score_choices",
]
