"""The peers: their virtual environment, and what runs inside it.

`install` is called by compare.py. As a program this file runs in the peers' own environment (or
anyone's): `peers.py kronfluence MODEL TOKENS OUT BATCH` fits EKFAC with kronfluence,
`peers.py scores …` scores with it (see `score_with_kronfluence`), `peers.py bergson …` is bergson's
command line, with a fault of its `astra` mended, and `peers.py peak LIBRARY` measures the machine's
float32 matrix product.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

BERGSON = "bergson==2.5.1"
KRONFLUENCE = "kronfluence==1.0.1"

# The peers' own requirements name torchvision, torchaudio and more that a fit never imports, so
# they are installed without them, and what they do import by name.
WITHOUT_REQUIREMENTS = {
    "bergson": [BERGSON, "torchopt==0.7.3", "bitsandbytes"],
    "kronfluence": [KRONFLUENCE, "einconv"],
}
REQUIREMENTS = {
    "bergson": (
        "accelerate datasets graphviz jaxtyping jinja2 ml_dtypes natsort numpy optree peft petname "
        "pyarrow pyyaml safetensors scipy simple-parsing transformers"
    ).split(),
    "kronfluence": (
        "accelerate einops numpy opt-einsum safetensors tqdm transformers"
    ).split(),
}  # fmt: skip
MARKER = "made-by-jhessians-benchmarks"


class PeersMissing(RuntimeError):
    """The environment lacks a peer and may not be changed."""


def python_of(environment: Path) -> str:
    """The interpreter of a virtual environment."""
    return str(environment / "bin" / "python")


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """Installed versions in an environment; packages that are missing are left out."""
    code = (
        "import json, sys; from importlib.metadata import version, PackageNotFoundError\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    answer = subprocess.run([python, "-c", code, *packages], capture_output=True, check=True)
    return json.loads(answer.stdout)


def install(environment: Path, wanted: list[str], torch: list[str], *, allowed: bool) -> None:
    """See to it that an environment holds the peers; one that holds them is left alone.

    Args:
        environment: A virtual environment, made if it is missing.
        wanted: Of "bergson" and "kronfluence".
        torch: What pip is told to install as torch, where there is none.
        allowed: Whether anything may be installed.

    Raises:
        PeersMissing: If something is missing and nothing may be installed, or the environment is
            somebody else's.
        subprocess.CalledProcessError: If pip fails.
    """
    python = python_of(environment)
    pins = {pin.split("==")[0]: pin.split("==")[1] for pin in (BERGSON, KRONFLUENCE)}
    found = versions(python, ["torch", *wanted]) if Path(python).exists() else {}
    missing = [name for name in wanted if found.get(name) != pins[name]]
    if not missing and "torch" in found:
        return
    ours = not environment.exists() or (environment / MARKER).exists()
    if not allowed or not ours:
        what = ", ".join(f"{name}=={pins[name]}" for name in missing) or "torch"
        raise PeersMissing(
            f"{environment} lacks {what}; install it there, or let --peers-env name a folder "
            "that does not exist yet, without --skip-install"
        )
    if not Path(python).exists():
        print(f"making the peers' environment in {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        (environment / MARKER).touch()
    pip = [python, "-m", "pip", "install", "--quiet"]
    if "torch" not in found:
        subprocess.run([*pip, *torch], check=True)
    for name in missing:
        subprocess.run([*pip, *REQUIREMENTS[name]], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_REQUIREMENTS[name]], check=True)


def kronfluence_analyzer(model_folder: str, out: str):
    """kronfluence's `Analyzer`: the data's own labels, each document's last position masked as in
    bergson.
    """
    import torch
    import torch.nn.functional as functional
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.config.use_cache = False
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]

    class LanguageModelling(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch).logits[:, :-1]
            return functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            )

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return linears

        def get_attention_mask(self, batch):
            mask = torch.ones_like(batch)
            mask[:, -1] = 0
            return mask

    task = LanguageModelling()
    model = prepare_model(model, task)
    return Analyzer(
        "fit", model, task, cpu=not torch.cuda.is_available(), disable_tqdm=True, output_dir=out
    )


def read_documents(tokens_file: str) -> list:
    """A tensor of tokens for each line."""
    import torch

    with open(tokens_file) as lines:
        return [torch.tensor(json.loads(line)["input_ids"]) for line in lines]


def fit_with_kronfluence(model_folder: str, tokens_file: str, out: str, batch: int) -> None:
    """EKFAC of the data's own labels, `batch` tokens a step."""
    from kronfluence.arguments import FactorArguments

    data = read_documents(tokens_file)
    analyzer = kronfluence_analyzer(model_folder, out)
    common = {
        "factors_name": "ekfac",
        "factor_args": FactorArguments(strategy="ekfac", use_empirical_fisher=True),
    }
    passes = {
        "dataset": data,
        "per_device_batch_size": max(1, batch // len(data[0])),
        "dataloader_kwargs": None,
    }
    for stage, fit in (
        ("covariances", lambda: analyzer.fit_covariance_matrices(**common, **passes)),
        ("eigendecompositions", lambda: analyzer.perform_eigendecomposition(**common)),
        ("correction", lambda: analyzer.fit_lambda_matrices(**common, **passes)),
    ):
        print(f"begin {stage}", flush=True)
        fit()
        print(f"end {stage}", flush=True)


def score_with_kronfluence(
    what: str, model_folder: str, tokens_file: str, queries_file: str, out: str, batch: int,
    at_once: int,
) -> None:  # fmt: skip
    """Scores with the factors that lie in `out`, damped by 0.1 · the mean as everywhere.

    Args:
        what: "documents", "tokens", or "self" for each document's score for itself.
        model_folder: The checkpoint.
        tokens_file: Documents to score.
        queries_file: Queries; unused for "self".
        out: Folder of a fit, which receives the scores.
        batch: Tokens a step.
        at_once: Queries held in memory, each as large as the model, for a pass over the documents.
            The more of them, the fewer passes.
    """
    from kronfluence.arguments import ScoreArguments

    data = read_documents(tokens_file)
    analyzer = kronfluence_analyzer(model_folder, out)
    documents = max(1, batch // len(data[0]))
    common = {"factors_name": "ekfac", "train_dataset": data,
              "per_device_train_batch_size": documents}  # fmt: skip
    if what == "self":
        arguments = ScoreArguments(damping_factor=None)
        analyzer.compute_self_scores("self", score_args=arguments, **common)
        return
    queries = read_documents(queries_file)
    step = min(len(queries), documents, at_once)
    analyzer.compute_pairwise_scores(
        "pairwise",
        query_dataset=queries,
        per_device_query_batch_size=step,
        score_args=ScoreArguments(
            damping_factor=None,
            compute_per_token_scores=what == "tokens",
            query_gradient_accumulation_steps=max(1, at_once // step),
        ),
        **common,
    )


def measure_peak(library: str, size: int = 3072, repeats: int = 8) -> float:
    """The best float32 product of two size x size matrices, in FLOP per second.

    Args:
        library: torch, jax or numpy; the first two use the accelerator if there is one.
        size: Large enough that the product is all there is.
        repeats: Of which the fastest counts.
    """
    import numpy as np

    host = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    if library == "torch":
        import torch

        a, b = torch.from_numpy(host).to("cuda" if torch.cuda.is_available() else "cpu")
        synchronize = torch.cuda.synchronize if a.is_cuda else lambda: None

        def multiply():
            _ = a @ b
            synchronize()

    elif library == "jax":
        import jax

        a, b = jax.device_put(host)
        product = jax.jit(lambda a, b: jax.lax.dot(a, b, precision="highest"))

        def multiply():
            product(a, b).block_until_ready()

    else:
        a, b = host

        def multiply():
            _ = a @ b

    multiply()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def run_bergson(words: list[str]) -> None:
    """bergson's command line. On a CPU in float32 its `astra` writes into a file that it has mapped
    for reading, which ends the process; here it works on a copy."""
    import bergson.hessians.astra as astra
    import numpy as np
    from bergson.__main__ import main

    to_tensor = astra.numpy_to_tensor
    astra.numpy_to_tensor = lambda array: to_tensor(np.array(array))
    sys.argv = ["bergson", *words]
    main()


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "kronfluence":
        model, tokens, out, batch = words
        fit_with_kronfluence(model, tokens, out, int(batch))
    elif task == "scores":
        *texts, batch, at_once = words
        score_with_kronfluence(*texts, int(batch), int(at_once))
    elif task == "bergson":
        run_bergson(words)
    else:
        print(measure_peak(words[0]))
