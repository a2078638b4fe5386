"""The recipe that a model's folder asks for, beside the settings of its authors.

save_recipe("my-model", recipes.llada(block_size=64))
recipe = load_recipe("my-model")
"""

import json
import os
from pathlib import Path

from dllm_jax import files, recipes, sources
from dllm_jax.recipes import Recipe

KEY = "dllm_jax_recipe"
_FILE = "generation_config.json"


def save_recipe(folder: str | os.PathLike[str], recipe: Recipe) -> None:
    """Writes a recipe into the folder's generation_config.json; what else is there stays.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the recipe has a part of one's own, or the file is damaged.
    """
    path = Path(sources.absolute(folder))
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; a recipe is saved beside a model's files")
    file = path / _FILE
    settings = sources.read_json(sources.absolute(file)) if file.exists() else {}
    settings[KEY] = recipes.to_dict(recipe)
    files.write(file, json.dumps(settings, indent=2) + "\n")


def load_recipe(folder: str | os.PathLike[str]) -> Recipe | None:
    """The recipe in the folder's generation_config.json; None where none is.

    Raises:
      ValueError: the file is damaged, or its recipe is unknown.
    """
    file = sources.absolute(folder) / _FILE
    if not file.exists():
        return None
    data = sources.read_json(file).get(KEY)
    if data is None:
        return None
    try:
        return recipes.from_dict(data)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {KEY} is no recipe ({error})") from error
