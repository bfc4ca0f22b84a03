"""A forward pass in plain JAX from a converted checkpoint: a dictionary of arrays, and functions.

    python examples/forward.py [MODEL]

Without a model it is the demo. The demo's answers are short, so nothing here caches keys and
values: each token is the likeliest one after all that went before.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import converters
from jhessians import demo


def main(name: str | None = None, new_tokens: int = 12) -> None:
    model, config, tokenizer = converters.load(name or demo.MODEL)
    graph, state = nnx.split(model)
    weights = nnx.to_pure_dict(state)  # nested dictionaries of jax.Array; layers are stacked

    @jax.jit
    def logits(weights, tokens):
        """tokens: [document, position]; logits: [document, position, vocabulary]."""
        return nnx.merge(graph, nnx.State(weights))(tokens)

    count = sum(x.size for x in jax.tree.leaves(weights))
    print(f"{model.config.family}: {count:,} parameters")
    down = weights["layers"]["blocks"]["mlp"]["down"]["kernel"]
    print(f"the MLPs' down projections, [layer, in, out]: {list(down.shape)}")

    prompt = json.loads(demo.QUESTIONS.read_text().splitlines()[0])["prompt"]
    tokens = tokenizer(prompt)["input_ids"]
    room = np.zeros((1, len(tokens) + new_tokens), np.int32)  # one shape, one compilation
    room[0, : len(tokens)] = tokens
    for end in range(len(tokens), room.shape[1]):
        # What stands behind a position never reaches it, so the padding needs no mask.
        room[0, end] = int(jnp.argmax(logits(weights, room)[0, end - 1]))
        if room[0, end] == tokenizer.eos_token_id:
            break
    print(tokenizer.decode(room[0, : end + 1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
