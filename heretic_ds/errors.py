"""The errors that end a command with one sentence instead of a traceback."""


class UserError(Exception):
    """A mistake in configuration or input that the user can mend: shown as one line, exit status 2."""


class UnfitDtype(UserError):
    """A model does not work in the dtype that it was loaded in, which may be too narrow for it; another may do."""


class SearchFailed(Exception):
    """The job ran as asked but reached no usable result: shown as one line, exit status 1."""


class RankFailed(Exception):
    """Another rank of the job failed; the message holds all that it said."""
