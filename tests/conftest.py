import pytest

from xai_helpers.checks import Wrong


@pytest.fixture
def verdict(capsys):
    """verdict(check, message): the check calls an answer right, or wrong with that message (a regular expression)."""

    def judge(check, message):
        if message is None:
            check()
            assert "Right. " in capsys.readouterr().out
        else:
            with pytest.raises(Wrong, match=message):
                check()

    return judge
