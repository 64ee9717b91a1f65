import pytest

from xai_helpers.checks import Wrong


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """Tests are of the CPU, on a machine with a GPU, too; those of other devices say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XAI_DEVICE", "cpu")
        yield


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
