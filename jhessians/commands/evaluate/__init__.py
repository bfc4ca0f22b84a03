"""`evaluate`: numbers that say how good an attribution is.

`recall.py`, `lds.py` and `removal.py` measure finished scores, which `reading.py` reads; `bank.py`
trains the models that the linear datamodeling score needs, and `baseline.py` writes scores that
know nothing of the model. The options are in `config.py` and `bank_config.py`.
"""

from __future__ import annotations

from jhessians.commands.command import Command, Positional
from jhessians.commands.evaluate.bank_config import BankConfig
from jhessians.commands.evaluate.config import (
    BaselineConfig,
    LdsConfig,
    RecallConfig,
    RemovalConfig,
)

SUMMARY = "measure how good scores are: recall, lds, removal; bank, baseline"


# jax and transformers take seconds to import: --help must not wait for them.
def _recall(config: RecallConfig) -> str:
    from jhessians.commands.evaluate.recall import recall

    return recall(config)


def _lds(config: LdsConfig) -> str:
    from jhessians.commands.evaluate.lds import lds

    return lds(config)


def _removal(config: RemovalConfig) -> str:
    from jhessians.commands.evaluate.removal import removal

    return removal(config)


def _bank(config: BankConfig) -> str:
    from jhessians.commands.evaluate.bank import make_bank

    return make_bank(config)


def _baseline(config: BaselineConfig) -> str:
    from jhessians.commands.evaluate.baseline import baseline

    return baseline(config)


RECALL = Command(
    name="evaluate recall",
    summary="do scores find the documents that are known to be relevant?",
    usage="SCORES [--relevant COLUMN] [options]",
    description="""\
How well do scores find the documents that are known to be relevant to each
query: R-precision, MRR and recall@k, as means over queries with bootstrap
intervals. A column of the queries' data set lists the relevant documents.
""",
    examples="""\
  jhessians evaluate recall scores/demo
  jhessians evaluate recall scores/pythia --relevant sources --recall_at 1 10 100
""",
    config=RecallConfig,
    positionals=(
        Positional("scores", "Folder of finished scores, of jhessians or bergson.",
                   "jhessians evaluate recall scores/demo"),
    ),
    run=_recall,
    shows=True,
)  # fmt: skip
LDS = Command(
    name="evaluate lds",
    summary="do scores predict what models lose without some documents?",
    usage="SCORES [--bank BANK] [options]",
    description="""\
The linear datamodeling score (LDS; Park et al. 2023, arXiv:2303.14186): the rank
correlation between what scores predict for models trained on random subsets of
the documents, and what these models lose on each query. The models are a bank's;
scores must be of the same documents and queries, and of the model in BANK/model.
""",
    examples="""\
  jhessians evaluate lds scores/twin
  jhessians evaluate lds scores/refined --against scores/ekfac --bank runs/bank
""",
    config=LdsConfig,
    positionals=(
        Positional("scores", "Folder of finished scores, of jhessians or bergson.",
                   "jhessians evaluate lds scores/twin"),
    ),
    run=_lds,
    shows=True,
)  # fmt: skip
REMOVAL = Command(
    name="evaluate removal",
    summary="what does training without the best documents cost a query?",
    usage="SCORES [--bank BANK] [options]",
    description="""\
Train the bank's model again without the K documents that scores rank highest for
a query, and measure by how much the query's loss rises, beside leaving out random
documents. Takes as long as training so many models.
""",
    examples="""\
  jhessians evaluate removal scores/twin --remove 1 4 16 --queries 4
""",
    config=RemovalConfig,
    positionals=(
        Positional("scores", "Folder of finished scores, of jhessians or bergson.",
                   "jhessians evaluate removal scores/twin"),
    ),
    run=_removal,
    shows=True,
    compiles=True,
)  # fmt: skip
BANK = Command(
    name="evaluate bank",
    summary="train models on random subsets of the documents, for evaluate lds",
    usage="RUN_PATH [--model_config PATH --dataset NAME --query NAME] [options]",
    description="""\
Train a small model again and again from the same beginning, each time on a random
subset of the documents, and keep what each loses on the queries. RUN_PATH/model
is the model that was trained on all of them: fit and score that one, and measure
the scores with jhessians evaluate lds. Without more than RUN_PATH the embedded
demo's twin is trained, whose bank ships with jhessians.
""",
    examples="""\
  jhessians evaluate bank runs/bank --models 20
  jhessians evaluate bank runs/bank --model_config config.json --tokenizer gpt2 \\
      --dataset documents.jsonl --query queries.jsonl
""",
    config=BankConfig,
    positionals=(
        Positional("run_path", "Folder to write; must not exist yet.",
                   "jhessians evaluate bank runs/bank"),
    ),
    run=_bank,
    replays=True,
    compiles=True,
)  # fmt: skip
BASELINE = Command(
    name="evaluate baseline",
    summary="score documents by BM25, or at random",
    usage="RUN_PATH [--baseline bm25|random] [--like SCORES] [options]",
    description="""\
Score documents without the model: by the words that they share with a query, or
at random. What is written is read by the other commands as scores are.
""",
    examples="""\
  jhessians evaluate baseline scores/bm25
  jhessians evaluate baseline scores/random --baseline random --like scores/pythia
""",
    config=BaselineConfig,
    positionals=(
        Positional("run_path", "Folder to write; must not exist yet.",
                   "jhessians evaluate baseline scores/bm25"),
    ),
    run=_baseline,
)  # fmt: skip

EVALUATE = (RECALL, LDS, REMOVAL, BANK, BASELINE)
"""In the order of the list in `--help`."""
