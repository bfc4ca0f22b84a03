"""Draws, ends and refusals of `generate`, on one small model."""

import jax
import numpy as np
import pytest

from converters import generate, load
from jhessians.errors import ConfigError, DatasetError
from jhessians.models.decoding import decode

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [1, 2]]
NEW = 12


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint("llama"))


@pytest.fixture(scope="module")
def model(loaded):
    return loaded.model


def draw(model, tokens=PROMPTS, **options):
    return generate(model, tokens, **{"max_new_tokens": NEW, "temperature": 1.0, **options})


@pytest.fixture(scope="module")
def drawn(model):
    return draw(model)


def test_a_document_draws_alone_what_it_draws_in_a_batch(model, drawn):
    for number in (0, 2):
        alone = draw(model, [PROMPTS[number]], first_document=number)
        np.testing.assert_array_equal(alone[0], drawn[number])


def test_equal_prompts_draw_differently_and_so_do_seeds(model, drawn):
    same = draw(model, np.array([PROMPTS[0]] * 2))
    assert (same[0] != same[1]).any()
    assert (draw(model, seed=1) != drawn).any(axis=1).all()


def test_draws_do_not_depend_on_the_configuration_of_random_numbers(model, drawn):
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        found = draw(model, max_new_tokens=3)  # another number of tokens: it is compiled here
    np.testing.assert_array_equal(found, drawn[:, :3])


def test_the_lowest_temperature_is_greedy_and_nothing_compiles_again(model, drawn):
    before = decode._cache_size()
    greedy = draw(model, temperature=0)
    assert decode._cache_size() == before + 1  # greedy decoding has no noise
    np.testing.assert_array_equal(draw(model, temperature=1e-6), greedy)
    draw(model, [p[::-1] for p in PROMPTS], seed=9, temperature=np.float64(0.3))
    draw(model, temperature=0.0, eos_token_id=None)
    assert decode._cache_size() == before + 1
    assert (greedy != drawn).any()


def test_draws_follow_the_softmax(model):
    """Pearson's χ² of one position's tokens over those that are expected often enough."""
    count, temperature = 6000, 0.7
    found = draw(model, [PROMPTS[0]] * count, max_new_tokens=1, temperature=temperature)[:, 0]
    logits = np.asarray(model(jax.numpy.array([PROMPTS[0]], "int32")), np.float64)[0, -1]
    observed = np.bincount(found, minlength=len(logits))

    def statistic(temperature):
        weights = np.exp((logits - logits.max()) / temperature)
        expected = count * weights / weights.sum()
        often = expected >= 8
        rare = expected[~often].sum(), observed[~often].sum()
        pairs = [*zip(expected[often], observed[often], strict=True), rare]
        return sum((o - e) ** 2 / e for e, o in pairs), len(pairs) - 1

    distance, freedom = statistic(temperature)
    assert freedom > 20
    assert distance < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations
    wrong, freedom = statistic(1.0)
    assert wrong > 3 * freedom


def test_an_end_is_repeated(model, drawn):
    ends = drawn[0, 4], drawn[1, 7]
    found = draw(model, eos_token_id=[int(e) for e in ends])
    for row, without in zip(found, drawn, strict=True):
        at = np.flatnonzero(np.isin(without, ends))
        first = at[0] if at.size else NEW
        np.testing.assert_array_equal(row[:first], without[:first])
        assert (row[first:] == without[min(first, NEW - 1)]).all()


def test_all_ended_at_once(model, drawn):
    """The loop stops; what it didn't come to is filled all the same."""
    found = draw(model, eos_token_id=[int(token) for token in drawn[:, 0]])
    np.testing.assert_array_equal(found, np.repeat(drawn[:, :1], NEW, axis=1))


def test_an_array_of_prompts_is_a_list_of_lists(model):
    rows = [[5, 6, 7, 8], [1, 2, 3, 4]]
    expected = draw(model, rows, temperature=0.0)
    for tokens in (np.array(rows, np.int64), jax.numpy.array(rows, "int32"), tuple(rows)):
        np.testing.assert_array_equal(draw(model, tokens, temperature=0.0), expected)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "hold no prompt"),
        ([[1, 2], []], "prompt 1 is empty"),
        (np.zeros((2, 0), np.int32), "prompt 0 is empty"),
        ([[1, 320]], "prompt 0 has the token 320; expected ids from 0 to 319"),
        ([[1], [2, -1]], "prompt 1 has the token -1"),
        ([[1.0, 2.0]], "float64.* expected a list of token ids"),
        ([1, 2, 3], "prompt 0 is an array int64\\[\\]"),
        (np.array([1, 2, 3]), r"shape \(3,\); expected \[document, position\]"),
        ("Once upon a time", "which a tokenizer makes of a text"),
    ],
)
def test_bad_tokens(model, tokens, message):
    with pytest.raises(DatasetError, match=message):
        generate(model, tokens, max_new_tokens=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number from 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        (
            {"max_new_tokens": 121},
            "121 after a prompt of 8 tokens is longer than the 128",
        ),
        ({"temperature": -1.0}, "temperature is -1.0; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 to 4294967295"),
        ({"eos_token_id": 320}, "eos_token_id is 320; expected a whole number from 0 to 319"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"first_document": True}, "first_document is True"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ConfigError, match=message):
        draw(model, **options)


def test_what_load_returns_is_not_yet_a_model(loaded):
    with pytest.raises(TypeError, match=r"got a LoadedModel; expected .* load\(...\).model"):
        draw(loaded)
