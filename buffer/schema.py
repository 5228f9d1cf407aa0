"""Arrow: the tables that move and the rows that are stored.

Heavy columns (latents, pictures) are fixed-shape tensors in Arrow IPC files, one an order; scalars are Parquet rows,
one file a batch. They are apart because query engines stop at arrays of 100,000 elements, and one trajectory of Stable
Diffusion 1.5 has 835,584.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.combination import Combination
from buffer.orders import Order
from buffer.state import Work

TENSORS = ("latents", "timesteps", "log_probs", "image")
TIME = pa.timestamp("us", tz="UTC")


def rollout_table(
    order: Order,
    latents: np.ndarray,
    timesteps: np.ndarray | None,
    log_probs: np.ndarray | None,
    images: np.ndarray,
) -> pa.Table:
    """The table of an order's n trajectories of T steps, without copying C-contiguous arrays.

    latents [n, T+1, C, H, W] float32 or float16; timesteps [n, T] int32 or float32; log_probs [n, T] float32; images
    [n, H, W, 3] uint8. Of an objective on clean pictures latents [n, 1, C, H, W], without the two others. Raises
    ValueError when shapes or dtypes are others.
    """
    n, steps = (len(latents), 0) if log_probs is None else log_probs.shape
    wanted = {
        "latents": (latents, (n, steps + 1, *latents.shape[2:]), 5, ("float32", "float16")),
        "timesteps": (timesteps, (n, steps), 2, ("int32", "float32")),
        "log_probs": (log_probs, (n, steps), 2, ("float32",)),
        "image": (images, (n, *images.shape[1:3], 3), 4, ("uint8",)),
    }
    columns: dict[str, Any] = {"trajectory_id": pa.array(order.trajectory_ids, pa.int64())}
    for name, (array, shape, ndim, dtypes) in wanted.items():
        if array is None:
            continue
        if array.shape != shape or array.ndim != ndim or str(array.dtype) not in dtypes or n != len(order.seeds):
            raise ValueError(
                f"{name} of order {order.order_id} is {array.dtype} {list(array.shape)}; it should be "
                f"{' or '.join(dtypes)} {[len(order.seeds), *shape[1:]]}."
            )
        plain = np.ascontiguousarray(array).ravel().reshape(shape)  # a view, with strides that Arrow takes at n = 1
        columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(plain)
    return pa.table(columns)


def tensors_of(table: pa.Table) -> dict[str, np.ndarray]:
    """The tensor columns as arrays [rows, ...]. A column in one piece is viewed and read-only; several are copied."""
    return {name: _array(table[name]) for name in tensors_in(table)}


def tensors_in(table: pa.Table) -> list[str]:
    """Names of the tensor columns that it has."""
    return [name for name in TENSORS if name in table.column_names]


def _array(column: pa.ChunkedArray) -> np.ndarray:
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, *column.type.shape), column.type.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def check_rollout(order: Order, table: pa.Table) -> None:
    """Raise ValueError unless the table is one that `rollout_table` makes of this order."""
    missing = {"trajectory_id", "latents", "image"} - set(table.column_names)
    if missing:
        raise ValueError(f"The table of order {order.order_id} lacks the columns {sorted(missing)}.")
    if tuple(table["trajectory_id"].to_pylist()) != order.trajectory_ids:
        raise ValueError(f"The table of order {order.order_id} has other trajectories than the order.")


def check_scores(order: Order, table: pa.Table, skip: Sequence[int]) -> None:
    """Raise ValueError unless every picture that is not set aside has one finite float32 "score"."""
    if not {"trajectory_id", "score"} <= set(table.column_names) or table.schema.field("score").type != pa.float32():
        raise ValueError(f"Scores of order {order.order_id} need the columns trajectory_id and score (float32).")
    ids = table["trajectory_id"].to_pylist()
    missing = set(order.trajectory_ids) - set(skip) - set(ids)
    if missing or len(set(ids)) != len(ids) or not set(ids) <= set(order.trajectory_ids):
        raise ValueError(f"Scores of order {order.order_id} are not one for each picture; missing: {sorted(missing)}.")
    if not np.isfinite(table["score"].to_numpy()).all():
        raise ValueError(f"Scores of order {order.order_id} are not all finite; a picture without one has failed.")


def scalar_rows(order: Order, work: Work, scores: Mapping[str, pa.Table], combination: Combination) -> pa.Table:
    """Every row of an order, set aside or not, as it is stored in Parquet (docs/buffer.md has the columns)."""
    rows = len(order.trajectory_ids)
    aside = dict(work.set_aside)
    version, digest = work.version or (None, None)
    age = in_flight = None
    if order.batch is not None and version is not None:
        age = order.batch - version
        in_flight = work.newest - version if work.scores else None
    columns: dict[str, Any] = {
        "trajectory_id": pa.array(order.trajectory_ids, pa.int64()),
        "order_id": pa.array([order.order_id] * rows, pa.string()),
        "batch": pa.array([order.batch] * rows, pa.int32()),
        "prompt": pa.array(order.prompts, pa.string()),
        "prompt_id": pa.array(order.prompt_ids, pa.int32()),
        "seed": pa.array(order.seeds, pa.int64()),
        "policy_version": pa.array([version] * rows, pa.int32()),
        "policy_digest": pa.array([digest] * rows, pa.string()),
        "age": pa.array([age] * rows, pa.int32()),
        "age_in_flight": pa.array([in_flight] * rows, pa.int32()),
    }
    values: dict[str, np.ndarray] = {}
    for reward in combination.weights:
        found = _aligned(columns["trajectory_id"], scores.get(reward))
        columns[reward] = found.pop("score", pa.nulls(rows, pa.float32()))
        columns.update({f"{reward}.{name}": column for name, column in found.items()})
        values[reward] = columns[reward].to_numpy(zero_copy_only=False)
    total = combination(values)
    left_out = np.array([trajectory_id in aside for trajectory_id in order.trajectory_ids])
    columns["reward"] = pa.array(total.astype(np.float32), mask=left_out | np.isnan(total))
    columns["set_aside"] = pa.array([aside.get(trajectory_id) for trajectory_id in order.trajectory_ids], pa.string())
    for name, time in (("claimed", work.claimed), ("rolled_out", work.rolled_out), ("scored", work.scored)):
        columns[name] = times(time, rows)
    return pa.table(columns)


def times(seconds: float, rows: int) -> pa.Array:
    """A column of one moment; nulls for 0, which stands for never."""
    return pa.array([int(seconds * 1e6) if seconds else None] * rows, TIME)


def _aligned(ids: pa.Array, scores: pa.Table | None) -> dict[str, pa.Array]:
    """A reward's columns in the order of `ids`, null where it has no row."""
    if scores is None:
        return {}
    places = pc.index_in(ids, value_set=scores["trajectory_id"].combine_chunks())
    found = scores.drop_columns(["trajectory_id"]).combine_chunks().take(places)
    return {name: found[name].combine_chunks() for name in found.column_names}


def with_tensors(scalars: pa.Table, tensors: pa.Table) -> pa.Table:
    """Scalars and tensors of one order side by side, without the rows that are set aside; nothing heavy is copied."""
    for name in tensors_in(tensors):
        scalars = scalars.append_column(name, tensors[name])
    live = scalars["set_aside"].is_null().to_numpy()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], live.astype(np.int8), [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    pieces = [scalars.slice(start, stop - start) for start, stop in runs]
    return pa.concat_tables(pieces) if pieces else scalars.slice(0, 0)


def stack(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables below one another; a column that one lacks is null there."""
    return pa.concat_tables(tables, promote_options="permissive")
