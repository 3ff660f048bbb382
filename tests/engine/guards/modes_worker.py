"""The same spiky run under other guards, each in a fork of this process: python -m ... RECIPE OUT.json"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - loaded once, before the forks

from lut_ds.config import load_recipe
from lut_ds.engine.train import pretrain
from lut_ds.errors import RunFault

MODES = {
    "off": ["guard.spike=off"],
    "log": ["guard.spike=log"],
    "skip": ["guard.spike=skip"],
    "too_often": ["guard.spike=rewind", "guard.max_rewinds=0"],
    "too_early": ["guard.spike=rewind", "run.save_every=20"],  # no checkpoint before the spike
    "too_many": ["guard.spike=skip", "guard.spike_sigmas=1e-6", "guard.max_bad_steps=1"],
}


def run(recipe: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    try:
        outcome = pretrain(load_recipe(recipe, [*overrides, f"run.dir={folder}"]), folder.name)
        return outcome.as_dict()
    except RunFault as fault:
        return {"fault": str(fault)}


if __name__ == "__main__":
    place = Path(sys.argv[2]).parent
    for name, overrides in MODES.items():
        child = os.fork()  # DeepSpeed does not start twice in a process
        if not child:
            (place / f"{name}.json").write_text(json.dumps(run(sys.argv[1], place / name, overrides)))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name
    Path(sys.argv[2]).write_text(json.dumps({name: json.loads((place / f"{name}.json").read_text()) for name in MODES}))
