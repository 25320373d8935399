"""The settings of the study of circuits, and its points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.studies.circuits.curves import (
    COUNTS,
    SHARES,
    check_counts,
    check_shares,
)
from sae_lens_multilayer.studies.circuits.streams import Ablation, Method, check_choice
from sae_lens_multilayer.studies.circuits.study import Ranking
from sae_lens_multilayer.studies.circuits.tasks import TASKS


@dataclass(frozen=True)
class CircuitSettings:
    """What the study runs; a YAML file holds the same names."""

    saes: Mapping[str, str | Sequence[str]]
    """Folders of saved SAEs by label: the label is what is compared, such as the map
    before the SAE; its SAEs differ in their seed."""
    tasks: Sequence[str] = tuple(TASKS)
    ablations: Sequence[str] = ("mean", "resample")
    method: str = "integrated_gradients"
    n_steps: int = 10
    n_prompts: int = 32
    seeds: Sequence[int] = (0,)
    """Of the prompts; several show how far circuits depend on the prompts."""
    layers: Sequence[int | str] | None = None
    """Block numbers or hook names; None: all hooks of the first SAE."""
    shares: Sequence[float] = SHARES
    counts: Sequence[int] = COUNTS
    """Numbers of nodes at which labels are compared."""
    ranking: str = "absolute"
    """Order of the nodes: by |effect|, or "signed"; see `circuits`."""
    random_control: bool = True
    jaccard_share: float = 0.05
    """Kept share of the circuits whose nodes are compared between seeds."""
    match_fvu: bool = True
    """Use each SAE with the k that gives it the raw-space FVU of the first one."""
    dataset_path: str | None = None
    """Held-out text for the FVU; None: the dataset of training."""
    n_tokens: int = 1_024
    """Tokens of this text, in whole prompts."""
    context_size: int | None = None
    """Tokens in a prompt of this text; None: as in training."""
    n_graph_nodes: int = 60
    """Nodes of the exported graphs, of the first SAE of each label; 0: no graphs."""
    n_bootstrap: int = 1000
    model_name: str | None = None
    """Name or folder of the model; None: as in training."""
    model_class_name: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch_size_prompts: int = 16
    max_prompts: int = 256
    """Most prompts in one call of a block."""
    device: str = "cpu"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "CircuitSettings":
        """The settings of a file, which may omit all but `saes`."""
        check_known([*settings], [one.name for one in fields(cls)])
        values: dict[str, Any] = {"saes": {}, **settings}
        return cls(**values)

    def __post_init__(self) -> None:
        saes: Any = self.saes
        if not isinstance(saes, Mapping) or not saes or not all(saes.values()):
            raise ValueError(
                "`saes` must name at least one label with the folder of an SAE or a "
                f"list of folders; got {saes!r}."
            )
        for name in ("tasks", "ablations", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must not be empty.")
        for label, folders in self.folders.items():
            if len({*folders}) < len(folders):
                raise ValueError(f"The SAEs of {label!r} must differ; got {folders}.")
        for task in self.tasks:
            check_choice("tasks", task, [*TASKS])
        for ablation in self.ablations:
            check_choice("ablations", ablation, get_args(Ablation))
        check_choice("method", self.method, get_args(Method))
        if self.n_prompts < 2:
            raise ValueError(f"`n_prompts` must be at least 2; got {self.n_prompts}.")
        if self.n_steps < 1:
            raise ValueError(f"`n_steps` must be at least 1; got {self.n_steps}.")
        if not 0 < self.jaccard_share <= 1:
            raise ValueError(
                f"`jaccard_share` must be in (0, 1]; got {self.jaccard_share}."
            )
        check_choice("ranking", self.ranking, get_args(Ranking))
        check_shares(self.shares)
        check_counts(self.counts)

    @property
    def reference(self) -> str:
        """The folder of the first SAE, whose FVU and hooks are those of the study."""
        return next(iter(self.folders.values()))[0]

    @property
    def folders(self) -> dict[str, list[str]]:
        """The folders of each label."""
        return {
            label: [one] if isinstance(one, str) else list(one)
            for label, one in self.saes.items()
        }


@dataclass(frozen=True)
class CircuitPoint:
    """One SAE, task, seed of the prompts and ablation."""

    label: str
    index: int
    """Of the SAE among those of its label."""
    sae: str
    task: str
    seed: int
    ablation: str

    @property
    def name(self) -> str:
        return f"{self.label}-{self.index}_{self.task}-{self.seed}_{self.ablation}"

    @property
    def keys(self) -> dict[str, Any]:
        """Columns of a table that say which one it is."""
        names = "label", "index", "task", "seed", "ablation"
        return {name: getattr(self, name) for name in names}
