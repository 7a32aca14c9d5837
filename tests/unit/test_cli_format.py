"""Numbers for people, and text from guests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.cli import format, output, terminal


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_258_291, "1.2 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (512 << 20, "512.0 MiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    """A size is shown in its natural unit."""
    assert format.size(count) == text


@given(st.integers(0, 1 << 62))
def test_a_size_is_never_four_digits_of_a_larger_unit(count: int) -> None:
    """No size reads `1024.0 KiB`."""
    number, unit = format.size(count).split()
    assert float(number) < 1024 or unit == "PiB"


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.04, "0.0 ms"),
        (9.94, "9.9 ms"),
        (12.3, "12 ms"),
        (999.6, "1.00 s"),
        (12_340, "12.3 s"),
        (59_990, "1 min 00 s"),
        (185_000, "3 min 05 s"),
    ],
)
def test_durations(milliseconds: float, text: str) -> None:
    """A duration is shown with the digits that matter."""
    assert format.duration(milliseconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (0, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (86400 * 3, "3 d")]
)
def test_ages(seconds: float, text: str) -> None:
    """An age is shown in its largest unit, and is never negative, even if the clock went back."""
    assert format.age(1000.0, now=1000.0 + seconds) == text


@given(st.binary())
def test_a_guests_output_cannot_control_the_terminal(data: bytes) -> None:
    """`harmless` removes every escape sequence except colours and every control character except
    tab and newline.
    """
    shown = output.harmless(data)
    rest = output.harmless(shown)
    assert rest == shown
    for index, byte in enumerate(shown):
        if byte == 0x1B:
            assert shown[index + 1 : index + 2] == b"["
        else:
            assert byte >= 0x20 or byte in b"\t\n"


def test_colours_of_a_log_are_kept() -> None:
    """Colours of a log are kept; a sequence that sets the title is printed, not obeyed."""
    assert output.harmless(b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07") == b"\x1b[1;31mred\x1b[0m \\x1b]0;title\\x07"


def test_an_error_of_a_guest_is_printed_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    """Text in an error message cannot control the terminal either."""
    output.complain("the guest said \x1b[2J\r")
    assert capsys.readouterr().err == "coppice: the guest said \\x1b[2J\\x0d\n"


@pytest.mark.parametrize(
    ("chunks", "sent", "leave"),
    [
        ([b"ls\r~."], b"ls\r", True),
        ([b"~", b"."], b"", True),
        ([b"~~."], b"~.", False),
        ([b"a~."], b"a~.", False),
        ([b"\r~x"], b"\r~x", False),
        ([b"~\r~."], b"~\r", True),
    ],
)
def test_the_escape_that_leaves_a_session(chunks: list[bytes], sent: bytes, leave: bool) -> None:
    """`~.` leaves the session only at the start of a line, however the keys arrive; no other key is
    lost.
    """
    escape = terminal.Escape()
    found = [escape.feed(chunk) for chunk in chunks]
    assert b"".join(data for data, _ in found) == sent
    assert found[-1][1] is leave


@given(st.binary())
def test_keys_without_a_tilde_are_all_sent(data: bytes) -> None:
    """The escape removes no byte of typed or pasted text."""
    plain = data.replace(b"~", b"")
    assert terminal.Escape().feed(plain) == (plain, False)
