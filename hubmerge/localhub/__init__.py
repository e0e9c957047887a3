"""A small Hub-compatible server, for demos, tests and work without a network."""

from hubmerge.localhub.auth import DEFAULT_TOKEN, User, parse_user
from hubmerge.localhub.core import RootInUseError
from hubmerge.localhub.faults import Fault, FaultBook, FaultRule
from hubmerge.localhub.oauth import OAuthApp
from hubmerge.localhub.process import HubProcess
from hubmerge.localhub.server import LocalHub, serve
from hubmerge.localhub.wire import Limits, RequestLog, RequestRecord

__all__ = [
    "DEFAULT_TOKEN",
    "Fault",
    "FaultBook",
    "FaultRule",
    "HubProcess",
    "Limits",
    "LocalHub",
    "OAuthApp",
    "RequestLog",
    "RequestRecord",
    "RootInUseError",
    "User",
    "parse_user",
    "serve",
]
