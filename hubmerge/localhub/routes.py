"""The table of everything the hub answers."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from hubmerge.localhub import (
    api_discussions,
    api_git,
    api_jobs,
    api_oauth,
    api_oidc,
    api_pages,
    api_repos,
    api_spaces,
    files,
    lfs,
)
from hubmerge.localhub.errors import repo_not_found
from hubmerge.localhub.http import Call, Route, route


def _health(call: Call) -> Response:
    return JSONResponse({"status": "ok"})


def _no_repo(call: Call) -> Response:
    """Ids without a namespace and other shapes that no repository has."""
    raise repo_not_found(anonymous=call.identity is None)


def build_routes() -> list[Route]:
    """All routes, in the order in which they are tried."""
    repo, talk = "/api/{type}/{repo}", "/api/{type}/{repo}/discussions"
    return [
        route("GET", "/_health", _health),
        route("GET", "/_cdn/{sha256}", files.cdn),
        route("PUT", "/_lfs/{key}/{sha256}", lfs.upload, stream=True),
        route("POST", "/_lfs/{key}/{sha256}/complete", lfs.complete),
        route("PUT", "/_lfs/{key}/{sha256}/{number}", lfs.upload_part, stream=True),
        route("POST", "/{prefix}{repo}.git/info/lfs/objects/batch", lfs.batch),
        route("POST", "/{prefix}{repo}.git/info/lfs/verify", lfs.verify),
        route("GET", "/{prefix}{repo}/resolve/{rev}/{path}", files.resolve),
        route("GET", api_oidc.PROVIDER_PATH, api_oidc.provide),
        route("GET", "/.well-known/openid-configuration", api_oauth.configuration),
        route("GET", "/oauth/jwks", api_oauth.keys),
        route("GET", "/oauth/authorize", api_oauth.ask),
        route("POST", "/oauth/authorize", api_oauth.decide),
        route("POST", "/oauth/token", api_oauth.token),
        route("GET", "/oauth/userinfo", api_oauth.userinfo),
        route("GET", "/api/whoami-v2", api_repos.whoami),
        route("POST", "/api/validate-yaml", api_repos.validate_yaml),
        route("POST", "/api/repos/create", api_repos.create_repo),
        route("DELETE", "/api/repos/delete", api_repos.delete_repo),
        route("POST", "/api/repos/move", api_repos.move_repo),
        route("GET", "/api/jobs/hardware", api_jobs.hardware),
        route("POST", "/api/jobs/{namespace}", api_jobs.start),
        route("GET", "/api/jobs/{namespace}/{id}", api_jobs.state),
        route("GET", "/api/jobs/{namespace}/{id}/logs", api_jobs.logs),
        route("POST", "/api/jobs/{namespace}/{id}/cancel", api_jobs.cancel),
        route("GET", "/api/settings/repositories", api_repos.list_own_repos),
        route("GET", "/api/organizations/{namespace}/settings/repositories", api_repos.list_own_repos),
        route("GET", "/api/{type}", api_repos.list_repos),
        route("GET", f"{repo}/revision/{{rev}}", api_repos.info),
        route("GET", f"{repo}/tree/{{rev}}", api_git.tree),
        route("GET", f"{repo}/tree/{{rev}}/{{path}}", api_git.tree),
        route("POST", f"{repo}/paths-info/{{rev}}", api_git.paths_info),
        route("POST", f"{repo}/preupload/{{rev}}", lfs.preupload),
        route("GET", f"{repo}/xet-write-token/{{rev}}", lfs.xet_token),
        route("POST", f"{repo}/commit/{{rev}}", api_git.commit),
        route("GET", f"{repo}/commits/{{rev}}", api_git.commits),
        route("GET", f"{repo}/refs", api_git.refs),
        route("POST", f"{repo}/branch/{{name}}", api_git.create_branch),
        route("DELETE", f"{repo}/branch/{{name}}", api_git.delete_branch),
        route("POST", f"{repo}/tag/{{rev}}", api_git.create_tag),
        route("DELETE", f"{repo}/tag/{{name}}", api_git.delete_tag),
        route("POST", f"{repo}/super-squash/{{name}}", api_git.super_squash),
        route("GET", f"{repo}/lfs-files", api_git.lfs_files),
        route("GET", f"{repo}/auth-check", api_repos.auth_check),
        route("GET", f"{repo}/auth-check/write", api_repos.auth_check_write),
        route("PUT", f"{repo}/settings", api_repos.settings),
        route("POST", f"{repo}/duplicate", api_repos.duplicate_repo),
        route("POST", f"{repo}/user-access-request/grant", api_repos.grant_access),
        route("POST", f"{repo}/user-access-request/handle", api_repos.handle_access),
        route("GET", "/api/spaces/{repo}/runtime", api_spaces.runtime),
        route("POST", "/api/spaces/{repo}/hardware", api_spaces.request_hardware),
        route("GET", talk, api_discussions.listing),
        route("POST", talk, api_discussions.create),
        route("GET", f"{talk}/{{num}}", api_discussions.details),
        route("POST", f"{talk}/{{num}}/comment", api_discussions.comment),
        route("POST", f"{talk}/{{num}}/comment/{{event}}/edit", api_discussions.edit_comment),
        route("POST", f"{talk}/{{num}}/comment/{{event}}/hide", api_discussions.hide_comment),
        route("POST", f"{talk}/{{num}}/status", api_discussions.status),
        route("POST", f"{talk}/{{num}}/title", api_discussions.title),
        route("POST", f"{talk}/{{num}}/merge", api_discussions.merge),
        route("GET", repo, api_repos.info),
        route("GET", "/api/{type}/{rest}", _no_repo),
        route("GET", "/api/{type}/{rest}/revision/{rev}", _no_repo),
        route("GET", "/api/{type}/{rest}/tree/{rev}", _no_repo),
        route("GET", "/{prefix}{rest}/resolve/{rev}/{path}", _no_repo),
        route("GET", "/{prefix}{shown}", api_pages.repository),
    ]
