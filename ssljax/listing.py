"""What can be run: methods, their config variants and papers."""

from pathlib import Path

from rich.table import Table

from ssljax.config import TYPES, ConfigError, load_variants


def config_files(folder: str | Path | None = None) -> list[Path]:
    """The config files of a folder; by default the `configs/` beside the package or in the current folder."""
    places = [Path(folder)] if folder else [Path("configs"), Path(__file__).parent.parent / "configs"]
    for place in places:
        if files := sorted(place.glob("*.py")):
            return files
    raise ConfigError(f"no config files in {', '.join(map(str, places))}; give --configs FOLDER")


COLUMNS = ("method", "paper", "config", "variants")


def methods(folder: str | Path | None = None) -> list[tuple[str, ...]]:
    """A row of `COLUMNS` per config file."""
    rows = []
    for file in config_files(folder):
        variants = load_variants(str(file))
        method = next(iter(variants.values()))().method.type
        method = TYPES[method] if isinstance(method, str) else method
        where = f"{file.parent.name}/{file.name}"
        rows.append((method.__name__, getattr(method, "paper", ""), where, ", ".join(variants)))
    return rows


def methods_table(folder: str | Path | None = None) -> Table:
    """`methods` for the terminal."""
    result = Table(*COLUMNS)
    for row in methods(folder):
        result.add_row(*row)
    return result


def methods_markdown(folder: str | Path | None = None) -> str:
    """`methods` for the documentation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *methods(folder)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
