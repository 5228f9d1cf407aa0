"""Arrow: the tables that move and the rows that are stored.

Heavy columns are fixed-shape tensors in Arrow IPC files, two an order: pictures, which rewards read, and latents with
what else training needs of the path, which the learner reads. Scalars are Parquet rows, one file a batch, because query
engines stop at arrays of 100,000 elements, and one trajectory of Stable Diffusion 1.5 has 835,584.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.orders import Order
from common.errors import RunStopped

TENSORS = {  # axes and dtypes of each column
    "image": (4, ("uint8",)),
    "latents": (5, ("float32", "float16")),
    "timesteps": (2, ("int32", "float32")),
    "log_probs": (2, ("float32",)),
}
PROMOTE = "permissive"  # where tables come below one another: whole numbers and others, or none at all, fit


def rollout_table(order: Order, images: np.ndarray, path: Mapping[str, np.ndarray]) -> pa.Table:
    """The table of an order's n trajectories, without copying C-contiguous arrays.

    images [n, H, W, 3] uint8. path: what training needs of the trajectories, by column: latents [n, T+1, C, H, W] with
    timesteps [n, T] and log_probs [n, T]; or latents [n, 1, C, H, W] alone; nothing for an order of an evaluation.
    Raises ValueError when shapes or dtypes are others.
    """
    _check_tensors(order, {**path, "image": images})
    columns: dict[str, Any] = {"trajectory_id": pa.array(order.trajectory_ids, pa.int64())}
    for name, array in {**path, "image": images}.items():
        plain = np.ascontiguousarray(array).ravel().reshape(array.shape)  # a view, whose strides Arrow takes at n = 1
        columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(plain)
    return pa.table(columns)


def _check_tensors(order: Order, tensors: Mapping[str, np.ndarray]) -> None:
    def check(name: str, fits: bool, wanted: str) -> None:
        if not fits:
            is_now = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            raise ValueError(f"{name} of order {order.order_id} is {is_now}, not {wanted}.")

    for name, array in tensors.items():
        ndim, dtypes = TENSORS[name]
        check(name, array.ndim == ndim and str(array.dtype) in dtypes, f"{' or '.join(dtypes)} of {ndim} axes")
    n, steps = len(order.seeds), tensors["log_probs"].shape[1] if "log_probs" in tensors else 0
    for name, start in (("latents", (n, steps + 1)), ("timesteps", (n, steps)), ("log_probs", (n, steps))):
        if name in tensors:
            check(name, tensors[name].shape[:2] == start, f"{list(start)} at first")
    check("image", tensors["image"].shape[0] == n and tensors["image"].shape[3] == 3, f"[{n}, H, W, 3]")


def tensors_of(table: pa.Table) -> dict[str, np.ndarray]:
    """The tensor columns as arrays [rows, ...]. A column in one piece is viewed and read-only; several are copied."""
    return {name: _array(table[name]) for name in tensors_in(table)}


def tensors_in(table: pa.Table) -> list[str]:
    """Names of the tensor columns."""
    return [field.name for field in table.schema if isinstance(field.type, pa.FixedShapeTensorType)]


def _array(column: pa.ChunkedArray) -> np.ndarray:
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, *column.type.shape), column.type.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def check_rollout(order: Order, table: pa.Table) -> None:
    """Raise ValueError unless the table is one that `rollout_table` makes of this order."""
    if sorted(table.column_names) != sorted(["trajectory_id", *tensors_in(table)]):
        raise ValueError(f"The table of order {order.order_id} has other columns than trajectory_id and tensors.")
    if "image" not in table.column_names or (order.batch is not None and table.num_columns < 3):
        raise ValueError(f"The table of order {order.order_id} lacks its pictures, or what training needs of the path.")
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


def stack(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables below one another; a column that one lacks is null there."""
    return pa.concat_tables(tables, promote_options=PROMOTE)


class ScoreTypes:
    """What each reward answered with so far: its columns have the same types from order to order, or no batch could be
    put together of them."""

    def __init__(self) -> None:
        self._known: dict[str, pa.Schema] = {}

    def check(self, reward: str, schema: pa.Schema) -> None:
        """Remember what a reward answers with. Raises RunStopped if it does not fit to what it answered before."""
        if not self.fit(reward, schema):
            known = self._known[reward]
            name = next(n for n in schema.names if n in known.names and not _fit(known, pa.schema([schema.field(n)])))
            raise RunStopped(
                f"Reward {reward} put {schema.field(name).type} into its column {name!r}, where it put "
                f"{known.field(name).type} before; have it answer in one type, and start the run again."
            )
        self._known[reward] = pa.unify_schemas([self._known.get(reward, schema), schema], promote_options=PROMOTE)

    def fit(self, reward: str, schema: pa.Schema) -> bool:
        """Whether these columns and those before can be put below one another."""
        return reward not in self._known or _fit(self._known[reward], schema)


def _fit(one: pa.Schema, other: pa.Schema) -> bool:
    try:
        pa.unify_schemas([one, other], promote_options=PROMOTE)
    except pa.ArrowException:
        return False
    return True
