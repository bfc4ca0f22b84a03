"""Next-token cross-entropy whose logits never exist whole, on data-set or sampled labels.

tokens: [document, position]. A document's loss is the sum over its labelled next-token positions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jhessians.capture.shards import Shards
from jhessians.data.batching import Batch
from jhessians.models.decoder import Decoder
from jhessians.models.layers import at_least_float32
from jhessians.models.sampling import sample
from jhessians.models.vocabulary import NO_LABEL, sliced_losses
from jhessians.typing import Array, Float, Int

CHUNK_LOGITS = 1 << 22  # logits of a chunk: 16 MiB in float32, of which a few copies exist at once


@dataclass(frozen=True)
class NextTokenLoss:
    """The loss whose gradients the curvature is made of; `loss(model, batch)` sums over documents.

    Attributes:
        labels: `dataset` takes the data set's labels, for the empirical Fisher; `sampled` draws
            each from the model's own distribution, which gives the true Fisher in expectation, and
            only at positions that have a label in the data set.
        reduction: `sum`; `mean`, which divides the gradient by the square root of the document's
            labelled positions, since a curvature is quadratic in it; or `mean_gradient`, which
            divides it by their number, where the gradient itself is wanted.
        seed: Seed of the draws. A draw's random numbers depend on (seed, draw, document, position)
            and on nothing else.
        draws: K, labels sampled per position from one forward pass. The loss is then a vector of
            K, over which statistics are averaged: the Fisher's variance falls as 1 / K.
        function: `cross_entropy`, or `log_odds`, -log(p / (1 - p)) of the label's probability
            (Park et al. 2023, arXiv:2303.14186), for data-set labels.
        label_smoothing: Share of each target that is spread over the whole vocabulary.
    """

    labels: Literal["dataset", "sampled"] = "sampled"
    reduction: Literal["sum", "mean", "mean_gradient"] = "sum"
    seed: int = 0
    draws: int = 1
    function: Literal["cross_entropy", "log_odds"] = "cross_entropy"
    label_smoothing: float = 0.0

    def __call__(self, model: Decoder, batch: Batch) -> Float[Array, "*k"]:
        """The loss of this host's documents; one for each draw if there are several."""
        n, s = batch.tokens.shape
        hidden = self.outputs(model, batch)
        targets = _targets(batch)
        weights = (targets != NO_LABEL).astype(at_least_float32(hidden.dtype))
        count = jnp.maximum(weights.sum(1, keepdims=True), 1)
        if self.reduction != "sum":
            weights /= jnp.sqrt(count) if self.reduction == "mean" else count
        position = jnp.broadcast_to(jnp.arange(s)[None], (n, s))
        document = jnp.broadcast_to(batch.document[:, None], (n, s))

        flat = [x.reshape(n * s, *x.shape[2:]) for x in (targets, weights, document, position)]
        hidden = hidden.reshape(n * s, -1)
        fixed = lax.stop_gradient(hidden)
        if isinstance(getattr(model, "table", None), Shards) and self._labels_come_first:
            values, gradients = sliced_losses(
                model, fixed, *flat, sampled=self.labels == "sampled", seed=self.seed,
                draws=self.draws, log_odds=self.function == "log_odds",
                smoothing=self.label_smoothing,
            )  # fmt: skip
        else:
            values, gradients = self._chunked(model, fixed, *flat)
        # Zero in value; in the backward pass it hands `gradients` to the hidden states.
        surrogate = jnp.einsum("ktd,td->k", gradients, hidden - fixed)
        values = values + surrogate.astype(values.dtype)
        return values if self.draws > 1 else values[0]

    @property
    def _labels_come_first(self) -> bool:
        """Whether a label is known before the terms that depend on it are summed."""
        return self.labels == "dataset" or self.function == "cross_entropy"

    def outputs(self, model: Decoder, batch: Batch) -> Float[Array, "n s d"]:
        """What the loss is a function of, position by position: the hidden states."""
        lengths = batch.position_mask.sum(1, dtype=jnp.int32) + 1
        return model.hidden(jnp.asarray(batch.tokens), lengths)

    def hessian_products(
        self,
        model: Decoder,
        batch: Batch,
        outputs: Float[Array, "n s d"],
        tangents: Float[Array, "k n s d"],
    ) -> Float[Array, "k n s d"]:
        """Products of J_zᵀ (diag p - p pᵀ) J_z, of the loss's Gauss-Newton Hessian at its outputs.

        z are a position's logits, p their softmax, J_z their derivative by the outputs. The labels
        play no part, but where there is none a position counts nothing. With the reduction `mean`
        (or `mean_gradient`) a document's positions are averaged, otherwise added up.

        Args:
            model: Whose logits.
            batch: Its documents.
            outputs: From `outputs`.
            tangents: The vectors.

        Returns:
            A product for each vector. Logits exist for a few positions at a time.

        Raises:
            ValueError: If the loss is `log_odds`, which is no cross-entropy.
        """
        if self.function != "cross_entropy":
            raise ValueError(
                f"the Gauss-Newton Hessian of {self.function} isn't known; expected cross_entropy"
            )
        k, (n, s, d) = len(tangents), outputs.shape
        weights = (_targets(batch) != NO_LABEL).astype(at_least_float32(outputs.dtype))
        if self.reduction != "sum":
            weights /= jnp.maximum(weights.sum(1, keepdims=True), 1)

        def step(_: None, chunk: tuple[Array, ...]) -> tuple[None, Array]:
            hidden, tangents, weights = chunk
            logits, back = jax.vjp(model.logits, hidden)
            p = jax.nn.softmax(logits.astype(weights.dtype))

            def one(tangent: Array) -> Array:
                z = jax.jvp(model.logits, (hidden,), (tangent,))[1].astype(p.dtype)
                z = weights[:, None] * p * (z - (p * z).sum(-1, keepdims=True))
                (product,) = back(z.astype(logits.dtype))
                return product

            return None, jax.vmap(one, in_axes=1, out_axes=1)(tangents)

        rows = n * s
        size, chunks = _chunks(rows, model.config.vocabulary_size * (k + 1))
        pieces = (
            outputs.reshape(rows, d),
            jnp.moveaxis(tangents.reshape(k, rows, d), 0, 1),
            weights.reshape(rows),
        )
        _, found = lax.scan(step, None, tuple(_split(x, size, chunks) for x in pieces))
        found = found.reshape(chunks * size, k, d)[:rows]
        return jnp.moveaxis(found, 1, 0).reshape(k, n, s, d)

    def _chunked(
        self,
        model: Decoder,
        hidden: Float[Array, "t d"],
        targets: Int[Array, " t"],
        weights: Float[Array, " t"],
        document: Int[Array, " t"],
        position: Int[Array, " t"],
    ) -> tuple[Float[Array, " k"], Float[Array, "k t d"]]:
        """The weighted loss of all positions, with its gradient taken chunk by chunk.

        Loss and gradient at the hidden states are computed together while a chunk's logits exist,
        so the backward pass needs neither them nor a second product with the head.

        Returns:
            One loss for each draw of labels, and its gradient.
        """
        rows = hidden.shape[0]
        size, chunks = _chunks(rows, model.config.vocabulary_size)
        split = partial(_split, size=size, chunks=chunks)

        def step(totals: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
            hidden, targets, weights, document, position = chunk

            def one(draw: Array) -> tuple[Array, Array]:
                return jax.value_and_grad(self._weighted)(
                    hidden, model, targets, weights, document, position, draw
                )

            values, gradients = jax.vmap(one)(jnp.arange(self.draws))
            return totals + values, gradients

        pieces = (split(hidden), split(targets, fill=NO_LABEL), split(weights), split(document),
                  split(position))  # fmt: skip
        zeros = jnp.zeros((self.draws,), weights.dtype)
        values, gradients = lax.scan(step, zeros, pieces)
        gradients = gradients.swapaxes(0, 1).reshape(self.draws, chunks * size, -1)
        return values, gradients[:, :rows]

    def _weighted(
        self,
        hidden: Float[Array, "t d"],
        model: Decoder,
        targets: Int[Array, " t"],
        weights: Float[Array, " t"],
        document: Int[Array, " t"],
        position: Int[Array, " t"],
        draw: Int[Array, ""],
    ) -> Float[Array, ""]:
        """Σ weight · loss over one chunk's positions."""
        logits = model.logits(hidden).astype(weights.dtype)
        labels = jnp.where(targets == NO_LABEL, 0, targets)
        if self.labels == "sampled":
            labels = sample(lax.stop_gradient(logits), document, position, self.seed, draw)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        if self.function == "log_odds":
            is_label = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None] == labels[:, None]
            others = jnp.where(is_label, -jnp.inf, logits)
            losses = jax.nn.logsumexp(others, axis=-1) - chosen
        else:
            normalizer = jax.nn.logsumexp(logits, axis=-1)
            losses = normalizer - chosen
            if self.label_smoothing:
                spread = normalizer - logits.mean(-1)
                losses += self.label_smoothing * (spread - losses)
        return jnp.sum(weights * losses)


def _targets(batch: Batch) -> Int[Array, "n s"]:
    """The label of each position's next token; `NO_LABEL` where there is none."""
    labels = jnp.asarray(batch.labels)
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=NO_LABEL)


def _chunks(rows: int, logits: int) -> tuple[int, int]:
    """How many rows a chunk has, and how many chunks there are, for so many logits of a row."""
    size = max(1, min(rows, CHUNK_LOGITS // logits))
    chunks = -(-rows // size)
    return -(-rows // chunks), chunks


def _split(x: Array, size: int, chunks: int, fill: int = 0) -> Array:
    """Rows as chunks, [chunk, row, ...], the last one filled up."""
    width = ((0, chunks * size - len(x)),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, width, constant_values=fill).reshape(chunks, size, *x.shape[1:])
