"""Rematerialization: what the backward pass of a scan over layers finds stored."""

from collections.abc import Callable

import jax

# What is stored beside the input of every layer. The rest is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    # Nothing: the least memory, one more forward pass.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Nothing on the device: the inputs of the layers go to pinned memory of the host and come back.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # The outputs of the linear layers whose value the backward pass needs: norms, rotation, softmax
    # and activation are computed again, no weight is multiplied (or dequantized) a second time. But
    # with DoRA: the gradient of its magnitudes asks for the outputs before they were scaled.
    "projections": jax.checkpoint_policies.save_only_these_names(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "adapted_norm"
    ),
    # The outputs of all matrix products without a batch axis, adapters' included.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: str) -> None:
    """Refuses what is neither "none" nor a key of `REMAT_POLICIES`.

    Raises:
      ValueError: it is not.
    """
    if remat != "none" and remat not in REMAT_POLICIES:
        raise ValueError(f"{remat=} must be 'none' or one of {sorted(REMAT_POLICIES)}")


def rematerialize(body: Callable, remat: str) -> Callable:
    """The body of a scan, so that its backward pass stores what `remat` says.

    Args:
      body: of a scan; there the compiler cannot merge recomputation and forward pass anyway.
      remat: "none" (everything is stored) or a key of `REMAT_POLICIES`.
    """
    if remat == "none":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
