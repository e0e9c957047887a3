"""Options that several commands share, and the recipe they describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hubmerge.errors import UsageError

if TYPE_CHECKING:
    from hubmerge.api import RunOptions
    from hubmerge.recipe import Recipe
    from hubmerge.signing import Signing

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(f: F) -> F:
        for option in reversed(options):
            f = option(f)
        return f

    return apply


_recipe = click.argument("recipe", required=False, type=click.Path(dir_okay=False))
_base = click.option("--base", help="Base model: repo[@revision] or folder.")
_params = click.option(
    "--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the method; repeat."
)
_seed = click.option("--seed", type=int, help="Seed of methods that draw random numbers.")
_shard_size = click.option("--shard-size", help="Largest size of an output file, e.g. 5GB.")

recipe_options = _stack(
    _recipe,
    click.option("--method", help="Merge method; `hubmerge methods` lists them."),
    _base,
    click.option(
        "--model", "models", multiple=True, help="Model to merge: repo[@revision][:weight] or folder[:weight]; repeat."
    ),
    _params,
    click.option("--dtype", help="dtype of the output: bfloat16, float16, float32 or float64."),
    _seed,
    click.option(
        "--format",
        type=click.Choice(["full", "adapter"]),
        help="Output: a whole checkpoint (default), or a PEFT adapter when all models are adapters.",
    ),
    click.option("--rank", type=click.IntRange(1), help="Largest rank of a merged adapter; default: lossless."),
    _shard_size,
)

bundle_recipe_options = _stack(
    _recipe,
    click.option("--method", help="Codec; `hubmerge methods` lists them."),
    _base,
    click.option(
        "--model", "models", multiple=True,
        help="Model to keep, a task called like its last part: repo[@revision] or folder; repeat.",
    ),
    _params,
    _seed,
    _shard_size,
)  # fmt: skip

output_options = _stack(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only."),
    click.option("-v", "--verbose", count=True, help="Print more; twice for everything."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)

_workers = click.option(
    "--workers", type=click.IntRange(1, 256), help="Threads; default: one per core, more to stream."
)
_max_disk = click.option("--max-disk", help="Disk the run may use beyond its output, e.g. 10GB.", metavar="SIZE")
_fetch = click.option(
    "--fetch",
    type=click.Choice(["auto", "cache", "stream"]),
    default="auto",
    show_default=True,
    help="Hub inputs: use the cache and download into it, or read ranges without storing anything.",
)

run_options = _stack(
    _workers,
    click.option("--device", default="auto", show_default=True, metavar="NAME",
                 help="Where matrices are decomposed: auto (the accelerators there are), cpu, cuda, cuda:1, …"),
    click.option("--max-memory", metavar="SIZE",
                 help="Memory the run may use, e.g. 2GB; with accelerators also by device: cuda:0=20GB,cpu=8GB."),
    _max_disk,
    _fetch,
    output_options,
)  # fmt: skip

reading_options = _stack(_workers, _max_disk, _fetch, output_options)
"""Of commands that read models and have no use for an accelerator."""


resume_option = click.option(
    "--resume/--no-resume", default=True, show_default=True,
    help="Take over the finished files of an earlier run of the same plan, or remove them and start over.",
)  # fmt: skip


FILE = click.Path(path_type=Path, dir_okay=False, exists=True)

sign_options = _stack(
    click.option("--sign", "sign_key", metavar="KEY",
                 help="Sign the result (model.sig) with this private key, a PEM file; or `sigstore`, without a key."),
    click.option("--certificate", type=FILE, help="The key's certificate and those that vouch for it, a PEM file."),
)  # fmt: skip
diagnostics_option = click.option(
    "--diagnostics/--no-diagnostics", default=False, show_default=True,
    help="Measure how the tasks lie to one another; figures and plots go with the result and onto its card.",
)  # fmt: skip
upload_option = click.option(
    "--upload", type=click.Choice(["file", "stream"]), default="file", show_default=True,
    help="How shards are sent: from a file each, or while they are made, which needs no disk but more memory.",
)  # fmt: skip
evaluation_option = click.option(
    "--eval", "evaluations", multiple=True, metavar="[NAME=]FILE",
    help="Results of lm-evaluation-harness or lighteval for the card; NAME: merged, or a parent's; repeat.",
)  # fmt: skip
license_option = click.option(
    "--license", "license_", metavar="ID", help="Licence that the card states; default: what the parents' allow."
)
risk_option = click.option(
    "--accept-license-risk",
    is_flag=True,
    help="Publish although the parents' licences forbid it: you have the right to, and --license says under what.",
)


def signing(key: str | None, certificate: Path | None) -> Signing | None:
    """With what to sign, if it is wanted.

    Raises:
        UsageError: A certificate without a key.
    """
    from hubmerge.signing import Signing

    if key is None and certificate is not None:
        raise UsageError("--certificate goes with a key", hint="give --sign KEY too")
    return Signing(key, certificate) if key is not None else None


def stating(recipe: Recipe, identifier: str | None) -> Recipe:
    """The recipe, with this licence on its card.

    Raises:
        UsageError: It is not a licence's identifier.
    """
    from hubmerge import licenses

    if identifier is None:
        return recipe
    return recipe.model_copy(update={"card": licenses.stating(recipe.card, identifier)})


def load_recipe(recipe: str | None, **flags: Any) -> Recipe:
    """The recipe from a file, or from flags; not both."""
    from hubmerge.recipe import Recipe

    method, base, models, params = (flags.pop(k) for k in ("method", "base", "models", "params"))
    given = [k for k, v in {"method": method, "base": base, "model": models, "param": params, **flags}.items() if v]
    if recipe is not None:
        if given:
            options = ", ".join(f"--{k.replace('_', '-')}" for k in given)
            raise UsageError(
                f"{options} given together with the recipe {recipe}",
                hint="put it into the recipe, or leave the file out",
            )
        return Recipe.load(recipe)
    if not method or not models:
        raise UsageError("no recipe", hint="name a recipe file, or give --method, --base and --model")
    output = {key: flags.pop(key, None) for key in ("format", "rank", "shard_size")}
    output = {key: value for key, value in output.items() if value is not None}
    return Recipe.from_flags(method, base, list(models), list(params), output=output or None, **flags)


def load_bundle_recipe(recipe: str | None, **flags: Any) -> Recipe:
    """The recipe of a bundle from a file, or from flags; not both."""
    return load_recipe(recipe, **flags, **({"format": "bundle"} if recipe is None else {}))


def run_settings(
    workers: int | None, max_memory: str | None, max_disk: str | None, fetch: str, device: str, upload: str = "file"
) -> RunOptions:
    """The options of a run.

    Raises:
        UsageError: A size that is none, or a device that is not here.
    """
    from hubmerge.api import RunOptions
    from hubmerge.devices import CPU, chosen, parse_memory
    from hubmerge.recipe.schema import parse_size

    memory = _parsed(parse_memory, "--max-memory", max_memory) or {}
    host = memory.pop(CPU, None)
    chosen(device, memory)
    return RunOptions(
        workers=workers,
        fetch=fetch,  # type: ignore[arg-type]
        max_memory_bytes=host,
        max_disk_bytes=_parsed(parse_size, "--max-disk", max_disk),
        device=device,
        device_memory_bytes=memory,
        upload=upload,  # type: ignore[arg-type]
    )


def reading_settings(workers: int | None, max_disk: str | None, fetch: str) -> dict[str, Any]:
    """The options of a run without accelerators, by the names that they have in Python.

    Raises:
        UsageError: A size that is none.
    """
    from hubmerge.recipe.schema import parse_size

    return {"workers": workers, "fetch": fetch, "max_disk_bytes": _parsed(parse_size, "--max-disk", max_disk)}


def _parsed(parse: Callable[[str], T], flag: str, text: str | None) -> T | None:
    try:
        return parse(text) if text is not None else None
    except ValueError as e:
        raise UsageError(f"{flag}: {e}") from e
