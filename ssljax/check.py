"""Is what a run has saved still what it saved? `ssljax check <workdir>`: reads files, needs no accelerator."""

from collections.abc import Iterator

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from rich.table import Table

from ssljax.bounded import read_json
from ssljax.checkpoint import CheckpointError, CheckpointStore
from ssljax.digest import read_manifest
from ssljax.metrics import read_records


def check(workdir: epath.PathLike, arrays: bool = False) -> tuple[Table, int]:
    """A table with a row for every checkpoint and file of a run, and how many of them are damaged.

    Args:
      arrays: also load every checkpoint into memory and verify the digests of its arrays.
    """
    workdir, store = epath.Path(workdir), CheckpointStore(workdir)
    if not workdir.is_dir():
        raise CheckpointError(f"there is no folder {workdir}; give the --workdir of a run")
    table, damaged = Table("what", "arrays", "files", "MB", "verdict", title=str(workdir), title_justify="left"), 0
    for column in table.columns[1:4]:
        column.justify = "right"
    for step in store.steps():
        try:
            table.add_row(f"step {step}", *_checkpoint(store, step, arrays))
        except CheckpointError as error:
            table.add_row(f"step {step}", "", "", "", str(error))
            damaged += 1
    for path in store.unfinished():
        table.add_row(path.name, "", "", "", "a save under way, or broken off: the next training run removes it")
    for path in sorted(store.damaged_folder.iterdir()) if store.damaged_folder.exists() else ():
        table.add_row(f"{path.parent.name}/{path.name}", "", "", "", "damaged, set aside when the run resumed")
    for name, problem in _files(workdir):
        table.add_row(name, "", "", "", problem or "good")
        damaged += bool(problem)
    return table, damaged


def _checkpoint(store: CheckpointStore, step: int, arrays: bool) -> tuple[str, str, str, str]:
    """(arrays, files, MB, verdict) of a good checkpoint; raises `CheckpointError` for another."""
    record = store.verify(step)
    folder = store.folder / str(step)
    if arrays:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        saved = ocp.metadata(folder, "state").metadata
        store.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved), step)
    count, manifest = str(len(record.arrays)), read_manifest(folder)
    if manifest is None:
        read = "its arrays are good" if arrays else "its arrays are verified when they are loaded, or by --arrays"
        return count, "", "", f"no digests of its files: the run ended while they were written. {read.capitalize()}"
    size = sum(size for size, _ in manifest.values())
    return count, str(len(manifest)), f"{size / 1e6:,.1f}", "good"


def _files(workdir: epath.Path) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) of the other files that a run reads."""
    for name in ("config.json", "metrics.jsonl"):
        try:
            if not (workdir / name).exists():
                yield name, "missing"
            elif name == "config.json":
                read_json(workdir / name)
                yield name, ""
            else:
                read_records(workdir)
                yield name, ""
        except (ValueError, OSError) as error:
            yield name, f"cannot be read: {error}"
