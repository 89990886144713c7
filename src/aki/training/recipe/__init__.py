"""A recipe: typed dataclasses read from YAML, everything that decides a training run."""

from aki.training.recipe.data import DataRecipe, ShardsRecipe, SourceRecipe
from aki.training.recipe.errors import RecipeError, known
from aki.training.recipe.model import (
    KINDS_OF_ADAPTERS,
    AdapterRecipe,
    BackbonesRecipe,
    ModelRecipe,
    QuantizationRecipe,
)
from aki.training.recipe.reading import beyond_defaults, build, load_recipe
from aki.training.recipe.run import STAGES, Recipe
from aki.training.recipe.stage import PARTS, PretrainRecipe, StageRecipe

__all__ = [
    "KINDS_OF_ADAPTERS",
    "PARTS",
    "STAGES",
    "AdapterRecipe",
    "BackbonesRecipe",
    "DataRecipe",
    "ModelRecipe",
    "PretrainRecipe",
    "QuantizationRecipe",
    "Recipe",
    "RecipeError",
    "ShardsRecipe",
    "SourceRecipe",
    "StageRecipe",
    "beyond_defaults",
    "build",
    "known",
    "load_recipe",
]
