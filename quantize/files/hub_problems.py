"""Why the Hub gives no file, in one line with the remedy."""

from __future__ import annotations

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def is_offline(err: BaseException) -> bool:
    """Whether the user forbade the network (HF_HUB_OFFLINE)."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(one, OfflineModeIsEnabled) for one in _causes(err))


def is_final(err: Exception) -> bool:
    """Whether the Hub says that there is no such revision, or the name is none: then nothing in the
    cache is what was asked for."""
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    return isinstance(err, RevisionNotFoundError | HFValidationError)


def is_refusal(err: Exception) -> bool:
    """Whether the Hub was asked and says that there is no such thing, or not for this user."""
    from huggingface_hub.errors import HFValidationError

    status = getattr(getattr(err, "response", None), "status_code", None)
    return isinstance(err, HFValidationError) or status in (401, 403, 404)


def reason_of(name: str, revision: str | None, err: Exception, kind: str = "model") -> str:
    """What an error of huggingface_hub means, and the remedy. kind: model or data set."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    folder = "" if kind == "model" else "datasets/"
    found = list(_causes(err))
    if is_offline(err):
        return (
            "not whole in the Hub's cache, and HF_HUB_OFFLINE forbids the network; unset it, or "
            f"fetch the {kind} where there is a network"
        )
    if any(isinstance(one, GatedRepoError) for one in found):
        return f"is gated; accept its terms at {hub}/{folder}{name}, then {_LOG_IN}"
    if any(isinstance(one, RepositoryNotFoundError) for one in found):
        neither = "neither a local folder nor" if kind == "model" else "not"
        return (
            f"{neither} a {kind} on {hub} that may be read from here; check the name, and where it "
            f"is private, {_LOG_IN}"
        )
    if any(isinstance(one, RevisionNotFoundError) for one in found):
        return f"{name} has no revision {revision!r}; give a branch, a tag or a whole commit hash"
    if any(isinstance(one, DisabledRepoError) for one in found):
        return f"{hub} has closed this {kind}; choose another"
    if isinstance(err, HFValidationError):
        return f"no {kind} can have this name; write org/name"
    for one in found:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status == 401:
            return f"{hub} does not accept the token; renew it: {_LOG_IN}"
        if status == 403:
            return f"{hub} denies access with this token; {_LOG_IN} with one that may read it"
        if status == 429:
            return f"{hub} has had too many requests; wait some minutes, or {_LOG_IN}"
        if status is not None:
            return f"{hub} answers with error {status}; try again later"
    return (
        f"{hub} cannot be read from here ({_first_line(found[-1])}); check the network: the same command "
        "goes on with the files that are whole"
    )


def push_reason_of(name: str, err: Exception) -> str:
    """What an error of huggingface_hub means where something was to be uploaded, and the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub, owner = constants.ENDPOINT, name.partition("/")[0]
    if is_offline(err):
        return "HF_HUB_OFFLINE forbids the network; unset it"
    found = list(_causes(err))
    if isinstance(err, ValueError) and "metadata" in str(err):
        said = " ".join(str(err).split())[:300]
        return f"{hub} refuses the card ({said}); mend the front matter of README.md"
    if any(isinstance(one, LocalTokenNotFoundError) for one in found):
        return f"there is no token; {_LOG_IN}, to one that may write"
    for one in found:
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None)
        if status == 401:
            return f"{hub} does not accept the token; renew it: {_LOG_IN}, to one that may write"
        if status in (403, 404):
            return (
                f"{hub} denies it: the token may not write there, or you are no member of {owner}; "
                f"{_LOG_IN}, to one that may, or give a name of your own"
            )
        if status == 409:
            return f"{hub} has it already, or it was changed meanwhile; try again, or with --update"
        if status == 413:
            return f"{hub} takes no more: the storage of {owner} is full"
        if status == 429:
            return f"{hub} has had too many requests; wait some minutes"
        if status is not None:
            said = (response.headers.get("X-Error-Message") or "") if response is not None else ""
            told = f" ({said[:200]})" if said else ""
            return f"{hub} answers with error {status}{told}; try again later"
    return (
        f"{hub} cannot be reached from here ({_first_line(found[-1])}); check the network: the same "
        "command goes on, what was uploaded is not sent again"
    )


def _causes(err: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from, in turn."""
    found: list[BaseException] = []
    while err is not None and err not in found:
        found.append(err)
        err = err.__cause__
    return found


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return (lines[0] if lines else type(err).__name__).rstrip(". ")[:200]
