"""The job table: everything by owner, bounded texts, nothing like a token, one writer wins."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmerge.errors import UsageError
from hubmerge.space.jobs import ACTIVE, MAX_MESSAGE, QUEUED, JobTable, without_tokens
from hubmerge.space.orders import KINDS, Order

ORDER = Order("merge", "ann/merged", recipe="method: linear\n")
TOKENS = ("hf_" + "aB3" * 12, "hf_oauth_" + "x1" * 20, "hf_jwt_eyJhbGciOi.eyJzdWIi.c2ln", "eyJhbGciOi.eyJzdWIi.c2ln")


@pytest.fixture
def table(tmp_path: Path) -> Iterator[JobTable]:
    made = JobTable(tmp_path / "a" / "jobs.db")
    yield made
    made.close()


def test_a_job_is_missing_to_everybody_but_its_owner(table: JobTable) -> None:
    mine, other = table.add("ann", ORDER), table.add("bob", ORDER)
    assert table.of("ann") == (mine,)
    assert table.of("bob") == (other,)
    assert table.get("ann", mine.id).order == ORDER
    for owner, key in (("ann", other.id), ("bob", mine.id), ("", mine.id), ("ann", "%"), ("%", mine.id)):
        with pytest.raises(UsageError, match="you have no job"):
            table.get(owner, key)
        with pytest.raises(UsageError, match="you have no job"):
            table.forget(owner, key)


def test_a_table_outlives_its_server(table: JobTable, tmp_path: Path) -> None:
    keys = [table.add("ann", ORDER).id for _ in range(3)]
    assert table.move(keys[0], QUEUED, "planning")
    assert table.move(keys[1], QUEUED, "running", stage="merging", shards_done=3)
    table.close()
    again = JobTable(tmp_path / "a" / "jobs.db")
    assert again.interrupt() == 2
    assert [again.get("ann", k).state for k in keys] == ["interrupted", "interrupted", "queued"]
    assert again.get("ann", keys[1]).shards_done == 3
    again.close()


def test_only_one_of_many_begins_a_job(table: JobTable) -> None:
    key = table.add("ann", ORDER).id
    won: list[bool] = []
    threads = [threading.Thread(target=lambda: won.append(table.move(key, QUEUED, "planning"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_what_is_over_is_not_changed_by_a_late_message(table: JobTable) -> None:
    key = table.add("ann", ORDER).id
    assert table.move(key, QUEUED, "running")
    assert table.move(key, ACTIVE, "done", url="u")
    assert not table.mark(key, stage="merging", state="running")
    assert (table.get("ann", key).state, table.get("ann", key).stage) == ("done", "")


def test_owner_and_order_of_a_job_never_change(table: JobTable) -> None:
    key = table.add("ann", ORDER).id
    for column in ("owner", "id", "recipe", "target", "asked", "created", "hidden", "state = 'done' --"):
        with pytest.raises(KeyError, match="not to be changed"):
            table.move(key, QUEUED, "running", **{column: "bob"})
    assert table.of("ann")[0].state == "queued"


def test_forgotten_jobs_are_gone_but_count(table: JobTable) -> None:
    job = table.add("ann", ORDER)
    with pytest.raises(UsageError, match="this job is queued"):
        table.forget("ann", job.id)
    table.move(job.id, QUEUED, "cancelled")
    table.forget("ann", job.id)
    assert table.of("ann") == ()
    with pytest.raises(UsageError):
        table.get("ann", job.id)
    assert table.created_since("ann", 0.0) == 1


@pytest.mark.parametrize("token", TOKENS)
def test_what_looks_like_a_token_is_not_written_down(table: JobTable, tmp_path: Path, token: str) -> None:
    key = table.add("ann", ORDER).id
    table.move(key, QUEUED, "failed", message=f"refused: {token}!", stage=token)
    assert table.get("ann", key).message == "refused: ***!"
    assert not [p for p in (tmp_path / "a").iterdir() if token.encode() in p.read_bytes()]


@pytest.mark.parametrize("text", ["hf-internal-testing/tiny", "my_hf_model", "hf_hub", "org/hf_mistral-7b"])
def test_names_are_no_tokens(text: str) -> None:
    assert without_tokens(text) == text


def test_messages_are_bounded_and_the_file_is_the_servers_alone(table: JobTable, tmp_path: Path) -> None:
    key = table.add("ann", ORDER).id
    table.move(key, QUEUED, "failed", message="x" * 100_000)
    assert len(table.get("ann", key).message) == MAX_MESSAGE
    path = tmp_path / "a" / "jobs.db"
    assert path.stat().st_mode & 0o077 == 0
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


@given(st.builds(Order, st.sampled_from(KINDS), *[st.text(max_size=50)] * 5, *[st.booleans()] * 2, st.text(max_size=9)))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_an_order_is_written_and_read_back(order: Order) -> None:
    assert Order.loads(order.dumps()) == order
