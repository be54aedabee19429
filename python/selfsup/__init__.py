"""Self-supervised vision: a loader of augmented views, losses, and training runs that resume to the last bit.

``Loader``, ``Views``
    augmented views of images, for a training loop of your own
``selfsup.torch``
    losses without the similarity matrix, LARS and momentum encoders for PyTorch (imported separately; needs torch)
``train``, ``resume``, ``Run``
    the engine's own training runs
``embed``, ``knn``, ``linear_probe``, ``knn_accuracy``, ``probe_accuracy``
    features, and what they are worth
``recipes``, ``recipe``
    the settings of published methods

Failures (files, recipes, devices, diverged runs) raise :class:`Error` with a sentence that says what to do. Wrong arguments raise
``TypeError`` and ``ValueError``. A panic of the engine raises :class:`Bug`; please report it.
"""

from selfsup._evaluation import embed, knn, knn_accuracy, linear_probe, probe_accuracy
from selfsup._loader import Batch, Loader, Views
from selfsup._native import VERSION as __version__
from selfsup._native import Bug, Error
from selfsup._recipes import recipe, recipes
from selfsup._runs import Report, Run, resume, train

__all__ = [
    "Batch",
    "Bug",
    "Error",
    "Loader",
    "Report",
    "Run",
    "Views",
    "__version__",
    "embed",
    "knn",
    "knn_accuracy",
    "linear_probe",
    "probe_accuracy",
    "recipe",
    "recipes",
    "resume",
    "train",
]
