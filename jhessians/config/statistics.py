"""Options of what a `compute` run computes, by whichever method; no JAX is imported."""

from __future__ import annotations

from dataclasses import dataclass

from jhessians.config.option import option
from jhessians.devices.precision import HIGHEST, MATMUL_PRECISIONS

SOURCES = "what to run on"
DATA = "data"
NUMBERS = "numbers"
STATISTICS = "statistics"

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


@dataclass(frozen=True)
class Method:
    """One way to approximate the Hessian.

    Attributes:
        name: As typed after `--method`.
        bergson: What bergson calls it in `hessian_cfg.method`.
        ev_correction: Whether the eigenvalue correction belongs to it.
        factored: Whether it is made of Kronecker factors, rather than of dense Grams.
    """

    name: str
    bergson: str
    ev_correction: bool = False
    factored: bool = True


METHODS = (
    Method("ekfac", bergson="kfac", ev_correction=True),
    Method("kfac", bergson="kfac"),
    Method("tkfac", bergson="tkfac"),
    Method("shampoo", bergson="shampoo"),
    Method("autocorrelation", bergson="autocorrelation", factored=False),
)


@dataclass(frozen=True)
class StatisticsOptions:
    """What is computed, of which model and data, by any method."""

    run_path: str

    model: str | None = option(
        None,
        "Hugging Face Hub name or local folder of the checkpoint, a folder that jhessians convert "
        "wrote, or a LoRA adapter, whose own linears are then recorded.",
        group=SOURCES,
        metavar="NAME",
        default_text="the embedded demo",
        bergson="index_cfg.model",
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of the model on the Hub.",
        group=SOURCES,
        metavar="REV",
        default_text="the main branch",
        bergson="index_cfg.revision",
    )
    tokenizer: str | None = option(
        None,
        "Hub name or local folder of the tokenizer.",
        group=SOURCES,
        metavar="NAME",
        default_text="the model's own",
        bergson="index_cfg.tokenizer",
    )
    dataset: str | None = option(
        None,
        "Hub name, a .json, .jsonl, .csv, .parquet or .txt file, or a save_to_disk folder.",
        group=SOURCES,
        metavar="NAME",
        default_text="the embedded demo",
        bergson="index_cfg.data.dataset",
    )

    split: str = option(
        "train",
        "Split of the data set; slices such as train[:100] work.",
        group=DATA,
        metavar="SPLIT",
        bergson="index_cfg.data.split",
    )
    subset: str | None = option(
        None,
        "Configuration of a data set that has several.",
        group=DATA,
        metavar="NAME",
        default_text="none",
        bergson="index_cfg.data.subset",
    )
    prompt_column: str = option(
        "text",
        "Column with the text, or with the prompt where there is a completion.",
        group=DATA,
        metavar="COLUMN",
        bergson="index_cfg.data.prompt_column",
    )
    completion_column: str = option(
        "",
        "Column with the completion; the loss is then taken on the completion only.",
        group=DATA,
        metavar="COLUMN",
        default_text="none",
        bergson="index_cfg.data.completion_column",
    )
    conversation_column: str = option(
        "",
        "Column with lists of chat messages; the loss is then taken on the assistant's turns only.",
        group=DATA,
        metavar="COLUMN",
        default_text="none",
        bergson="index_cfg.data.conversation_column",
    )
    truncation: bool = option(
        False,
        "Cut documents that are longer than the model or the token budget allows, instead of "
        "refusing them.",
        group=DATA,
        bergson="index_cfg.data.truncation",
    )
    chunk_length: int = option(
        0,
        "Join the documents and cut them into chunks of this many tokens.",
        group=DATA,
        metavar="TOKENS",
        unit="tokens",
        minimum=0,
        default_text="0 tokens, documents stay whole",
        bergson="index_cfg.data.chunk_length",
    )
    max_tokens: int | None = option(
        None,
        "Process this many tokens: the data set's beginning, or repetitions of a smaller one.",
        group=DATA,
        kind="integer",
        metavar="TOKENS",
        unit="tokens",
        minimum=2,
        default_text="each document once",
        bergson="index_cfg.max_tokens",
    )

    precision: str = option(
        "fp32",
        "Number format of the model's weights and activations.",
        group=NUMBERS,
        choices=PRECISIONS,
        bergson="index_cfg.precision",
    )
    hessian_dtype: str = option(
        "fp32",
        "Number format in which statistics are summed and stored; eigendecompositions always "
        "run in fp64.",
        group=NUMBERS,
        choices=PRECISIONS,
        bergson="hessian_cfg.hessian_dtype",
    )
    matmul_precision: str = option(
        HIGHEST,
        "How float32 numbers are multiplied: in full (highest) or, on GPU and TPU, faster and less "
        "exactly: split into parts, as so many products (bf16_x6, tf32_x3, bf16_x3), or rounded "
        "(tf32, bf16).",
        group=NUMBERS,
        metavar="HOW",
        choices=tuple(MATMUL_PRECISIONS),
    )
    seed: int = option(
        0,
        "Seed of the labels that are sampled from the model.",
        group=NUMBERS,
        metavar="N",
        minimum=0,
        maximum=2**32 - 1,
    )

    method: str = option(
        METHODS[0].name,
        "Approximation of the Hessian: the Kronecker factors of ekfac (kfac with the eigenvalue "
        "correction), kfac, tkfac or shampoo, or the dense Grams of autocorrelation.",
        group=STATISTICS,
        metavar="METHOD",
        choices=tuple(each.name for each in METHODS),
    )
    ev_correction: bool | None = option(
        None,
        "Compute the eigenvalue correction too, of any method: with it, kfac becomes ekfac.",
        group=STATISTICS,
        kind="flag",
        default_text="as the method implies: true for ekfac, else false",
    )
    normalize_trace: bool = option(
        False,
        "With tkfac, divide the activation factor by the trace, as its paper does and bergson "
        "does not.",
        group=STATISTICS,
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
