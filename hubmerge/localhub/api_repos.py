"""API handlers about repositories as a whole: who am I, create, settings, info, listings, access."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from hubmerge.localhub import cards, views
from hubmerge.localhub.auth import Identity, require_user, require_writer
from hubmerge.localhub.errors import HubError, bad_request, forbidden
from hubmerge.localhub.history import DEFAULT_BRANCH
from hubmerge.localhub.http import Call
from hubmerge.localhub.pages import paged


def whoami(call: Call) -> Response:
    """``GET /api/whoami-v2``."""
    user = require_user(call.identity)
    if user.scope:
        raise forbidden("Forbidden: this token stands for a job, not for a person")
    return JSONResponse(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name,
            "avatarUrl": "",
            "isPro": False,
            "canPay": False,
            "periodEnd": None,
            "orgs": [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in user.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "localhub", "role": user.role}},
        }
    )


def _named(body: dict[str, Any], user: Identity) -> tuple[str, str]:
    """Type and full id of the repository that a create or delete request means."""
    return str(body.get("type") or "model"), f"{body.get('organization') or user.name}/{body.get('name')}"


def _private(body: dict[str, Any]) -> bool | None:
    visibility = body.get("visibility")
    if visibility is None:
        private = body.get("private")
        return None if private is None else bool(private)
    if visibility not in ("private", "public", "protected"):
        raise bad_request(f"Invalid visibility: {visibility!r}")
    return bool(visibility == "private")


def create_repo(call: Call) -> Response:
    """``POST /api/repos/create``."""
    body, user = call.json(), require_user(call.identity)
    kind, repo_id = _named(body, user)
    require_writer(user, repo_id.partition("/")[0])
    if kind == "space" and body.get("sdk") not in cards.SDKS:
        raise bad_request(f'"sdk" must be one of {", ".join(cards.SDKS)}')
    url = f"{call.base_url}/{repo_id if kind == 'model' else f'{kind}s/{repo_id}'}"
    try:
        repo = call.core.create_repo(kind, repo_id, user, private=_private(body) or False, sdk=body.get("sdk"))
        if kind == "space" and body.get("hardware"):
            call.core.repos.set_hardware(repo, str(body["hardware"]))
    except HubError as error:
        if error.status == 409:  # `exist_ok` reads the address from the refusal
            error.payload["url"] = url
        raise
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


def delete_repo(call: Call) -> Response:
    """``DELETE /api/repos/delete``."""
    body, user = call.json(), require_user(call.identity)
    repo, _ = call.core.repos.writable(*_named(body, user), user)
    call.core.repos.delete(repo)
    return JSONResponse({"success": True})


def move_repo(call: Call) -> Response:
    """``POST /api/repos/move``."""
    body = call.json()
    target = str(body.get("toRepo"))
    repo, user = call.core.repos.writable(str(body.get("type") or "model"), str(body.get("fromRepo")), call.identity)
    require_writer(user, target.partition("/")[0])
    call.core.repos.move(repo, target)
    return JSONResponse({"success": True, "url": f"{call.base_url}/{target}"})


def duplicate_repo(call: Call) -> Response:
    """``POST /api/{type}/{repo}/duplicate``."""
    body, user = call.json(), require_user(call.identity)
    source = call.core.repos.readable(call.kind, call.params["repo"], user)
    target = str(body.get("repository"))
    url = f"{call.base_url}/{target if source.type == 'model' else f'{source.type}s/{target}'}"
    try:
        private = _private(body)
        call.core.duplicate_repo(source, target, user, private=source.private if private is None else private)
    except HubError as error:
        if error.status == 409:
            error.payload["url"] = url
        raise
    return JSONResponse({"url": url})


def settings(call: Call) -> Response:
    """``PUT /api/{type}/{repo}/settings``: visibility and gating."""
    body = call.json()
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    gated = body.get("gated")
    if gated not in (None, False, "auto", "manual"):
        raise bad_request(f"Invalid gated status: {gated!r}")
    call.core.repos.configure(repo, private=_private(body), gated=None if gated is None else gated or "")
    return JSONResponse({"private": _private(body), "gated": gated})


def info(call: Call) -> Response:
    """``GET /api/{type}/{repo}[/revision/{rev}]``."""
    repo = call.core.repos.visible(call.kind, call.params["repo"], call.identity)
    commit = call.core.history.resolve(repo, call.params.get("rev", DEFAULT_BRANCH))
    expand = [name for key, name in call.query.multi_items() if key in ("expand", "expand[]")]
    return JSONResponse(views.repo_info(call.core, repo, commit, blobs=call.flag("blobs"), expand=expand))


def list_repos(call: Call) -> Response:
    """``GET /api/{type}?author=&search=&filter=``, newest first."""
    query, core = call.query, call.core
    author, search = query.get("author"), query.get("search", "").lower()
    wanted = {tag for key, tag in query.multi_items() if key in ("filter", "pipeline_tag")}
    found: list[dict[str, Any]] = []
    for repo in core.repos.listed(call.kind, call.identity):
        if (author and repo.namespace != author) or search not in repo.id.lower() or repo.disabled:
            continue
        view = views.repo_info(core, repo, core.history.resolve(repo, DEFAULT_BRANCH), blobs=False, expand=[])
        if wanted <= {*view["tags"], view.get("pipeline_tag")}:
            full = call.flag("full") or call.flag("cardData") or "expand" in query
            found.append(view if full else {k: v for k, v in view.items() if k not in ("siblings", "cardData")})
    limit = int(query["limit"]) if query.get("limit", "").isdigit() else None
    return paged(call, found[:limit])


def list_own_repos(call: Call) -> Response:
    """``GET /api/settings/repositories``: everything the caller owns, with its size."""
    user = require_user(call.identity)
    namespace = call.params.get("namespace", user.name)
    items: list[dict[str, Any]] = []
    for kind in ("model", "dataset", "space"):
        for repo in call.core.repos.listed(kind, user):
            if repo.namespace == namespace:
                files = call.core.history.snapshot(repo, call.core.history.resolve(repo, DEFAULT_BRANCH))
                size = sum(entry.size_bytes for entry in files.values())
                visibility = "private" if repo.private else "public"
                items.append(
                    {
                        "id": repo.id,
                        "type": kind,
                        "storage": size,
                        "visibility": visibility,
                        "updatedAt": repo.created_at,
                    }
                )
    return paged(call, items)


def auth_check(call: Call) -> Response:
    """``GET /api/{type}/{repo}/auth-check``: may the caller download?"""
    call.core.repos.readable(call.kind, call.params["repo"], call.identity)
    return JSONResponse({})


def auth_check_write(call: Call) -> Response:
    """``GET /api/{type}/{repo}/auth-check/write``: may the caller push?"""
    call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    return JSONResponse({})


def grant_access(call: Call) -> Response:
    """``POST /api/{type}/{repo}/user-access-request/grant``."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    user = str(call.json().get("user"))
    if not repo.gated:
        raise bad_request(f"{repo.id} is not gated")
    if not call.core.accounts.exists(user):
        raise HubError(404, f"User {user} not found")
    if call.core.repos.has_access(repo, user):
        raise bad_request(f"{user} already has access to {repo.id}")
    call.core.repos.grant(repo, user)
    return JSONResponse({"success": True})


def handle_access(call: Call) -> Response:
    """``POST /api/{type}/{repo}/user-access-request/handle``: accept, reject or take back."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    body = call.json()
    if body.get("status") == "accepted":
        call.core.repos.grant(repo, str(body.get("user")))
    else:
        call.core.repos.revoke(repo, str(body.get("user")))
    return JSONResponse({"success": True})


def validate_yaml(call: Call) -> Response:
    """``POST /api/validate-yaml``: needs no token."""
    body = call.json()
    report = cards.validate(str(body.get("content", "")), str(body.get("repoType") or "model"))
    answer = {
        "errors": [{"message": message} for message in report.errors],
        "warnings": [{"message": message} for message in report.warnings],
    }
    if report.errors:
        return JSONResponse({"error": "Invalid metadata in README.md", **answer}, status_code=400)
    return JSONResponse(answer)
