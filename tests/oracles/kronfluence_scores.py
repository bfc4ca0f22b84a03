"""Influence scores of kronfluence on CPU in float64, with factors that it fits itself.

A third implementation beside bergson and numpy: its own hooks, factors, inverse and contractions.
It knows `nn.Linear` only and gives every module with a bias a column for it, so compare with
`include_bias`. Documents go through one at a time: nothing is padded. Each one's last position is
masked, as bergson masks it; kronfluence on its own would count it in A.

Precision: everything is float64 here, its eigendecomposition and damping included, so that scores
are good to 1e-12 of their query's largest on a model whose own code computes nothing in float32.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from safetensors.numpy import save_file

from tests.oracles import capture

# kronfluence's name of a factor → bergson's folder.
_FOLDERS = {
    "activation_eigenvectors": "eigen_activation_sharded",
    "gradient_eigenvectors": "eigen_gradient_sharded",
    "activation_covariance": "activation_sharded",
    "gradient_covariance": "gradient_sharded",
}
_WIDE = torch.float64

Tokens = Sequence[Sequence[int]]


class _LanguageModelling(Task):
    """Summed cross-entropy of the labelled next tokens; a batch is one document's two rows."""

    def __init__(self, modules: list[str]):
        super().__init__()
        self.modules = modules

    def compute_train_loss(self, batch, model, sample=False):
        assert not sample, "the empirical Fisher samples no labels"
        tokens, labels = batch[:, 0], batch[:, 1]
        logits = model(input_ids=tokens).logits
        return capture.document_loss(logits[0], labels[0])

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.modules

    def get_attention_mask(self, batch):
        mask = torch.ones_like(batch[:, 0])
        mask[:, -1] = 0
        return mask


class Kronfluence:
    """EKFAC of documents' own labels, and scores with it.

    Args:
        model_dir: Checkpoint folder, of a model whose linears are `nn.Linear`.
        token_lists: Token ids of each document of the fit.
        label_lists: Labels of each document, -100 for none; the tokens themselves where omitted.
        strategy: kronfluence's: "ekfac", "kfac" (its eigenvalues are per position, not per
            document), "diagonal", or "identity" for dot products.
    """

    def __init__(
        self,
        model_dir: str | Path,
        token_lists: Tokens,
        label_lists: Tokens | None = None,
        *,
        strategy: str = "ekfac",
    ):
        model = capture.load(model_dir)
        model.config.use_cache = False
        self._prefix = model.base_model_prefix + "."
        task = _LanguageModelling([self._prefix + name for name in capture.linears(model)])
        self._scratch = tempfile.TemporaryDirectory(prefix="kronfluence-oracle-")
        self._analyzer = Analyzer(
            "oracle",
            prepare_model(model, task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=self._scratch.name,
        )
        self.documents = len(token_lists)
        self._analyzer.fit_all_factors(
            "factors",
            _rows(token_lists, label_lists),
            per_device_batch_size=1,
            factor_args=FactorArguments(
                strategy=strategy,
                use_empirical_fisher=True,
                activation_covariance_dtype=_WIDE,
                gradient_covariance_dtype=_WIDE,
                per_sample_gradient_dtype=_WIDE,
                lambda_dtype=_WIDE,
            ),
        )

    def factors(self) -> dict[str, dict[str, np.ndarray]]:
        """bergson's folder → module → array, of the folders that scores with Λ need, and A and S.

        A, S and both bases are kronfluence's own; Λ is its sum over documents divided by them.
        """
        loaded = self._load()
        result = {
            folder: {self._name(module): value.numpy() for module, value in loaded[name].items()}
            for name, folder in _FOLDERS.items()
        }
        result["eigenvalue_correction_sharded"] = {
            self._name(module): value.numpy() / self.documents
            for module, value in loaded["lambda_matrix"].items()
        }
        return result

    def write(self, path: Path) -> Path:
        """The same factors as a Hessian directory of one shard, for readers of bergson's layout.

        Besides: `eigenvalue_sharded` and `factor_eig_*`, of its eigenvalues, and
        `total_processed.pt`.
        """
        loaded = self._load()
        count = int(next(iter(loaded["num_activation_covariance_processed"].values())))
        folders = self.factors()
        for side, short in (("activation", "a"), ("gradient", "g")):
            scale = math.sqrt(count / self.documents)
            folders[f"factor_eig_{short}"] = {
                self._name(module): value.numpy() * scale
                for module, value in loaded[f"{side}_eigenvalues"].items()
            }
        folders["eigenvalue_sharded"] = {
            module: np.outer(folders["factor_eig_g"][module], lambda_a)
            for module, lambda_a in folders["factor_eig_a"].items()
        }
        for folder, arrays in folders.items():
            (path / folder).mkdir(parents=True)
            contiguous = {module: np.ascontiguousarray(value) for module, value in arrays.items()}
            save_file(contiguous, path / folder / "shard_0.safetensors")
        torch.save(torch.tensor(count, dtype=torch.int64), path / "total_processed.pt")
        return path

    def pairwise(
        self,
        token_lists: Tokens,
        query_lists: Tokens,
        label_lists: Tokens | None = None,
        query_label_lists: Tokens | None = None,
        *,
        absolute_damping: float | None = None,
        per_token: bool = False,
    ) -> np.ndarray:
        """Scores, [document, query].

        Args:
            token_lists: Documents to score.
            query_lists: Documents whose loss they influence.
            label_lists, query_label_lists: Their labels.
            absolute_damping: Added to every eigenvalue; 0.1 · their mean over each module if None.
            per_token: [position, query] instead: documents in turn, each without its last position.
        """
        train = _rows(token_lists, label_lists)
        batches = range(len(train)) if per_token else [None]
        parts = []
        for each in batches:
            # Token scores of documents of different lengths fit into no one matrix of its own.
            self._analyzer.compute_pairwise_scores(
                "pairwise",
                "factors",
                _rows(query_lists, query_label_lists),
                train,
                per_device_query_batch_size=1,
                per_device_train_batch_size=1,
                train_indices=None if each is None else [each],
                # All queries at once, or each would have a pass over the documents.
                score_args=_score_arguments(
                    absolute_damping,
                    compute_per_token_scores=per_token,
                    query_gradient_accumulation_steps=len(query_lists),
                ),
                overwrite_output_dir=True,
            )
            found = self._analyzer.load_pairwise_scores("pairwise")["all_modules"].numpy()
            parts.append(found if each is None else found[:, 0, :-1])
        return np.concatenate(parts, axis=1).T

    def self_scores(
        self,
        token_lists: Tokens,
        label_lists: Tokens | None = None,
        *,
        absolute_damping: float | None = None,
    ) -> np.ndarray:
        """Each document's score for itself, [document]; arguments as in `pairwise`."""
        self._analyzer.compute_self_scores(
            "self",
            "factors",
            _rows(token_lists, label_lists),
            per_device_train_batch_size=1,
            score_args=_score_arguments(absolute_damping),
            overwrite_output_dir=True,
        )
        scores: np.ndarray = self._analyzer.load_self_scores("self")["all_modules"].numpy()
        return scores

    def _load(self) -> dict[str, dict[str, torch.Tensor]]:
        analyzer = self._analyzer
        return {
            **analyzer.load_covariance_matrices("factors"),
            **analyzer.load_eigendecomposition("factors"),
            **analyzer.load_lambda_matrices("factors"),
        }

    def _name(self, module: str) -> str:
        return module.removeprefix(self._prefix)


def _rows(token_lists: Tokens, label_lists: Tokens | None) -> list[torch.Tensor]:
    """A [2, position] tensor of tokens and labels for each document."""
    labels = label_lists or token_lists
    return [torch.tensor([list(t), list(y)]) for t, y in zip(token_lists, labels, strict=True)]


def _score_arguments(absolute_damping: float | None, **more: int) -> ScoreArguments:
    return ScoreArguments(
        damping_factor=absolute_damping,
        per_sample_gradient_dtype=_WIDE,
        precondition_dtype=_WIDE,
        score_dtype=_WIDE,
        **more,
    )
