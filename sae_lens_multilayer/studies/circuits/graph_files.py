"""A folder of attribution graphs, as the viewer of circuit-tracer reads it."""

import json
from pathlib import Path
from typing import Any

from sae_lens_multilayer.files import read_json, write_whole
from sae_lens_multilayer.studies.circuits.graph import save_graph

_LIST_FILE = "graph-metadata.json"
_MADE_OF = "made_of"


class GraphFolder:
    """Graphs, a file each, and `graph-metadata.json`, which lists them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._list = folder, folder / _LIST_FILE

    def _entries(self) -> list[dict[str, Any]]:
        return read_json(self._list)["graphs"] if self._list.exists() else []

    def has(self, slug: str, made_of: str) -> bool:
        """Whether there is a graph of this name, made of what this hash is of."""
        is_listed = any(
            (one["slug"], one[_MADE_OF]) == (slug, made_of) for one in self._entries()
        )
        return is_listed and (self._folder / f"{slug}.json").exists()

    def add(self, graph: dict[str, Any], made_of: str) -> None:
        """Write a graph and list it; one of the same name is replaced."""
        self._folder.mkdir(exist_ok=True)
        metadata = graph["metadata"]
        save_graph(graph, self._folder / f"{metadata['slug']}.json")
        others = [one for one in self._entries() if one["slug"] != metadata["slug"]]
        listed = [*others, {**metadata, _MADE_OF: made_of}]
        write_whole(self._list, json.dumps({"graphs": listed}, indent=1))
