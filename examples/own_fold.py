"""A statistic of one's own, summed over every linear of a language model: a diagonal Fisher.

    python examples/own_fold.py

The traversal hands each linear's input and output gradient to a *fold*. What it makes of them is
up to the fold; memory, devices, layers and batches are the traversal's business.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

import converters
import jhessians
from jhessians import demo


@dataclass(frozen=True)  # a fold is a static argument of jit
class DiagonalFisher:
    """Squares of every document's gradient, weight by weight."""

    def shapes(self, site):
        """What is kept of one linear: something as large as its weight."""
        return jax.ShapeDtypeStruct((site.out_features, site.in_features), jnp.float32)

    def term(self, site, a, g, operands, context):
        """What a batch adds. a: [document, position, in], g: [document, position, out]."""
        gradients = jnp.einsum("nso,nsi->noi", g, a)
        return jnp.square(gradients).sum(0)


def main() -> None:
    # The demo: a Llama of 0.5M parameters and the sentences that it was trained on.
    model, config, tokenizer = converters.load(demo.MODEL)
    documents = jhessians.load_documents(
        jhessians.DataOptions(str(demo.DATASET), split="train[:256]"), tokenizer,
        max_length=128, vocab_size=model.config.vocabulary_size,
    )  # fmt: skip
    plan = jhessians.plan_batches(documents.lengths, token_batch_size=1024)
    batches = list(jhessians.iterate_batches(documents, plan))

    # With labels="sampled" from the model itself it would be the true Fisher.
    loss = jhessians.NextTokenLoss(labels="dataset")
    sites = jhessians.find_sites(loss, model, batches[0])
    problem = jhessians.Problem(loss, model, sites)
    fisher = jhessians.run_pass(DiagonalFisher(), problem, batches)

    print(f"mean squared gradient of a weight, over {len(documents)} documents")
    for name, total in fisher.items():  # [layer, out, in]: the decoder's layers are one stack
        by_layer = total.mean(axis=(1, 2)) / len(documents)
        print(f"{name:40}", *(f"{value:8.2g}" for value in by_layer))


if __name__ == "__main__":
    main()
