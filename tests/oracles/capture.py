"""Layer inputs and output gradients of a Hugging Face model in float64, one document at a time.

No padding, no batching and plain hooks, so that nothing here can share a mistake with a traversal
that packs documents: a: [position, in], g: [position, out].
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

Document = tuple[np.ndarray, np.ndarray]


def load(model_dir: str | Path, *, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The checkpoint's causal language model in `dtype`, in evaluation mode."""
    # Experts in a loop: grouped products know no float64.
    return AutoModelForCausalLM.from_pretrained(
        Path(model_dir), dtype=dtype, experts_implementation="eager"
    ).eval()


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Linear modules below `base_model` (so without the head), by name relative to it."""
    return {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }


def has_bias(model_dir: str | Path) -> dict[str, bool]:
    """Whether each linear of `linears` owns a bias, by its name."""
    return {name: module.bias is not None for name, module in linears(load(model_dir)).items()}


def document_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, loss_reduction: str = "sum"
) -> torch.Tensor:
    """Cross-entropy summed over the labelled next-token positions of one document.

    Args:
        logits: [position, vocabulary].
        labels: [position], -100 where no loss is wanted; label t is predicted from position t-1.
        loss_reduction: `sum`, or `mean`, which divides by the square root of the number of
            labelled positions: a curvature is quadratic in the gradient.
    """
    targets = labels[1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:-1], targets, ignore_index=-100, reduction="sum"
    )
    if loss_reduction == "mean":
        # A Python number: torch would take the root of an integer tensor in float32.
        return loss / int((targets != -100).sum()) ** 0.5
    if loss_reduction != "sum":
        raise ValueError(f"loss_reduction is {loss_reduction!r}; expected 'sum' or 'mean'")
    return loss


def captured(
    model_dir: str | Path,
    token_lists: Sequence[Sequence[int]],
    label_lists: Sequence[Sequence[int]] | None = None,
    *,
    loss_reduction: str = "sum",
) -> dict[str, list[Document]]:
    """Every linear's input and the loss gradient at its output, per document, in float64.

    Args:
        model_dir: Checkpoint folder.
        token_lists: Token ids of each document, at least one each.
        label_lists: Labels of each document, -100 where there is no loss; the tokens themselves
            where omitted.
        loss_reduction: See `document_loss`.

    Returns:
        Module name -> one (a [position, in], g [position, out]) per document, in the order given,
        all positions kept. A document with no labelled next token has g = 0.

    Raises:
        RuntimeError: A linear ran other than once per document.
    """
    model = load(model_dir)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # Gradients have to reach every linear's output; the embedding is before them all.
    model.get_input_embeddings().weight.requires_grad_(True)

    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str):
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor):
            if name in outputs:
                raise RuntimeError(f"{name} ran twice in one forward pass")
            inputs[name], outputs[name] = args[0], out

        return hook

    modules = linears(model)
    handles = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    documents: dict[str, list[Document]] = {name: [] for name in modules}
    try:
        for tokens, labels in zip(token_lists, label_lists or token_lists, strict=True):
            inputs.clear()
            outputs.clear()
            logits = model(torch.tensor([list(tokens)])).logits[0]
            if set(outputs) != set(modules):
                raise RuntimeError(f"never ran: {sorted(set(modules) - set(outputs))}")
            targets = torch.tensor(list(labels))
            if (targets[1:] != -100).any():
                loss = document_loss(logits, targets, loss_reduction=loss_reduction)
                gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
            else:
                gradients = tuple(torch.zeros_like(outputs[name]) for name in modules)
            for name, gradient in zip(modules, gradients, strict=True):
                # Some models drop the axis of their one document before an MLP.
                pair = (inputs[name].detach(), gradient)
                a, g = (x.reshape(-1, x.shape[-1]).numpy() for x in pair)
                documents[name].append((a, g))
    finally:
        for handle in handles:
            handle.remove()
    return documents
