"""What the studies of a saved SAE share: settings, folder, inputs and results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sae_lens import SAE
from sae_lens.config import HfDataset

from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.published.saved_sae import (
    check_model,
    load_model,
    load_sae,
)
from sae_lens_multilayer.record import Record, as_lines
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Prompts, Text

T = TypeVar("T", bound=Result)
T_SETTINGS = TypeVar("T_SETTINGS", bound="SavedSAESettings")


@dataclass(frozen=True)
class SavedSAESettings:
    """The SAE, the model and the text; a YAML file holds the same names."""

    kind: ClassVar[str]
    """Of the record in the study's folder."""
    without_effect: ClassVar[tuple[str, ...]] = ("batch_size_prompts", "device")
    """Settings on which no result depends."""
    sae: str
    """Folder of a saved SAE or of published files."""
    dataset_path: str
    """Held-out text: a name on the Hugging Face hub, or a file or folder."""
    n_tokens: int = 4_096
    """Tokens of text, in whole prompts."""
    context_size: int | None = None
    """Tokens in a prompt; None: as in training."""
    exclude_positions: Sequence[int] = (0,)
    """Positions in a prompt that are excluded."""
    model_name: str | None = None
    """Name or folder of the model; None: as in training."""
    model_class_name: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Arguments for loading the model, besides those in the SAE's metadata."""
    batch_size_prompts: int = 8
    device: str = "cpu"

    @classmethod
    def from_settings(cls: type[T_SETTINGS], settings: dict[Any, Any]) -> T_SETTINGS:
        """The settings of a file, which may omit all but the SAE and the text."""
        # YAML reads the name `null` without quotes as None.
        settings = {"null" if n is None else n: v for n, v in settings.items()}
        check_known(settings, [one.name for one in fields(cls)])
        missing = [name for name in ("sae", "dataset_path") if not settings.get(name)]
        if missing:
            raise ValueError(
                f"The study needs an SAE and its text; {missing} is missing."
            )
        return cls(**settings)

    def check_folder(self, folder: Path) -> None:
        """Make a study's folder; ValueError if it has a study with other settings."""
        values = asdict(self).items()
        record = Record(
            self.kind, {n: v for n, v in values if n not in self.without_effect}
        )
        if not folder.exists():
            folder.mkdir(parents=True)
            record.write(folder)
        elif differences := Record.read(folder, self.kind).differences(record):
            raise ValueError(
                f"{folder} holds a study with other settings:{as_lines(differences)}"
            )

    def inputs(
        self, model: Any = None, dataset: HfDataset | None = None
    ) -> tuple[SAE[Any], Any, Prompts]:
        """The SAE, the model (or that given) and the prompts."""
        sae = load_sae(self.sae, None, self.device)
        metadata = sae.cfg.metadata
        text = Text.from_settings(
            metadata, dataset_path=self.dataset_path, context_size=self.context_size
        )
        if model is None:
            model = load_model(
                metadata,
                hook_names_of(sae),
                self.device,
                model_name=self.model_name,
                model_class_name=self.model_class_name,
                model_kwargs=self.model_kwargs,
            )
        prompts = text.prompts(model, self.n_tokens, dataset)
        check_model(sae, model, prompts)
        return sae, model, prompts


def saved_or_computed(path: Path, kind: type[T], compute: Callable[[], T]) -> T:
    """Read a result, or compute and save it with its figure."""
    if path.exists():
        return kind.load(path)
    result = compute()
    path.parent.mkdir(exist_ok=True)
    save_figure(draw(result), path.with_suffix(".png"))
    result.save(path)
    return result
