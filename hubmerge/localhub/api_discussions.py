"""API handlers about discussions and pull requests."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from hubmerge.localhub import views
from hubmerge.localhub.auth import Identity
from hubmerge.localhub.discussions import Event
from hubmerge.localhub.errors import HubError, bad_request
from hubmerge.localhub.http import Call
from hubmerge.localhub.repos import Repo

PER_PAGE = 10


def _contributor(call: Call) -> tuple[Repo, Identity]:
    return call.core.repos.contributable(call.kind, call.params["repo"], call.identity)


def _number(call: Call) -> int:
    text = call.params["num"]
    if not text.isdigit():
        raise HubError(404, f"Discussion {text} not found")
    return int(text)


def _moderator(call: Call) -> tuple[Repo, Identity]:
    """The caller, who must own the repository or have opened the discussion."""
    repo, user = _contributor(call)
    if call.core.discussions.get(repo, _number(call)).author != user.name:
        call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    return repo, user


def _answer(key: str, event: Event) -> Response:
    return JSONResponse({key: views.event_item(event)})


def listing(call: Call) -> Response:
    """``GET …/discussions?type=&status=&author=&p=``."""
    repo = call.core.repos.visible(call.kind, call.params["repo"], call.identity)
    kind, status, author = call.query.get("type"), call.query.get("status"), call.query.get("author")
    found = [
        discussion
        for discussion in call.core.discussions.all(repo)
        if (kind in (None, "all") or (kind == "pull_request") == (discussion.base is not None))
        and (status in (None, "all") or (status == "open") == (discussion.status in ("open", "draft")))
        and author in (None, discussion.author)
    ]
    page = call.query.get("p", "0")
    start = (int(page) if page.isdigit() else 0) * PER_PAGE
    items = [views.discussion_item(repo, discussion) for discussion in found[start : start + PER_PAGE]]
    return JSONResponse({"discussions": items, "count": len(found), "start": start})


def details(call: Call) -> Response:
    """``GET …/discussions/{num}?diff=``."""
    repo = call.core.repos.visible(call.kind, call.params["repo"], call.identity)
    discussion = call.core.discussions.get(repo, _number(call))
    return JSONResponse(views.discussion_details(call.core, repo, discussion, diff=call.flag("diff")))


def create(call: Call) -> Response:
    """``POST …/discussions {title,description,pullRequest}``."""
    repo, user = _contributor(call)
    body = call.json()
    number = call.core.discussions.open(
        repo, user, str(body.get("title") or ""), str(body.get("description") or ""),
        pull_request=bool(body.get("pullRequest")),
    )  # fmt: skip
    url = f"{call.base_url}/{repo.url_path}/discussions/{number}"
    return JSONResponse({"num": number, "url": url, "pullRequest": bool(body.get("pullRequest"))})


def comment(call: Call) -> Response:
    """``POST …/discussions/{num}/comment {comment}``."""
    repo, user = _contributor(call)
    text = call.json().get("comment")
    if not isinstance(text, str) or not text.strip():
        raise bad_request("A comment needs text")
    return _answer("newMessage", call.core.discussions.comment(repo, _number(call), user, text))


def edit_comment(call: Call) -> Response:
    """``POST …/discussions/{num}/comment/{event}/edit {content}``."""
    repo, user = _contributor(call)
    text = str(call.json().get("content") or "")
    event = call.core.discussions.edit_comment(repo, _number(call), call.params["event"], user, text)
    return _answer("updatedComment", event)


def hide_comment(call: Call) -> Response:
    """``POST …/discussions/{num}/comment/{event}/hide``."""
    repo, user = _contributor(call)
    event = call.core.discussions.edit_comment(repo, _number(call), call.params["event"], user, None)
    return _answer("updatedComment", event)


def status(call: Call) -> Response:
    """``POST …/discussions/{num}/status {status,comment?}``."""
    repo, user = _moderator(call)
    body = call.json()
    wanted, text = str(body.get("status")), body.get("comment")
    return _answer("newStatus", call.core.discussions.set_status(repo, _number(call), user, wanted, text))


def title(call: Call) -> Response:
    """``POST …/discussions/{num}/title {title}``."""
    repo, user = _moderator(call)
    return _answer("newTitle", call.core.discussions.rename(repo, _number(call), user, str(call.json().get("title"))))


def merge(call: Call) -> Response:
    """``POST …/discussions/{num}/merge {comment?}``."""
    repo, user = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    raw = call.body.read()
    call.body.seek(0)
    text = call.json().get("comment") if raw.strip() not in (b"", b"null") else None
    oid = call.core.discussions.merge(repo, _number(call), user, text)
    return JSONResponse({"success": True, "mergeCommitId": oid})
