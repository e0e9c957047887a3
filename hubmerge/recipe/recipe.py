"""The recipe: everything a person decides about a merge, checked before anything is fetched."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from hubmerge.errors import RecipeError
from hubmerge.recipe.nodes import Issue
from hubmerge.recipe.refs import ModelRef
from hubmerge.recipe.schema import STRICT, Card, Globs, ManyIssuesError, ModelEntry, Output
from hubmerge.recipe.settings import depth, matches

if TYPE_CHECKING:
    from hubmerge.recipe.parameters import Parameters
    from hubmerge.spec import Algorithm, Settings


class Recipe(BaseModel):
    """A merge, as a person describes it.

    Two recipes are equal if they mean the same, whatever the order of keys and the notation of numbers.
    """

    model_config = STRICT

    method: str = Field(min_length=1)
    """Merge method; ``hubmerge methods`` lists them."""
    base: ModelRef | None = None
    """The model that the others were fine-tuned from."""
    models: Annotated[tuple[ModelEntry, ...], Field(strict=False)]
    """The models to merge; their order is the order of computation."""
    parameters: dict[str, Any] = {}
    """The method's parameters, and settings that hold for all models."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    """Type of the merged tensors; by default each tensor keeps its type in the base."""
    seed: int = Field(0, ge=0, lt=2**64)
    tokenizer: str = "base"
    """Whose tokenizer accompanies the result: ``base``, or a model's name."""
    vocab: Literal["strict", "base", "union"] = "strict"
    """What happens when vocabularies differ in size."""
    heads: Literal["keep", "drop"] = "keep"
    """What happens to tensors that only one model has, such as classifier heads."""
    include: Globs = ("*",)
    """Globs on tensor names: which tensors take part; the others are copied from the base."""
    exclude: Globs = ()
    """Exceptions from ``include``."""
    output: Output = Output()
    card: Card = Card()
    compat: Literal["mergekit"] | None = None
    """Set when the recipe came from a mergekit file: gradients put tensors outside the layers at depth 0, and
    ``tokenizer: union`` is left to the plan, which accepts it if all vocabularies are equal."""

    _parameters: Parameters = PrivateAttr()
    _notes: tuple[str, ...] = PrivateAttr(default=())
    _n_layers: int | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        from hubmerge.recipe.parameters import check_recipe

        issues = self._name_issues()
        parameters, problems = check_recipe(self.method, self.parameters, [m.parameters for m in self.models])
        issues += problems
        if parameters is not None:
            issues += self._method_issues(parameters.method)
        if issues or parameters is None:
            raise ManyIssuesError(issues)
        self._parameters = parameters
        return self

    def _name_issues(self) -> list[Issue]:
        issues: list[Issue] = []
        count = Counter(m.name.lower() for m in self.models)
        seen: set[str] = set()
        for i, model in enumerate(self.models):
            lower = model.name.lower()
            if lower in seen:
                where = f"{count[lower]} models are called {model.name!r}"
                issues.append((("models", i, "name"), f"{where}; give each a name: of its own"))
            seen.add(lower)
        names = [m.name for m in self.models]
        if self.tokenizer not in ("base", *names) and (self.tokenizer, self.compat) != ("union", "mergekit"):
            known = ", ".join(("base", *names))
            issues.append((("tokenizer",), f"{self.tokenizer!r} is not a model of this recipe; known: {known}"))
        if not self.include:
            issues.append((("include",), "no tensor would take part; leave include out, or write ['*']"))
        return issues

    def _method_issues(self, method: Algorithm) -> list[Issue]:
        from hubmerge.spec import Method

        issues: list[Issue] = []
        n = len(self.models)
        if not isinstance(method, Method):
            if self.output.format != "bundle":
                issues.append((("method",), f"{method.name} is a codec of bundles; write output: {{format: bundle}}"))
            if self.card.template is not None:
                issues.append((("card", "template"), "a bundle's card is made anew with every task, by no template"))
            return issues
        if self.output.format == "bundle":
            issues.append((("output", "format"), f"a bundle needs a codec as its method, and {method.name} is none"))
        if n < method.min_models or (method.max_models is not None and n > method.max_models):
            low, high = method.min_models, method.max_models
            wanted = f"at least {low}" if high is None else str(low) if low == high else f"{low} to {high}"
            noun = "model" if (high or low) == 1 else "models"
            issues.append((("models",), f"{method.name} takes {wanted} {noun}, found {n}"))
        return issues

    # --- reading and writing

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe file, hubmerge's or mergekit's.

        Raises:
            RecipeError: With ``file:line:column`` for everything that is wrong.
        """
        from hubmerge.recipe.load import read_file

        return cls.loads(read_file(path), where=str(path))._beside(Path(path).parent)

    def _beside(self, folder: Path) -> Self:
        """The recipe of a file in this folder: its card's template is found from there."""
        if self.card.template is None:
            return self
        place = str(folder / Path(self.card.template).expanduser())
        return self.model_copy(update={"card": self.card.model_copy(update={"template": place})})

    @classmethod
    def loads(cls, text: str, where: str = "recipe.yaml") -> Self:
        """Read a recipe from YAML text; ``where`` is what messages call it.

        Raises:
            RecipeError: As for ``load``.
        """
        from hubmerge.recipe.build import build
        from hubmerge.recipe.load import parse

        return build(cls, parse(text, where), where)

    @classmethod
    def from_data(cls, data: dict[str, Any], where: str = "recipe") -> Self:
        """A recipe from plain data, such as ``normalized()`` returned.

        Raises:
            RecipeError: Without line numbers, as there are none.
        """
        from hubmerge.recipe.build import build
        from hubmerge.recipe.nodes import of_plain

        return build(cls, of_plain(data), where)

    @classmethod
    def from_flags(
        cls, method: str, base: str | None, models: list[str], params: list[str] | None = None, **options: Any
    ) -> Self:
        """A recipe from command-line flags.

        Args:
            method: Name of the method.
            base: ``repo``, ``repo@revision`` or a folder.
            models: ``repo``, ``repo@revision`` or a folder, each with ``:weight`` after it if need be.
            params: ``key=value``, the value in YAML notation.
            options: Further keys of the recipe (``dtype``, ``seed``, ``tokenizer`` …); None means not given.

        Raises:
            RecipeError: Naming the flag.
        """
        from hubmerge.recipe.build import build
        from hubmerge.recipe.flags import WHERE, flags_to_node

        return build(cls, flags_to_node(method, base, models, params or (), options), WHERE)

    def normalized(self) -> dict[str, Any]:
        """Canonical plain data with every default written out: equal for recipes that mean the same."""
        from hubmerge.recipe.write import normalized

        return normalized(self, self._parameters)

    def to_yaml(self) -> str:
        """The recipe as a readable file; loading it gives an equal recipe."""
        from hubmerge.recipe.write import to_yaml

        return to_yaml(self, self._parameters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.normalized() == other.normalized()

    def __hash__(self) -> int:
        return hash(json.dumps(self.normalized(), sort_keys=True))

    # --- what a plan asks

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in order."""
        return tuple(m.name for m in self.models)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a foreign recipe format should know about how it was understood."""
        return self._notes

    @property
    def params(self) -> Any:
        """The method's parameters where no per-tensor setting applies."""
        return self._parameters.params()

    def takes_part(self, name: str) -> bool:
        """Whether a tensor of this name is merged (and not copied from the base)."""
        return matches(self.include, name) and not matches(self.exclude, name)

    def settings_for(self, name: str, layer: int | None, n_layers: int, is_embedding: bool) -> Settings:
        """What holds for one tensor; equal settings are one and the same object.

        Args:
            name: The tensor's name in the base's namespace.
            layer: Index of its layer; None outside the layers.
            n_layers: Number of layers of the model.
            is_embedding: Whether it is an input embedding (which lies before the first layer).

        Raises:
            RecipeError: A mergekit file names the layers it merges, and the models have another number of them.
        """
        if layer is not None and self._n_layers is not None and n_layers != self._n_layers:
            raise RecipeError(
                f"the recipe merges layers 0 to {self._n_layers} (layer_range) of models that have {n_layers} layers",
                hint="hubmerge merges all layers; list the models without slices",
            )
        t = depth(layer, n_layers, is_embedding=is_embedding, outside_at_start=self.compat == "mergekit")
        return self._parameters.settings_for(name, t)
