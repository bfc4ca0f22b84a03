"""Second moments of trained optimizers: torch's against bergson and torch itself, and optax's."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from bergson.gradients import AdamNormalizer as TheirAdam
from bergson.utils.load_from_optimizer import load_from_optimizer
from flax import nnx
from transformers import Adafactor, AutoModelForCausalLM, Trainer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from converters import registry
from converters.parameter_order import named_parameters
from jhessians.errors import CheckpointError, NumericsError
from jhessians.folds.normalizers import AdafactorNormalizer, AdamNormalizer
from jhessians.interop.optax_state import is_orbax, normalizers_from_optax, read_optax_state
from jhessians.interop.optimizer_state import load_normalizers, read_torch_optimizer
from jhessians.models.layers import Linear, Stack
from jhessians.models.moe import ExpertLinear
from tests.oracles.architectures import ARCHITECTURES
from tests.oracles.families import FAMILIES
from tests.small import fill

# A width of the MLP that equals the model's: more square weights than attention's own.
CHANGES = {"gpt2": {"n_inner": 48}, "llama": {"attention_bias": True}, "gpt_neox": {}}
LAYOUTS = ("one group", "trainer", "biases", "names in states", "names in groups")


def config_of(family):
    return CONFIG_MAPPING[family](**FAMILIES[family](64) | CHANGES[family])


def groups_of(model, layout):
    """The optimizer's parameters as various programs group them."""
    named = list(model.named_parameters())
    if layout == "names in groups":
        return [{"params": named[1:]}, {"params": named[:1], "weight_decay": 0.0}]
    if layout == "trainer":
        decayed = set(Trainer.get_decay_parameter_names(None, model))
    else:  # the older Trainer's, where it does not know a model's norms
        decayed = {name for name, _ in named if not name.endswith("bias")}
    if layout not in ("trainer", "biases"):
        return [{"params": [p for _, p in named]}]
    decay = [p for name, p in named if name in decayed]
    rest = [p for name, p in named if name not in decayed]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


@cache
def trained(family, layout="one group", kind="adam"):
    """A model after two steps, its optimizer, and the second moments by parameter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family))
    groups = groups_of(model, layout)
    optimizer = (
        torch.optim.AdamW(groups, lr=1e-3)
        if kind == "adam"
        else Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False)
    )
    for seed in range(2):
        tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def written(path, family, layout="one group", kind="adam", change=lambda content: None):
    model, optimizer = trained(family, layout.replace("names in states", "one group"), kind)
    content = optimizer.state_dict()
    content = {"state": {k: dict(v) for k, v in content["state"].items()}, **{
        "param_groups": [dict(group) for group in content["param_groups"]]}}  # fmt: skip
    if layout == "names in states":
        names = [name for name, _ in model.named_parameters()]
        for index, state in content["state"].items():
            state["param_name"] = names[index]
        # As an FSDP model writes it: numbers that mean nothing here.
        content["state"] = dict(enumerate(reversed(content["state"].values())))
    change(content)
    torch.save(content, path)
    return model, optimizer


def read(path, family, **options):
    return read_torch_optimizer(path, named_parameters(config_of(family)), **options)


def assert_equal(found, expected):
    """Our normalizer and bergson's: the same kind, and bit for bit the same moments."""
    assert type(found).__name__ == type(expected).__name__
    for name in ("weight_avg_sq", "row", "col", "bias_avg_sq"):
        x, y = getattr(found, name, None), getattr(expected, name, None)
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_array_equal(x, y.numpy())


@pytest.mark.parametrize("include_bias", [True, False])
@pytest.mark.parametrize("kind", ["adam", "adafactor"])
@pytest.mark.parametrize("family", CHANGES)
def test_the_same_as_bergson_reads(family, kind, include_bias, tmp_path):
    model, _ = written(tmp_path / "optimizer.pt", family, kind=kind)
    found = read(tmp_path, family, include_bias=include_bias)
    expected = load_from_optimizer(model, str(tmp_path), include_bias, set(found))
    assert set(found) == set(expected) and len(found) == {"llama": 14}.get(family, 8)
    for name, normalizer in found.items():
        assert_equal(normalizer, expected[name])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("family", CHANGES)
def test_every_layout_gives_each_module_its_own_moments(family, layout, tmp_path):
    model, optimizer = written(tmp_path / "o.pt", family, layout)
    found = read(tmp_path / "o.pt", family, include_bias=True)
    modules = dict(model.base_model.named_modules())
    for name, normalizer in found.items():
        moment = optimizer.state[modules[name].weight]["exp_avg_sq"]
        is_conv1d = family == "gpt2"
        bias = modules[name].bias
        expected = TheirAdam(
            moment.T if is_conv1d else moment,
            None if bias is None else optimizer.state[bias]["exp_avg_sq"],
        )
        assert_equal(normalizer, expected)
    # Of today's Trainer bergson takes a split that knows layer norms, but not Llama's norms.
    if layout in ("names in states", "biases" if family == "llama" else "trainer"):
        theirs = load_from_optimizer(model, str(tmp_path / "o.pt"), True, set(found))
        assert set(theirs) == set(found)
        for name, normalizer in found.items():
            assert_equal(normalizer, theirs[name])


def test_a_square_conv1d_is_transposed_and_a_square_linear_is_not(tmp_path):
    for family, module, path in (
        ("gpt2", "h.1.attn.c_proj", "transformer.h.1.attn.c_proj"),
        ("llama", "layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
    ):
        model, optimizer = written(tmp_path / "o.pt", family)
        moment = optimizer.state[model.get_submodule(path).weight]["exp_avg_sq"].numpy()
        assert moment.shape == (48, 48) and not np.array_equal(moment, moment.T)
        found = read(tmp_path / "o.pt", family)[module].weight_avg_sq
        np.testing.assert_array_equal(found, moment.T if family == "gpt2" else moment)


def test_wrappers_names_half_precision_and_unquantised_8_bit_optimizers(tmp_path):
    def change(content):
        for state in content["state"].values():
            moment = state.pop("exp_avg_sq").bfloat16()
            state["__bnb_optimizer_quant_state__"] = {"state2": moment}
            state["param_name"] = f"module._orig_mod.{state['param_name']}"

    written(tmp_path / "o.pt", "gpt2", "names in states", change=change)
    found = read(tmp_path / "o.pt", "gpt2")
    written(tmp_path / "o.pt", "gpt2", "names in states")
    for name, normalizer in read(tmp_path / "o.pt", "gpt2").items():
        assert found[name].weight_avg_sq.dtype == np.float32
        np.testing.assert_allclose(found[name].weight_avg_sq, normalizer.weight_avg_sq, rtol=1e-2)


def first_state(content):
    return next(s for s in content["state"].values() if s["param_name"].endswith("c_attn.weight"))


def quantise(content):
    state = first_state(content)
    state.pop("exp_avg_sq")
    codes = {"state2": torch.zeros(9, dtype=torch.uint8)}
    state["__bnb_optimizer_quant_state__"] = codes


def replace_group(content):
    content["param_groups"][0]["params"] = content["param_groups"][0]["params"][1:]
    for state in content["state"].values():
        del state["param_name"]


def forget_names(content):
    for state in content["state"].values():
        del state["param_name"]


def double(content):
    names = [s["param_name"] for s in content["state"].values()]
    list(content["state"].values())[0]["param_name"] = names[1]


BROKEN = {
    "8 bits": (quantise, CheckpointError, "8-bit optimizer"),
    "sgd": (lambda c: first_state(c).pop("exp_avg_sq"), CheckpointError, "but step, exp_avg"),
    "nothing": (lambda c: c["state"].clear(), CheckpointError, "an empty state"),
    "no state": (lambda c: c.pop("state"), CheckpointError, "no state and param_groups"),
    "no groups": (lambda c: c.pop("param_groups"), CheckpointError, "no state and param_groups"),
    "odd state": (lambda c: c["state"].update({0: 1}), CheckpointError, "no state and param_gr"),
    **{
        f"groups of {name}": (
            lambda c, change=change: change(c["param_groups"]),
            CheckpointError,
            "no state and param_groups of the usual form",
        )
        for name, change in {
            "words": lambda groups: groups.append("x"),
            "no params": lambda groups: groups[0].pop("params"),
            "params in a table": lambda groups: groups[0].update(params={0: 1}),
            "params in a list": lambda groups: groups[0]["params"].append([0]),
            "params with a fraction": lambda groups: groups[0]["params"].append(0.5),
            "a name without a list": lambda groups: groups[0].update(param_names="wte.weight"),
            "names that are numbers": lambda groups: groups[0].update(param_names=[1]),
            "names that are a number": lambda groups: groups[0].update(param_names=3),
        }.items()
    },
    "a number twice": (
        lambda c: (forget_names(c), c["param_groups"][0]["params"].append(0)),
        CheckpointError,
        "a parameter twice in its param_groups",
    ),
    "truth": (
        lambda c: first_state(c).update(exp_avg_sq=first_state(c)["exp_avg_sq"] > 0),
        CheckpointError,
        "has no exp_avg_sq of .* as floating-point numbers",
    ),
    "frozen": (
        lambda c: first_state(c).update(param_name="transformer.x.weight"),
        CheckpointError,
        "no second moment of transformer.h.1.attn.c_attn.weight; .*`filter_modules`",
    ),
    "twice": (double, CheckpointError, "twice; expected it once"),
    "fewer": (replace_group, CheckpointError, "param_groups of 27 parameters, while .* has 28"),
    "another order": (forget_names, CheckpointError, "has shape .*; expected .* very model"),
    "negative": (lambda c: first_state(c)["exp_avg_sq"].sub_(1), NumericsError, "is negative"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_states_that_do_not_fit_are_refused_in_one_line(case, tmp_path):
    damage, kind, message = BROKEN[case]

    def change(content):
        for state in content["state"].values():
            for key, value in state.items():
                state[key] = value.clone() if isinstance(value, torch.Tensor) else value
        damage(content)

    written(tmp_path / "o.pt", "gpt2", "names in states", change=change)
    with pytest.raises(kind, match=message) as caught:
        read(tmp_path / "o.pt", "gpt2")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_files_that_are_not_there_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(CheckpointError, match="does not exist; give an optimizer's state"):
            read(path, "gpt2")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.wide = Linear(6, 8, rngs=rngs)
        self.square = Linear(6, 6, use_bias=False, rngs=rngs)


class Model(nnx.Module):
    """One's own: a stack of named and unnamed linears, and others around it."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = Linear(5, 4, name="input", rngs=rngs)
        self.layers = Stack(Block, 3, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(3))
        self.last = Linear(9, 9, rngs=rngs)


NAMES = {
    "input": ("first", None),
    **{f"layers.{i}.{name}": (f"layers.blocks.{name}", i) for name in ("wide", "square")
       for i in range(3)},
    "last": ("last", None),
}  # fmt: skip


def random_like(tree, seed=0):
    """The tree with random floats ≥ 0 in place of its floats; nothing is compiled."""
    random = np.random.default_rng(seed)

    def draw(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(random.standard_normal(x.shape).astype(x.dtype) ** 2)

    return jax.tree.map(draw, tree)


def filled(transformation, model=None):
    """The state of an optimizer, with random moments."""
    return random_like(transformation.init(nnx.state(model or Model(), nnx.Param)))


def trained_by(transformation):
    """The state after updates, by the same random gradients for every transformation."""
    params = nnx.state(Model(), nnx.Param)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = transformation.init(params)
        for seed in range(2):
            _, state = transformation.update(random_like(params, seed), state, params)
    return state


def at(tree, name, kind):
    path, layer = NAMES[name]
    for step in (*path.split("."), kind):
        tree = tree[step]
    value = np.asarray(tree.get_value() if isinstance(tree, nnx.Variable) else tree)
    return value if layer is None else value[layer]


ADAMS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), every_k_schedule=1).gradient_transformation(),
}


def adam_state(state):
    """optax's own way to its state."""
    kind = optax.ScaleByAdamState
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return next(leaf for leaf in leaves if isinstance(leaf, kind))


def save(folder, state):
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, state)
    return folder


@pytest.mark.parametrize("transformation", ADAMS)
def test_adams_moments_from_memory_and_from_orbax(transformation, tmp_path):
    state = filled(ADAMS[transformation])
    nu = adam_state(state).nu
    path = save(tmp_path / "run", {"optimizer": state, "model": nnx.state(Model()), "step": 3})
    model = nnx.eval_shape(Model)
    assert is_orbax(path) and is_orbax(tmp_path) and not is_orbax(tmp_path / "none")
    for found in (
        normalizers_from_optax(state, model, include_bias=True),
        read_optax_state(path, model, include_bias=True),
        load_normalizers(tmp_path, model=model, parameters=(), include_bias=True),
    ):
        assert set(found) == set(NAMES)
        for name, normalizer in found.items():
            assert isinstance(normalizer, AdamNormalizer)
            np.testing.assert_array_equal(normalizer.weight_avg_sq, at(nu, name, "kernel").T)
            if "square" in name:
                assert normalizer.bias_avg_sq is None
            else:
                np.testing.assert_array_equal(normalizer.bias_avg_sq, at(nu, name, "bias"))
    assert normalizers_from_optax(state, model)["last"].bias_avg_sq is None


def test_flax_optimizers_and_pure_dicts(tmp_path):
    model = Model()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    whole = random_like(nnx.state(optimizer))
    nu = whole["opt_state"][0]["nu"]
    for name, state in (("variables", whole), ("dicts", nnx.to_pure_dict(whole))):
        found = read_optax_state(save(tmp_path / name, state), model)
        for module, normalizer in found.items():
            expected = at(nu, module, "kernel").T
            np.testing.assert_array_equal(normalizer.weight_avg_sq, expected)


def test_a_decoders_moments_have_bergsons_names(tmp_path):
    model = fill(lambda: registry.create(config_of("gpt2"), rngs=nnx.Rngs(0)))
    found = normalizers_from_optax(filled(optax.adam(1e-3), model), model)
    listed = {p.module: p for p in named_parameters(config_of("gpt2")) if len(p.shape) == 2}
    assert set(found) == set(listed) - {None}
    for name, normalizer in found.items():
        assert normalizer.weight_avg_sq.shape == listed[name].shape[::-1]  # Conv1D is [in, out]


def mixture():
    return registry.create(CONFIG_MAPPING["gpt_oss"](**ARCHITECTURES["gpt_oss"](64)),
                           rngs=nnx.Rngs(0))  # fmt: skip


def test_moments_of_experts_are_cut_by_layer_and_expert():
    model = fill(mixture)
    state = filled(optax.adam(1e-3), model)
    found = normalizers_from_optax(state, model, include_bias=True)
    assert len(found) == 3 * (4 + 2 * 6)
    moments = nnx.to_pure_dict(adam_state(state).nu)["layers"]["blocks"]["mlp"]["gate_up"]
    for layer, expert in ((0, 0), (0, 5), (2, 3)):
        one = found[f"layers.{layer}.mlp.experts.expert_{expert}.gate_up_proj"]
        np.testing.assert_array_equal(one.weight_avg_sq, moments["kernel"][layer, expert].T)
        np.testing.assert_array_equal(one.bias_avg_sq, moments["bias"][layer, expert])


def test_means_over_experts_are_no_second_moments():
    """optax's Adafactor factors the two largest axes, whatever they stand for."""
    model = nnx.eval_shape(lambda: ExpertLinear(9, 4, 5, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), nnx.state(model, nnx.Param))
    state = random_like(optax.adafactor(1e-3, min_dim_size_to_factor=4).init({"one": params}))
    holder = nnx.Dict(one=model)
    with pytest.raises(CheckpointError, match=r"of one.kernel of shape .*; expected \(9, 4, 5\)"):
        normalizers_from_optax(state, holder)


@pytest.mark.parametrize("factor_at", [1, 6, 128])
def test_adafactors_moments(factor_at, tmp_path):
    transformation = optax.adafactor(1e-3, min_dim_size_to_factor=factor_at, decay_rate=0.8)
    state = trained_by(transformation)
    dense = trained_by(optax.adafactor(1e-3, factored=False, decay_rate=0.8))
    model = nnx.eval_shape(Model)
    whole = normalizers_from_optax(dense, model, include_bias=True)
    if factor_at == 1:  # then also [layer, out] is factored, over the layers
        with pytest.raises(CheckpointError, match=r"layers.blocks.wide.bias of shape"):
            normalizers_from_optax(state, model, include_bias=True)
    for found in (
        normalizers_from_optax(state, model),
        read_optax_state(save(tmp_path / "run", state), model),
    ):
        for name, normalizer in found.items():
            v = np.asarray(whole[name].weight_avg_sq)
            if min(v.shape) < factor_at:
                np.testing.assert_allclose(normalizer.weight_avg_sq, v, rtol=1e-5)
                continue
            assert isinstance(normalizer, AdafactorNormalizer)
            np.testing.assert_allclose(normalizer.row, v.mean(1), rtol=1e-5)
            np.testing.assert_allclose(normalizer.col, v.mean(0), rtol=1e-5)


def other_model():
    model = nnx.eval_shape(Model)
    model.last = nnx.eval_shape(lambda: Linear(9, 8, rngs=nnx.Rngs(0)))
    return model


def larger_model():
    model = nnx.eval_shape(Model)
    model.extra = nnx.eval_shape(lambda: Linear(2, 2, rngs=nnx.Rngs(0)))
    return model


@pytest.mark.parametrize(
    ("state", "model", "message"),
    [
        (lambda: optax.sgd(1e-3).init({}), Model, "holds no state of optax's Adam"),
        (lambda: filled(optax.adam(1e-3)), other_model, r"of shape \(9, 9\); expected \(9, 8"),
        (lambda: filled(optax.adam(1e-3)), larger_model, "no second moment of extra.kernel"),
        (lambda: [filled(optax.adam(1e-3))] * 2, Model, "2 second moments of first.kernel"),
    ],
)
def test_optax_states_that_do_not_fit_are_refused(state, model, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        normalizers_from_optax(state(), model())
    assert "\n" not in str(caught.value)


def test_moments_of_parts_that_are_optimised_apart(tmp_path):
    labels = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "slow" if "layers" in str(path) else "fast", params
    )
    apart = optax.partition({"slow": optax.adam(1e-5), "fast": optax.adam(1e-3)}, labels)
    state = filled(apart)
    both = [adam_state(state.inner_states[part]).nu for part in ("slow", "fast")]
    path = save(tmp_path / "run", state)
    for found in (normalizers_from_optax(state, Model()), read_optax_state(path, Model())):
        assert set(found) == set(NAMES)
        for name, normalizer in found.items():
            expected = at(both["layers" not in name], name, "kernel").T
            np.testing.assert_array_equal(normalizer.weight_avg_sq, expected)


def test_damaged_orbax_checkpoints_are_refused(tmp_path):
    folder = save(tmp_path / "run", filled(ADAMS["adam"]))
    (folder / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="can't be read as an Orbax checkpoint") as caught:
        read_optax_state(folder, Model())
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="isn't an Orbax checkpoint of one tree"):
        read_optax_state(tmp_path / "none", Model())
