"""Arrow tables, digests and Parquet rows; and the documented query, by DuckDB."""

import os
import threading
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.orders import Plan, Version
from buffer.protocol import TakenBatch
from buffer.rows import Combination, scalar_rows, with_tensors
from buffer.schema import check_scores, rollout_table, stack, tensors_of
from buffer.state import File, Rollout, Work
from buffer.store import Store, roster_of, write_batch
from tests.buffer_toy import PLAN, rolled_out
from tests.buffer_toy import buffer as toy_buffer
from tests.buffer_toy import finish as finish_toy

ORDER = PLAN.order("b00001.02")
QUERY = """
SELECT prompt, policy_version, avg(reward) AS mean_reward, count(*) AS pictures
FROM read_parquet('{run}/trajectories/*.parquet', union_by_name = true)
WHERE set_aside IS NULL
GROUP BY prompt, policy_version
ORDER BY prompt, policy_version
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_table_comes_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    path: dict[str, np.ndarray] = {
        "latents": rng.standard_normal((2, 4, 3, 5, 5)).astype(dtype),
        "timesteps": rng.integers(0, 1000, (2, 3)).astype("int32" if dtype == "float32" else "float32"),
        "log_probs": rng.standard_normal((2, 3)).astype(np.float32),
    }
    images = rng.integers(0, 256, (2, 6, 7, 3)).astype(np.uint8)
    store = Store(tmp_path, 1)
    file = store.write_arrow("b00001.02", rollout_table(ORDER, images, path))
    table = store.read_arrow(file)
    assert table is not None and table["trajectory_id"].to_pylist() == list(ORDER.trajectory_ids)
    back = tensors_of(table)
    assert list(back) == ["latents", "timesteps", "log_probs", "image"]
    for name, array in {**path, "image": images}.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
        assert not back[name].flags.writeable  # a view of the mapped file
        np.testing.assert_array_equal(
            tensors_of(pa.concat_tables([table.slice(1), table.slice(0, 1)]))[name], array[::-1]
        )


def test_equal_tables_have_equal_digests_whatever_their_chunks(tmp_path: Path) -> None:
    table = rolled_out(ORDER, Version(0, "x"))
    store = Store(tmp_path, 1)
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1)]).replace_schema_metadata({"a": "b"})
    files = [store.write_arrow("b00001.02", t) for t in (table, pieces, rolled_out(ORDER, Version(0, "x")))]
    other = store.write_arrow("b00001.02", rolled_out(ORDER, Version(0, "y")))
    assert len({file.digest for file in files}) == 1 and other.digest != files[0].digest
    assert len({file.path for file in [*files, other]}) == 4


@given(st.data())
@settings(max_examples=40, derandomize=True, deadline=None)
def test_no_damage_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("run")
    store = Store(folder, 1)
    file = store.write_arrow("b00001.02", rolled_out(ORDER, Version(0, "x")))
    path = folder / file.path
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:place])
    else:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
    assert store.read_arrow(file) is None
    path.write_bytes(whole)
    assert store.read_arrow(file) is not None


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("latents", np.zeros((3, 4, 3, 5, 5), np.float32)),
        ("latents", np.zeros((2, 3, 3, 5, 5), np.float32)),  # T latents, and not T + 1
        ("latents", np.zeros((2, 4, 3, 5, 5), np.float64)),
        ("timesteps", np.zeros((2, 3), np.bool_)),
        ("timesteps", np.zeros((2, 3), np.int64)),
        ("timesteps", np.zeros((2, 2), np.int32)),
        ("log_probs", np.zeros(2, np.float32)),
        ("log_probs", np.zeros((2, 3), np.float64)),
        ("image", np.zeros((2, 3, 6, 6), np.uint8)),
        ("image", np.zeros((2, 6, 6, 3), np.float32)),
    ],
)
def test_wrong_shapes_are_named(name: str, bad: np.ndarray) -> None:
    good: dict[str, np.ndarray] = {
        "latents": np.zeros((2, 4, 3, 5, 5), np.float16),
        "timesteps": np.zeros((2, 3), np.int32),
        "log_probs": np.zeros((2, 3), np.float32),
        "image": np.zeros((2, 6, 6, 3), np.uint8),
    }
    rollout_table(ORDER, good["image"], {key: array for key, array in good.items() if key != "image"})
    rollout_table(ORDER, good["image"], {"latents": good["latents"][:, -1:]})
    with pytest.raises(ValueError, match="latents of order"):
        rollout_table(ORDER, good["image"], {"latents": good["latents"]})
    given = good | {name: bad}
    with pytest.raises(ValueError, match=f"{name} of order b00001.02"):
        rollout_table(ORDER, given["image"], {key: array for key, array in given.items() if key != "image"})


def test_scores_have_to_be_whole_and_finite() -> None:
    first, second = ORDER.trajectory_ids

    def table(ids: list[int], scores: list[float]) -> pa.Table:
        return pa.table({"trajectory_id": pa.array(ids, pa.int64()), "score": pa.array(scores, pa.float32())})

    check_scores(ORDER, table([second, first], [1.0, 2.0]), [])
    check_scores(ORDER, table([second], [1.0]), [first])
    for ids, scores in (([second], [1.0]), ([first, first], [1.0, 1.0]), ([first, second, 99], [0.0] * 3)):
        with pytest.raises(ValueError, match="not one for each picture"):
            check_scores(ORDER, table(ids, scores), [])
    with pytest.raises(ValueError, match="finite"):
        check_scores(ORDER, table([first, second], [1.0, float("nan")]), [])


def test_rewards_are_summed_by_weight_and_set_aside_rows_have_none() -> None:
    first, second = ORDER.trajectory_ids
    scores = {
        "a": pa.table({"trajectory_id": [second, first], "score": pa.array([1.0, 2.0], pa.float32())}),
        "b": pa.table({"trajectory_id": [first], "score": pa.array([10.0], pa.float32()), "caption": ["a cat"]}),
    }
    work = Work(version=Version(0, "x"), rollout=Rollout(File("", ""), None), set_aside=((second, "blank"),))
    rows = scalar_rows(ORDER, work, ("a", "b"), scores, Combination({"a": 1.0, "b": 0.5})).to_pylist()
    assert [row["reward"] for row in rows] == [7.0, None]
    assert [row["b.caption"] for row in rows] == ["a cat", None]
    assert [row["set_aside"] for row in rows] == [None, "blank"]
    assert [row["age"] for row in rows] == [1, 1]
    live = with_tensors(
        scalar_rows(ORDER, work, ("a", "b"), scores, Combination({"a": 1.0, "b": 0.5})),
        rolled_out(ORDER, Version(0, "x")),
    )
    assert live["trajectory_id"].to_pylist() == [first]


def test_no_file_is_written_over(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    file = store.write_arrow("b00001.02", rolled_out(ORDER, Version(0, "x")))
    again = Store(tmp_path, 1)  # the same epoch twice cannot be; if it were, this is what would save the file
    with pytest.raises(FileExistsError):
        again.write_arrow("b00001.02", rolled_out(ORDER, Version(0, "y")))
    assert store.read_arrow(file) is not None


def test_duckdb_answers_mean_reward_by_prompt_and_policy_version(tmp_path: Path) -> None:
    finish_toy(toy_buffer(tmp_path))
    answer = duckdb.execute(QUERY.format(run=tmp_path)).fetchall()
    files = sorted((tmp_path / "trajectories").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    expected: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        expected.setdefault((row["prompt"], row["policy_version"]), []).append(row["reward"])
    assert len(rows) == 3 * PLAN.batch_size
    assert {(p, v): n for p, v, _, n in answer} == {key: len(rewards) for key, rewards in expected.items()}
    for prompt, version, mean, _ in answer:
        assert mean == pytest.approx(np.mean(expected[prompt, version]))


def test_the_query_on_a_table_of_the_sizes_of_stable_diffusion(tmp_path: Path) -> None:
    """Latents [51, 4, 64, 64], 835,584 numbers a trajectory: in tensors/, where no query stumbles over them."""
    plan = Plan(seed=0, prompts=("a cat", "a dog"), batch_size=4, order_size=1, sets=())
    store = Store(tmp_path, 1)
    live = []
    for order in plan.batch(0):
        latents = np.full((1, 51, 4, 64, 64), order.trajectory_ids[0], np.float16)
        steps = np.arange(981, -1, -20, dtype=np.int32)[None, :50]
        path: dict[str, np.ndarray] = {
            "latents": latents,
            "timesteps": steps,
            "log_probs": np.zeros((1, 50), np.float32),
        }
        table = rollout_table(order, np.zeros((1, 512, 512, 3), np.uint8), path)
        file = store.write_arrow(order.order_id, table)
        score = pa.table(
            {"trajectory_id": order.trajectory_ids, "score": pa.array([order.trajectory_ids[0]], pa.float32())}
        )
        work = Work(version=Version(0, "x"), rollout=Rollout(file, file))
        back = store.read_arrow(file)
        live.append(with_tensors(scalar_rows(order, work, ("a",), {"a": score}, Combination({"a": 1.0})), back))
    rows = stack(live)
    taken = TakenBatch(
        0,
        Version(0, "x"),
        "roster",
        "e0001.00001",
        rows,
        rows.slice(0, 0).drop_columns(["latents", "timesteps", "log_probs"]),
    )
    assert tensors_of(rows)["latents"].shape == (4, 51, 4, 64, 64)
    written = write_batch(tmp_path, taken, np.zeros(4, np.float32), 5.0)
    assert roster_of(tmp_path / written) == "roster"
    answer = duckdb.execute(QUERY.format(run=tmp_path)).fetchall()
    assert sum(pictures for *_, pictures in answer) == 4
    assert {(p, m) for p, _, m, _ in answer} == {
        (
            prompt,
            np.mean(
                [i for o in plan.batch(0) for i, p in zip(o.trajectory_ids, o.prompts, strict=True) if p == prompt]
            ),
        )
        for prompt in {p for o in plan.batch(0) for p in o.prompts}
    }


def test_what_is_still_being_written_into_does_not_stop_its_removal(tmp_path: Path) -> None:
    """A learner of an earlier epoch writes on in the folder that a new buffer removes at its start."""
    store = Store(tmp_path, 2)
    folder = tmp_path / "checkpoints" / ".v00001.e0001.00003.tmp"
    folder.mkdir()
    inside = os.open(folder, os.O_RDONLY)
    enough = threading.Event()

    def write() -> None:
        for number in range(3000):
            try:
                os.close(os.open(f"part{number}", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
            except FileNotFoundError:  # the folder is gone
                return
            if number == 100:
                enough.set()

    learner = threading.Thread(target=write)
    learner.start()
    enough.wait()
    store.remove(["checkpoints/.v00001.e0001.00003.tmp"])
    assert not folder.exists()
    assert store.leftovers([]) == [f"checkpoints/{path.name}" for path in (tmp_path / "checkpoints").iterdir()]
    learner.join()
    store.remove(store.leftovers([]))
    assert store.leftovers([]) == []
    os.close(inside)
