"""API handlers about a repository's content and history: trees, commits, branches, tags."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.responses import JSONResponse, Response

from hubmerge.localhub import views
from hubmerge.localhub.errors import bad_request, entry_not_found
from hubmerge.localhub.history import DEFAULT_BRANCH, check_ref_name
from hubmerge.localhub.http import Call
from hubmerge.localhub.pages import next_link, paged, start_of

COMMITS_PER_PAGE = 50


def tree(call: Call) -> Response:
    """``GET …/tree/{rev}[/{path}]?recursive=&expand=``."""
    core = call.core
    repo = core.repos.visible(call.kind, call.params["repo"], call.identity)
    commit = core.history.resolve(repo, call.params["rev"])
    files = core.history.snapshot(repo, commit)
    folder = call.params.get("path", "").strip("/")
    paths = views.below(files, folder, recursive=call.flag("recursive"))
    if folder and not paths:
        raise entry_not_found(f'{folder} does not exist on "{call.params["rev"]}"', commit=commit)
    start, size = start_of(call), core.config.page_size
    page = views.listing(core, repo, files, paths[start : start + size], expand=call.flag("expand"))
    return JSONResponse(page, headers=next_link(call, start + size) if start + size < len(paths) else None)


def paths_info(call: Call) -> Response:
    """``POST …/paths-info/{rev}``, form-encoded or JSON."""
    core = call.core
    repo = core.repos.visible(call.kind, call.params["repo"], call.identity)
    commit = core.history.resolve(repo, call.params["rev"])
    if call.request.headers.get("content-type", "").startswith("application/json"):
        body = call.json()
        paths, expand = [str(path) for path in body.get("paths", [])], bool(body.get("expand"))
    else:
        form = parse_qs(call.body.read().decode())
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() in ("1", "true")
    files = core.history.snapshot(repo, commit)
    wanted = [path.strip("/") for path in paths]
    return JSONResponse(views.listing(core, repo, files, wanted, expand=expand))


def commit(call: Call) -> Response:
    """``POST …/commit/{rev}[?create_pr=1]``."""
    core, revision = call.core, call.params["rev"]
    create_pr = call.flag("create_pr")
    open_to_all = create_pr or revision.startswith("refs/pr/")
    allowed = core.repos.contributable if open_to_all else core.repos.writable
    repo, user = allowed(call.kind, call.params["repo"], call.identity)
    if revision.startswith("refs/pr/") and not user.reaches(repo.namespace, repo.url_path):
        number = revision.removeprefix("refs/pr/")
        if not number.isdigit() or core.discussions.get(repo, int(number)).author != user.name:
            core.repos.writable(call.kind, call.params["repo"], call.identity)
    request = core.committer.parse(repo, call.body)
    if create_pr:
        result = core.committer.commit_as_pull_request(repo, revision, request, user)
    else:
        result = core.committer.commit(repo, revision, request, user)
    page = f"{call.base_url}/{repo.url_path}"
    answer = {"success": True, "commitOid": result.oid, "commitUrl": f"{page}/commit/{result.oid}", "hookOutput": ""}
    if result.pull_request is not None:
        answer["pullRequestUrl"] = f"{page}/discussions/{result.pull_request}"
    return JSONResponse(answer)


def commits(call: Call) -> Response:
    """``GET …/commits/{rev}``, newest first."""
    core = call.core
    repo = core.repos.visible(call.kind, call.params["repo"], call.identity)
    head = core.history.resolve(repo, call.params["rev"])
    start = start_of(call)
    found = core.history.log(repo, head, offset=start, limit=COMMITS_PER_PAGE + 1)
    more = len(found) > COMMITS_PER_PAGE
    items = [views.commit_item(item) for item in found[:COMMITS_PER_PAGE]]
    return JSONResponse(items, headers=next_link(call, start + COMMITS_PER_PAGE) if more else None)


def refs(call: Call) -> Response:
    """``GET …/refs?include_prs=``."""
    repo = call.core.repos.visible(call.kind, call.params["repo"], call.identity)
    groups: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "convert": [], "pr": []}
    for ref, oid in call.core.history.refs(repo).items():
        _, group, name = ref.split("/", 2)
        shown = ref.removeprefix("refs/") if group == "pr" else name
        groups[group].append({"name": shown, "ref": ref, "targetCommit": oid})
    answer = {"branches": groups["heads"], "tags": groups["tags"], "converts": groups["convert"]}
    if call.flag("include_prs"):
        answer["pullRequests"] = groups["pr"]
    return JSONResponse(answer)


def create_branch(call: Call) -> Response:
    """``POST …/branch/{name} {startingPoint?}``."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    name = check_ref_name(call.params["name"])
    start = call.json().get("startingPoint") or DEFAULT_BRANCH
    call.core.history.create_ref(repo, f"refs/heads/{name}", call.core.history.resolve(repo, str(start)))
    return JSONResponse({"success": True})


def delete_branch(call: Call) -> Response:
    """``DELETE …/branch/{name}``."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    call.core.history.delete_ref(repo, f"refs/heads/{call.params['name']}")
    return JSONResponse({"success": True})


def create_tag(call: Call) -> Response:
    """``POST …/tag/{rev} {tag,message?}``."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    tag = call.json().get("tag")
    if not isinstance(tag, str):
        raise bad_request("The request names no tag")
    target = call.core.history.resolve(repo, call.params["rev"])
    call.core.history.create_ref(repo, f"refs/tags/{check_ref_name(tag)}", target)
    return JSONResponse({"success": True})


def delete_tag(call: Call) -> Response:
    """``DELETE …/tag/{name}``."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    call.core.history.delete_ref(repo, f"refs/tags/{call.params['name']}")
    return JSONResponse({"success": True})


def super_squash(call: Call) -> Response:
    """``POST …/super-squash/{branch} {message}``."""
    repo, user = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    message = str(call.json().get("message") or "Super-squash")
    oid = call.core.history.squash(repo, call.params["name"], message, user.name)
    return JSONResponse({"success": True, "commitId": oid})


def lfs_files(call: Call) -> Response:
    """``GET …/lfs-files``: the large files that any ref's head uses."""
    repo, _ = call.core.repos.writable(call.kind, call.params["repo"], call.identity)
    found: dict[str, dict[str, object]] = {}
    for ref, oid in call.core.history.refs(repo).items():
        pushed = call.core.history.commit(repo, oid)
        for entry in call.core.history.snapshot(repo, oid).values():
            if entry.lfs:
                found.setdefault(
                    entry.sha256,
                    {
                        "fileOid": entry.sha256, "oid": entry.sha256, "filename": entry.path,
                        "size": entry.size_bytes, "pushedAt": pushed.date, "ref": ref,
                    },
                )  # fmt: skip
    return paged(call, list(found.values()))
