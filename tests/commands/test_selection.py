"""Which linears a run records, told by names: globs, single experts, notes and refusals."""

import pytest

from jhessians.capture.site import Site
from jhessians.commands.compute.config import ComputeConfig
from jhessians.commands.selection import select_sites
from jhessians.errors import ConfigError

LAYERS, EXPERTS = 2, 3
GLOB = "model.layers.*.mlp.experts"


def sites(*, experts=True):
    """As `find_sites` gives them."""
    attention = Site(
        "layers.{layer}.self_attn.q_proj", 4, 4, use_bias=False, stack=(("layer", LAYERS),),
        members=tuple(range(LAYERS)), input_site="layers.{layer}.self_attn.q_proj",
    )  # fmt: skip
    found = [attention]
    for each in ("gate_up_proj", "down_proj") if experts else ():
        name = f"layers.{{layer}}.mlp.experts.expert_{{expert}}.{each}"
        stack = (("layer", LAYERS), ("expert", EXPERTS))
        members = tuple(range(LAYERS * EXPERTS))
        found.append(Site(name, 4, 4, use_bias=False, stack=stack, members=members,
                          input_site=name))  # fmt: skip
    return {site.name: site for site in found}


def select(given=None, **options):
    """Names of the chosen modules, and what was noted."""
    notes: list[str] = []
    config = ComputeConfig(run_path="r", **options)
    chosen = select_sites(given or sites(), config, "model", notes.append)
    return [name for site in chosen.values() for name in site.module_names()], notes


def expert(layer, number, projection):
    return f"layers.{layer}.mlp.experts.expert_{number}.{projection}_proj"


QUERIES = [f"layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]
ALL = [
    expert(layer, number, projection)
    for projection in ("gate_up", "down")
    for layer in range(LAYERS)
    for number in range(EXPERTS)
]


def test_experts_are_left_out_with_a_note_unless_asked_for():
    names, (note,) = select()
    assert names == QUERIES
    assert note == (
        "12 linears of experts are left out; --moe_experts 'model.layers.*.mlp.experts' takes them "
        "in"
    )
    # What the note says can be done.
    names, notes = select(moe_experts=note.split("'")[1])
    assert names == QUERIES + ALL and not notes
    assert select(moe_experts=" ")[0] == QUERIES


@pytest.mark.parametrize(
    ("globs", "layers"),
    [
        (GLOB, (0, 1)),
        ("model.layers.1.mlp.experts", (1,)),
        ("model.layers.1.mlp.experts, *.0.*", (0, 1)),
        ("*[!1].mlp.experts", (0,)),
    ],
)
def test_globs_name_layers_of_experts(globs, layers):
    names, notes = select(moe_experts=globs)
    assert names == QUERIES + [name for name in ALL if int(name.split(".")[1]) in layers]
    assert not notes


def test_single_experts_can_be_chosen_and_left_out():
    names, _ = select(moe_experts=GLOB, modules=("*.expert_2.*", "layers.0.*.expert_0.down_proj"))
    assert set(names) == {n for n in ALL if ".expert_2." in n} | {expert(0, 0, "down")}
    left_out = "*expert_1.*, layers.1.mlp.experts.expert_0.down_proj"
    names, _ = select(moe_experts=GLOB, filter_modules=left_out)
    gone = {n for n in ALL if ".expert_1." in n} | {expert(1, 0, "down")}
    assert names == QUERIES + [name for name in ALL if name not in gone]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moe_experts": "model.layers.*.mlp.expert"},
         ["--moe_experts 'model.layers.*.mlp.expert' matches none of 2", "mlp.experts"]),
        # As bergson, globs know the whole model's names.
        ({"moe_experts": "layers.*.mlp.experts"}, ["matches none of 2", "model.layers.0.mlp"]),
        ({"moe_experts": f"{GLOB},model.layers.7.mlp.experts"}, ["layers.7", "matches none of 2"]),
        # Its linears are no modules unless they are asked for.
        ({"modules": ("*.expert_0.*",)},
         ["--modules '*.expert_0.*' matches only linears of experts", "add --moe_experts"]),
        ({"filter_modules": "*q_proj,*.expert_1.*"},
         ["--filter_modules '*.expert_1.*' matches only", "add --moe_experts"]),
        ({"moe_experts": "*.0.*", "modules": ("layers.1.mlp.*",)},
         ["--modules 'layers.1.mlp.*' matches only", "--moe_experts '*.0.*'"]),
        ({"moe_experts": GLOB, "modules": ("*.expert_3.*",)},
         ["'*.expert_3.*' matches none of 14"]),
        ({"moe_experts": GLOB, "filter_modules": "*"}, ["leave none of 14 modules"]),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        select(**options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_experts_of_a_model_without_them_are_refused():
    with pytest.raises(ConfigError, match="has no mixture of experts; leave it out") as caught:
        select(sites(experts=False), moe_experts=GLOB)
    assert "\n" not in str(caught.value) and GLOB in str(caught.value)
