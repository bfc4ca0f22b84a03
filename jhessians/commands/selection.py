"""Which linears a run records: `--modules`, `--filter_modules` and `--moe_experts`."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from jhessians.capture.coverage import Sites
from jhessians.capture.site import Site
from jhessians.capture.sites import restrict
from jhessians.config.option import matching
from jhessians.config.statistics import GradientOptions
from jhessians.errors import ConfigError


def select_sites(
    sites: Mapping[str, Site],
    config: GradientOptions,
    base_prefix: str,
    note: Callable[[str], None] = lambda line: None,
) -> Sites:
    """The sites that the options take in.

    Args:
        sites: All of the model's.
        config: The options.
        base_prefix: What Hugging Face's whole model calls the one without the head, as globs of
            `--moe_experts` do.
        note: Is told of experts that nobody asked for.

    Returns:
        The chosen sites by name, in the model's order; experts that aren't wanted are left out.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left.
    """
    everything = _names(sites)
    sites = _with_experts(sites, _patterns(config.moe_experts), base_prefix, note)
    names = _names(sites)
    leave_out = _patterns(config.filter_modules)
    for flag, patterns in (("modules", config.modules), ("filter_modules", leave_out)):
        for pattern in patterns:
            if _any(everything, pattern) and not _any(names, pattern):
                remedy = (
                    f"--moe_experts {config.moe_experts!r} leaves out; widen it"
                    if config.moe_experts
                    else "are left out; add --moe_experts"
                )
                raise ConfigError(
                    f"--{flag} {pattern!r} matches only linears of experts that {remedy}"
                )
        matching(flag, patterns, names)

    def wanted(name: str) -> bool:
        taken = not config.modules or any(fnmatchcase(name, p) for p in config.modules)
        return taken and not any(fnmatchcase(name, p) for p in leave_out)

    chosen = restrict(sites, wanted)
    if not chosen:
        raise ConfigError(
            f"--modules and --filter_modules leave none of {len(names)} modules; leave some"
        )
    return chosen


def _with_experts(
    sites: Mapping[str, Site],
    patterns: list[str],
    base_prefix: str,
    note: Callable[[str], None],
) -> Sites:
    """All sites but those of experts in layers that no pattern matches."""
    layers: dict[str, str] = {}  # of an expert's linear, the layer's experts as the patterns say
    for site in sites.values():
        for name in site.module_names() if site.routed else ():
            layers[name] = f"{base_prefix}.{name.rpartition('.expert_')[0]}"
    known = list(dict.fromkeys(layers.values()))
    if patterns and not known:
        raise ConfigError(
            f"--moe_experts {patterns[0]!r} is given, but the model has no mixture of experts; "
            "leave it out"
        )
    chosen = set(matching("moe_experts", patterns, known))
    if known and not patterns:
        glob = ".".join("*" if part.isdigit() else part for part in known[0].split("."))
        note(f"{len(layers)} linears of experts are left out; --moe_experts '{glob}' takes them in")
    return restrict(sites, lambda name: name not in layers or layers[name] in chosen)


def _names(sites: Mapping[str, Site]) -> list[str]:
    return [name for site in sites.values() for name in site.module_names()]


def _any(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _patterns(text: str | None) -> list[str]:
    return [pattern.strip() for pattern in (text or "").split(",") if pattern.strip()]
