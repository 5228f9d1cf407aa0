"""One reward's columns have the same types from order to order, or no batch could be put together of them."""

import pyarrow as pa

from buffer.errors import RunStopped

PROMOTE = "permissive"  # as `schema.stack` puts tables below one another: whole numbers and others, or none at all, fit


class ScoreTypes:
    """What each reward answered with so far."""

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
