"""JSON Schemas of the files that people write, for editors: `python -m isthmus.experiments.schemas docs/schemas`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from isthmus.workloads.documents import write_text
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.profile import Profile
from isthmus.workloads.testbed import TestbedSpec

DOCUMENTS: dict[str, type[BaseModel]] = {"experiment": ExperimentSpec, "testbed": TestbedSpec, "profile": Profile}


def schemas() -> dict[str, str]:
    """File name: text."""
    return {
        f"{name}.schema.json": json.dumps(kind.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
        for name, kind in DOCUMENTS.items()
    }


if __name__ == "__main__":
    for file, text in schemas().items():
        write_text(Path(sys.argv[1]) / file, text)
