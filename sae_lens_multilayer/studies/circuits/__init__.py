"""Circuits: which latents, at which layers and positions, a task needs."""

from sae_lens_multilayer.studies.circuits.graph import attribution_graph, save_graph
from sae_lens_multilayer.studies.circuits.result import Circuits, jaccard
from sae_lens_multilayer.studies.circuits.run import circuits_study, run_settings
from sae_lens_multilayer.studies.circuits.settings import CircuitSettings
from sae_lens_multilayer.studies.circuits.streams import Gradients, Streams, gradients
from sae_lens_multilayer.studies.circuits.study import circuits
from sae_lens_multilayer.studies.circuits.table import CircuitTable
from sae_lens_multilayer.studies.circuits.tasks import TASKS, Task, make_task

__all__ = [
    "TASKS",
    "CircuitSettings",
    "CircuitTable",
    "Circuits",
    "Gradients",
    "Streams",
    "Task",
    "attribution_graph",
    "circuits",
    "circuits_study",
    "gradients",
    "jaccard",
    "make_task",
    "run_settings",
    "save_graph",
]
