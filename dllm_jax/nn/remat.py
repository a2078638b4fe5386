"""What a layer's backward pass recomputes, and what is kept for it from the forward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.platform import device_kind

_POLICIES = jax.checkpoint_policies
_KEPT: dict[str, Any] = {
    "dots": _POLICIES.checkpoint_dots,
    "dots_no_batch": _POLICIES.checkpoint_dots_with_no_batch_dims,
    "full": None,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
NAMES = ("none", *_KEPT, "auto")
"""What of each layer is kept for the backward pass, from most memory to least.

none: all that it needs. dots: the products of matrices, those of attention too. dots_no_batch: the
products with weights. full: the layer's input alone, and all else is computed again. offload: as
full, with the inputs in the host's memory meanwhile (TPU and GPU). auto: what is fastest where
memory is no matter: none, but on CPUs dots_no_batch, as they compute again faster than they store.
"""


def check(remat: str | bool) -> str:
    """The name of a setting; True and False are "full" and "none", as older configs have them.

    Raises:
      ValueError: there is no such setting.
    """
    if isinstance(remat, bool):
        return "full" if remat else "none"
    if remat not in NAMES:
        raise ValueError(f"remat={remat!r} is not one of {', '.join(NAMES)}")
    return remat


def rematerialised(layer: Callable, remat: str | bool) -> Callable:
    """The body of a scan over layers, `layer(hidden, x)`, under a setting of `NAMES`."""
    name = check(remat)
    if name == "auto":
        name = "dots_no_batch" if device_kind() == "cpu" else "none"
    if name == "none":
        return layer

    def body(hidden, x):
        return layer(checkpoint_name(hidden, "layer_input"), x)

    return jax.checkpoint(body, prevent_cse=False, policy=_KEPT[name])
