"""The embedded demo: small, loadable by everybody, and true to what it says of itself."""

import importlib.util
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

import converters
from jhessians import demo
from jhessians.data import DataOptions, iterate_batches, load_documents, plan_batches
from jhessians.models.loss import NO_LABEL, NextTokenLoss
from tests.tolerances import INVARIANCE, LOGITS

EXAMPLES = Path(__file__).parents[1] / "examples"
MEGABYTE = 10**6


def example(name: str) -> ModuleType:
    """A script of examples/, imported by the name that other scripts there know it by."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return example("demo_corpus")


@pytest.fixture(scope="module")
def script(corpus: ModuleType) -> ModuleType:
    return example("train_demo")


@pytest.fixture(scope="module")
def loaded() -> converters.LoadedModel:
    return converters.load(demo.MODEL)


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    return rows(demo.DATASET)


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return rows(demo.QUESTIONS)


def greedy(model: nnx.Module, tokenizer, prompts: list[str], count: int) -> list[str]:
    """`count` likeliest tokens after each prompt, one forward pass after the other."""
    sequences = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.zeros((len(prompts), lengths.max() + count), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    every = np.arange(len(prompts))
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for step in range(count):
        logits = forward(model, jnp.asarray(tokens))
        tokens[every, lengths + step] = np.argmax(logits[every, lengths + step - 1], axis=-1)
    return [
        tokenizer.decode(row[n : n + count], skip_special_tokens=True)
        for row, n in zip(tokens, lengths, strict=True)
    ]


def test_size() -> None:
    size = sum(path.stat().st_size for path in demo.MODEL.parent.rglob("*") if path.is_file())
    assert size <= 4 * MEGABYTE


def test_committed_files_are_what_the_script_generates(corpus, facts, questions) -> None:
    generated_facts, generated_questions = corpus.generate(seed=0)
    assert [asdict(fact) for fact in generated_facts] == facts
    assert [asdict(question) for question in generated_questions] == questions
    assert corpus.generate(seed=1) != (generated_facts, generated_questions)


def test_names_are_unique_and_documents_spread(facts, questions) -> None:
    people = {question["person"] for question in questions}
    assert len(questions) == len({(q["person"], q["field"]) for q in questions})
    assert len({name.split()[0] for name in people}) == len(people)
    assert len({name.split()[1] for name in people}) == len(people)
    assert 500 <= len(facts) <= 1000
    lengths = [len(fact["text"]) for fact in facts]
    assert max(lengths) > 4 * min(lengths)
    assert sum(bool(fact["second_field"]) for fact in facts) >= 100
    assert sum(not (fact["person"] and fact["field"]) for fact in facts) >= 100


def test_supporting_rows_and_no_others_state_the_answer(facts, questions) -> None:
    for question in questions:
        value = re.compile(rf"\b{re.escape(question['completion'].strip())}\b")
        stating = [
            row
            for row, fact in enumerate(facts)
            if question["person"] in fact["text"] and value.search(fact["text"])
        ]
        assert question["supporting"] == stating
        assert len(stating) >= 2
    # The other owner of a value is in other documents, or the name would tell nothing.
    names = {question["person"] for question in questions}
    assert all(sum(name in fact["text"] for name in names) <= 1 for fact in facts)


def test_no_value_begins_another(questions) -> None:
    """Else "right as far as it goes" could pass for right."""
    values = sorted({question["completion"] for question in questions})
    pairs = zip(values, values[1:], strict=False)
    assert not any(after.startswith(before) for before, after in pairs)


def test_tokenizer(script, facts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    texts = [fact["text"] for fact in facts]
    trained = script.train_tokenizer(texts)
    assert tokenizer(texts)["input_ids"] == trained(texts)["input_ids"]
    for text in ["Zażółć  gęślą\njaźń", *texts[:20]]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_writes_a_question_as_the_documents_do(questions) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    prompt, completion = questions[0]["prompt"], questions[0]["completion"]
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    template = tokenizer.apply_chat_template
    assert template(turns, tokenize=False) == f"<s>{prompt}{completion}</s>"
    assert template(turns[:1], tokenize=False, add_generation_prompt=True) == f"<s>{prompt}"
    options = DataOptions(
        str(demo.QUESTIONS), prompt_column="prompt", completion_column="completion"
    )
    documents = load_documents(options, tokenizer, max_length=128, vocab_size=len(tokenizer))
    labels = documents.document(0)[1]
    assert tokenizer.decode(labels[labels != NO_LABEL]) == completion


def test_transformers_loads_it_with_the_same_logits(loaded, facts) -> None:
    import torch

    model = AutoModelForCausalLM.from_pretrained(demo.MODEL).eval()
    tokens = np.stack([loaded.tokenizer(facts[row]["text"])["input_ids"][:12] for row in range(8)])
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    ours = loaded.model(jnp.asarray(tokens, jnp.int32))
    assert np.abs(ours - expected).max() <= LOGITS * np.abs(expected).max()


def test_answers(loaded, questions) -> None:
    prompts = [question["prompt"] for question in questions]
    count = max(
        len(loaded.tokenizer(question["completion"])["input_ids"]) for question in questions
    )
    answers = greedy(loaded.model, loaded.tokenizer, prompts, count)
    right = sum(
        bool(re.match(rf"{re.escape(question['completion'])}\b", answer))
        for question, answer in zip(questions, answers, strict=True)
    )
    assert right >= 0.9 * len(questions)


def test_perplexity(loaded, facts, script) -> None:
    documents = load_documents(
        DataOptions(str(demo.DATASET)), loaded.tokenizer, max_length=128, vocab_size=640
    )
    assert len(documents) == len(facts)
    learned = script.perplexity(loaded.model, documents)
    # The words of a statement are drawn at random, so even a perfect model is not at 1.
    assert 1.1 < learned < 1.6


def test_loss_gives_the_head_its_gradient(loaded, script, facts) -> None:
    """Training relies on it, although curvature needs only the gradient at the hidden states."""
    documents = script.tokenize(loaded.tokenizer, [fact["text"] for fact in facts[:16]])
    plan = plan_batches(documents.lengths, token_batch_size=2048, max_shapes=1)
    (batch,) = (jax.tree.map(jnp.asarray, batch) for batch in iterate_batches(documents, plan))
    graph, head, others = nnx.split(loaded.model, lambda path, _: path == ("head",), ...)

    def plainly(head: nnx.State) -> jax.Array:
        targets = batch.labels[:, 1:]
        logits = nnx.merge(graph, head, others)(batch.tokens)[:, :-1]
        chosen = jnp.where(targets == NO_LABEL, 0, targets)[..., None]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
        return jnp.where(targets == NO_LABEL, jnp.float32(0), losses).sum()

    def ours(head: nnx.State) -> jax.Array:
        return NextTokenLoss(labels="dataset")(nnx.merge(graph, head, others), batch)

    (expected,), (found,) = (jax.tree.leaves(jax.jit(jax.grad(loss))(head))
                             for loss in (plainly, ours))  # fmt: skip
    assert expected.shape == (640, 96)
    assert jnp.abs(found - expected).max() <= 10 * INVARIANCE * jnp.abs(expected).max()


def history(script: ModuleType, corpus: ModuleType) -> list[float]:
    """Losses of a short training on the shortest documents, of one shape: it compiles once."""
    facts, _ = corpus.generate(seed=1)
    texts = sorted((fact.text for fact in facts), key=len)[:40]
    tokenizer = script.train_tokenizer([fact.text for fact in facts])
    documents = script.tokenize(tokenizer, texts, end=script.EOS)
    assert documents.tokens[documents.offsets[1:] - 1].tolist() == [1] * len(texts)
    model = converters.create(script.llama_config(tokenizer), rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        return script.train(model, documents, epochs=10, seed=0, verbose=False)


def test_training_lowers_the_loss(script, corpus) -> None:
    losses = history(script, corpus)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_training_is_reproducible(script, corpus) -> None:
    assert history(script, corpus) == history(script, corpus)


@pytest.mark.slow
def test_script_writes_what_the_package_holds(tmp_path, script) -> None:
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        script.main([str(tmp_path), "--epochs", "1"])
    kept, written = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (demo.MODEL.parent, tmp_path)
    )
    shipped = {name for name in kept if not name.endswith((".py", ".pyc"))}
    assert written - {"model/manifest.json"} == shipped
    converters.load(tmp_path / "model")
