"""What the rows of an evaluation say, by name: a value for each picture, or for each prompt.

reward               what is trained on
<reward>             a single reward, trained on or not
<reward>.<column>    numbers and truth values that a reward stores beside its score
diversity            of each prompt with two pictures or more: how far apart they are
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DIVERSITY, EMBEDDING = "diversity", ".embedding"  # of a column of vectors, such as clip_score's

# Columns of an evaluation's rows that are no rewards (buffer/schema.py); reward columns are the other float ones.
NOT_REWARDS = {"reward", "advantage", "prompt_id", "seed"}


def reward_names(rows: pa.Table) -> list[str]:
    """The single rewards of an evaluation's rows, without their sum and without further columns such as "vlm.score"."""
    return [
        field.name
        for field in rows.schema
        if pa.types.is_floating(field.type) and field.name not in NOT_REWARDS and "." not in field.name
    ]


def pairs_of(rows: pa.Table) -> list[tuple[str, int]]:
    """Prompt and seed of each row."""
    return list(zip(rows["prompt"].to_pylist(), rows["seed"].to_pylist(), strict=True))


def kept(rows: pa.Table) -> pa.Table:
    """Without the pictures that were set aside, which may have some rewards and not others."""
    return rows.filter(pc.is_null(rows["set_aside"])) if "set_aside" in rows.column_names else rows


def measures(rows: pa.Table) -> dict[str, np.ndarray]:
    """float64 [n] each, in the order of rows, without pictures that have none or one that is not finite; a measure
    without any value is left out."""
    rows = kept(rows)
    names = reward_names(rows)
    further = [
        field.name
        for field in rows.schema
        if "." in field.name
        and field.name.split(".")[0] in names
        and (pa.types.is_floating(field.type) or pa.types.is_boolean(field.type))
    ]
    values = {name: _finite(rows[name]) for name in ("reward", *names, *further)}
    of_vectors = (field.name for field in rows.schema if field.name.endswith(EMBEDDING) and _is_vector(field.type))
    embedded = next(of_vectors, None)
    if embedded is not None:
        values[DIVERSITY] = diversity(rows["prompt"].to_pylist(), rows[embedded].to_pylist())
    return {name: each for name, each in values.items() if len(each)}


def _finite(column: pa.ChunkedArray) -> np.ndarray:
    values = column.drop_null().cast(pa.float64()).to_numpy()
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def diversity(prompts: list[str], embeddings: list[list[float] | None]) -> np.ndarray:
    """float64 [prompts with at least two pictures]: the mean of 1 - cosine over all pairs of a prompt's pictures.

    0 where all pictures of a prompt are alike. embeddings: one a picture. What is no direction (None, zeros, a number
    that is missing or not finite, another length than the first) has no distance.
    """
    of_prompt: dict[str, list[np.ndarray]] = {}
    length = next((len(embedding) for embedding in embeddings if embedding), 0)
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        vector = np.array(embedding or [], np.float64)
        if len(vector) == length and np.isfinite(vector).all() and vector.any():
            of_prompt.setdefault(prompt, []).append(vector)
    return np.array([_mean_distance(np.array(group)) for group in of_prompt.values() if len(group) > 1])


def _is_vector(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


def _mean_distance(embeddings: np.ndarray) -> float:
    """The sum of all n^2 cosines is |sum of the unit vectors|^2, and n of them are those of a picture with itself."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    count = len(unit)
    return float(1 - ((unit.sum(axis=0) ** 2).sum() - count) / (count * (count - 1)))
