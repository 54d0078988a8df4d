"""The sandbox for generated code; docs/sandbox.md says what it covers and what it does not."""

from vigor.evaluation.sandbox.api import Sandbox, check, run
from vigor.evaluation.sandbox.programs import Limits, Outcome, Program, SandboxUnavailable, Status, same_lines
from vigor.evaluation.sandbox.sandboxfusion import SandboxFusion

__all__ = [
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxFusion",
    "SandboxUnavailable",
    "Status",
    "check",
    "run",
    "same_lines",
]
