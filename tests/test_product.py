"""The product with weights on a CPU: in what precision, and its gradients."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dllm_jax.ops.product import product

SHAPES = [(2, 8, 12, (5,)), (3, 7, 16, (2, 4)), (1, 1, 4, (3,))]


def drawn(rows: int, entries: int, size: int, out: tuple[int, ...]):
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(rows, entries, size)), random.normal(size=(size, *out))
    return x, weight, random.normal(size=(rows, entries, *out))


def exact(x, weight, grad):
    """The product, and its gradients where it has the gradient `grad`, in float64."""
    flat, rest = x.reshape(-1, x.shape[-1]), weight.reshape(len(weight), -1)
    slope = grad.reshape(len(flat), -1)
    found = flat @ rest, slope @ rest.T, flat.T @ slope
    return [y.reshape(z.shape) for y, z in zip(found, (grad, x, weight), strict=True)]


def found(x, weight, grad):
    out, back = jax.vjp(product, x, weight)
    return out, *back(grad)


def narrow(x) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_summed_in_float32(shape):
    given = [narrow(x) for x in drawn(*shape)]
    for ours, right in zip(
        found(*map(jnp.asarray, given)), exact(*(np.float64(x) for x in given)), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), right, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_rounded_where_the_default_precision_says_so(shape):
    given = [jnp.float32(x) for x in drawn(*shape)]
    wide = exact(*(np.float64(x) for x in given))
    rounded = exact(*(np.float64(narrow(x)) for x in given))
    for ours, right in zip(found(*given), wide, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
    with jax.default_matmul_precision("bfloat16"):
        assert product(*given[:2]).dtype == jnp.float32
        for ours, right in zip(jax.jit(found)(*given), rounded, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
