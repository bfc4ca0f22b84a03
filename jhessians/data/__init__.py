"""From text on disk or on the Hub to tokens, labels and batches; all of it on the host.

`sources.py` reads a data set into documents, `batching.py` cuts them into batches of a few shapes.
"""

from jhessians.data.batching import Batch, BatchPlan, iterate_batches, plan_batches
from jhessians.data.documents import Documents
from jhessians.data.sources import DataOptions, load_documents

__all__ = [
    "Batch",
    "BatchPlan",
    "DataOptions",
    "Documents",
    "iterate_batches",
    "load_documents",
    "plan_batches",
]
