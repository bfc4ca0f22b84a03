"""Fit, ask, show: which training documents made a model say what it says.

    python examples/who_taught_it.py
    python examples/who_taught_it.py "Fenando Jelarbeck works as a" --documents 300

Without other arguments it asks the demo that ships with the package. The model's own answer is
taken as the completion.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import converters
import jhessians
from jhessians import demo

HELPFUL, HARMFUL = 5, 2


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="Fenando Jelarbeck was born in")
    parser.add_argument("--model", default=str(demo.MODEL), help="checkpoint folder or Hub name")
    parser.add_argument("--dataset", default=str(demo.DATASET), help="its training documents")
    parser.add_argument("--documents", type=int, default=954, help="how many of them")
    parser.add_argument("--hessian", help="folder of a finished run, instead of a fit")
    parser.add_argument("--new-tokens", type=int, default=8, help="length of the answer, at most")
    return parser.parse_args(words)


def batches_of(documents: jhessians.Documents) -> list[jhessians.Batch]:
    """All documents in batches of up to 2,048 tokens."""
    plan = jhessians.plan_batches(documents.lengths, token_batch_size=2048)
    return list(jhessians.iterate_batches(documents, plan))


def question(prompt: Sequence[int], answer: Sequence[int]) -> jhessians.Documents:
    """One document, of which only the answer has loss."""
    tokens = np.array([*prompt, *answer], np.int32)
    labels = np.where(np.arange(len(tokens)) < len(prompt), -100, tokens).astype(np.int32)
    return jhessians.Documents(tokens, labels, np.array([0, len(tokens)], np.int64))


def main(words: Sequence[str] | None = None) -> None:
    """Ask one question and print who taught the answer."""
    chosen = options(words)
    model, config, tokenizer = converters.load(chosen.model)
    data = jhessians.DataOptions(
        chosen.dataset, split=f"train[:{chosen.documents}]", truncation=True
    )
    documents = jhessians.load_documents(
        data, tokenizer, max_length=config.max_position_embeddings, vocab_size=config.vocab_size
    )
    batches = batches_of(documents)

    prompt = tokenizer(chosen.prompt)["input_ids"]
    (answer,) = converters.generate(
        model, [prompt], max_new_tokens=chosen.new_tokens, eos_token_id=tokenizer.eos_token_id
    )
    print(f"{chosen.prompt}{tokenizer.decode(answer, skip_special_tokens=True)}\n")

    sampled = jhessians.NextTokenLoss()  # the true Fisher, for the Hessian
    problem = jhessians.Problem(sampled, model, jhessians.find_sites(sampled, model, batches[0]))
    factors = (
        jhessians.load_factors(chosen.hessian)
        if chosen.hessian
        else jhessians.fit(problem, batches, documents=len(documents))
    )
    own = replace(problem, loss=jhessians.NextTokenLoss("dataset"))  # of the documents' own words
    asked = batches_of(question(prompt, answer))
    scores = jhessians.score(own, batches, asked, factors, documents=len(documents))[:, 0]

    order = np.argsort(-scores, kind="stable")
    places = [*enumerate(order[:HELPFUL], 1), *enumerate(order[-HARMFUL:], -HARMFUL)]
    for rank, number in places:
        text = tokenizer.decode(documents.document(number)[0], skip_special_tokens=True)
        print(f"{rank:>3}  {scores[number]:>10.4g}  #{number:<5} {text}")


if __name__ == "__main__":
    main()
