"""Which commit of a text set on the Hub is read, so that it can be recorded and read again."""

from __future__ import annotations

import logging

from quantize.errors import DataError

log = logging.getLogger(__name__)


def commit_of(hub_id: str, revision: str | None) -> str | None:
    """The commit that a set's revision (branch, tag, commit; None: the main branch) means now.

    None where the Hub cannot be asked: `datasets` then takes what its own cache holds, or says why
    it cannot. DataError where the Hub refuses: a gated, private or unknown set or revision.
    """
    from quantize.files.hub import dataset_commit
    from quantize.files.hub_problems import is_refusal, reason_of

    try:
        return dataset_commit(hub_id, revision)
    except Exception as error:
        name = hub_id if revision is None else f"{hub_id}@{revision}"
        if not is_refusal(error):
            log.warning(
                "%s: the Hub cannot be asked which commit this is; what is cached is read, and "
                "recorded without one",
                name,
            )
            return None
        reason = reason_of(hub_id, revision, error, "data set")
        raise DataError(f"{name}: {reason}") from None
