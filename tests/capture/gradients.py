"""Documents' gradients by `jax.grad` in float64, one document at a time, of the model as it is."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def of_documents(loss, model, batch):
    """One state of gradients per document, each by differentiating the loss of that document.

    Args:
        loss: Of (model, batch), a sum over documents.
        model: Whose parameters to differentiate by.
        batch: A pytree of arrays, documents first.
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), parameters)
        rest = jax.tree.map(jnp.asarray, rest)

        def total(parameters, document):
            return loss(nnx.merge(graph, parameters, rest, copy=True), document)

        gradient = jax.jit(jax.grad(total))
        count = len(jax.tree.leaves(batch)[0])
        documents = [
            jax.tree.map(lambda x, n=n: jnp.asarray(x[n : n + 1], jnp.float64), batch)
            for n in range(count)
        ]
        return [nnx.to_pure_dict(gradient(wide, document)) for document in documents]


def matrix(gradient, path, *, inputs=1, bias=False):
    """One document's gradient of a linear as [out, in], with the bias's as a last column.

    Args:
        gradient: One of `of_documents`.
        path: Of the kernel's owner, or of the parameter itself.
        inputs: How many of the kernel's axes, the first ones, are input features; or their indices.
        bias: Whether there is a bias that counts.
    """
    for part in path.split("."):
        gradient = gradient[int(part) if part.isdigit() else part]
    kernel = np.asarray(gradient["kernel"] if isinstance(gradient, dict) else gradient)
    axes = tuple(range(inputs)) if isinstance(inputs, int) else inputs
    others = [i for i in range(kernel.ndim) if i not in axes]
    size = int(np.prod([kernel.shape[i] for i in axes]))
    flat = kernel.transpose(*axes, *others).reshape(size, -1).T
    if not bias:
        return flat
    return np.concatenate([flat, np.asarray(gradient["bias"]).reshape(-1, 1)], axis=1)
