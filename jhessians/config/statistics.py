"""Options of what is summed, by whichever method: labels, losses, modules; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass

from jhessians.config.option import option
from jhessians.errors import ConfigError

STATISTICS = "statistics"


@dataclass(frozen=True)
class LabelOptions:
    """Whose labels a curvature is of, and whether its eigenvalues are corrected."""

    ev_correction: bool | None = option(
        None,
        "Compute the eigenvalue correction too, of any method: with it, kfac becomes ekfac.",
        group=STATISTICS,
        value_type="flag",
        default_text="as the method implies: true for ekfac, else false",
    )
    fisher_type: str | None = option(
        None,
        "Labels: sampled from the model (the true Fisher) or the data set's own next tokens "
        "(the empirical Fisher).",
        group=STATISTICS,
        choices=("sampled", "dataset"),
        default_text="sampled; dataset for autocorrelation",
    )
    use_dataset_labels: bool = option(
        False,
        "bergson's name for --fisher_type dataset.",
        group=STATISTICS,
        bergson="hessian_cfg.use_dataset_labels",
    )
    mc_samples: int = option(
        1,
        "Labels to sample per position from one forward pass; the Fisher's variance falls with "
        "their number, the time of the backward pass grows.",
        group=STATISTICS,
        metavar="K",
        unit="label",
        minimum=1,
    )

    def check_together(self) -> None:
        """Refuse labels that contradict each other.

        Raises:
            ConfigError: The first clash found.
        """
        if self.use_dataset_labels and self.fisher_type == "sampled":
            raise ConfigError(
                "--use_dataset_labels contradicts --fisher_type sampled; give one of them"
            )


@dataclass(frozen=True)
class GradientOptions:
    """Which loss gradients are of, and of which modules."""

    loss_fn: str = option(
        "ce",
        "Loss of a token: cross-entropy, or log_odds, -log(p / (1 - p)), of the data set's labels.",
        group=STATISTICS,
        choices=("ce", "log_odds"),
        bergson="index_cfg.loss_fn",
    )
    label_smoothing: float = option(
        0.0,
        "Share of each of the data set's labels that is spread over the vocabulary.",
        group=STATISTICS,
        metavar="SHARE",
        minimum=0.0,
        maximum=1.0,
        default_text="0",
        bergson="index_cfg.label_smoothing",
    )
    loss_reduction: str = option(
        "sum",
        "How a document's token losses make its loss.",
        group=STATISTICS,
        choices=("sum", "mean"),
        bergson="index_cfg.loss_reduction",
    )
    include_bias: bool = option(
        False,
        "Treat biases as one more input column of the modules that have one.",
        group=STATISTICS,
        bergson="index_cfg.include_bias",
    )
    modules: tuple[str, ...] = option(
        (),
        "Modules to take in: names or globs, separated by spaces or commas.",
        group=STATISTICS,
        metavar="GLOB",
        default_text="every linear but the output head",
        bergson="index_cfg.modules",
    )
    filter_modules: str | None = option(
        None,
        "Modules to leave out: globs separated by commas, such as '*.mlp.*'.",
        group=STATISTICS,
        metavar="GLOBS",
        default_text="none",
        bergson="index_cfg.filter_modules",
    )
    moe_experts: str | None = option(
        None,
        "Layers of experts to take in, a pair of linears for each expert: globs separated by "
        "commas, such as 'model.layers.*.mlp.experts'.",
        group=STATISTICS,
        metavar="GLOBS",
        default_text="none",
        bergson="index_cfg.moe_experts",
    )


# A dataclass has its last base's fields first.
@dataclass(frozen=True)
class StatisticsOptions(GradientOptions, LabelOptions):
    """Whose gradients are summed, and of which loss."""
