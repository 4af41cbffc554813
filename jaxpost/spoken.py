"""Text that is shown while it is drawn."""

import re
import shutil
import sys
from collections.abc import Callable, Sequence

from rich.cells import cell_len

UNFINISHED = "\ufffd"  # what a tokenizer makes of half a character
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey
PIECES = re.compile(r"\n|[^\S\n]+|\S+")


class Spoken:
    """Shows the tokens so far of a completion, as `stop` of `generate`: it never ends one.

    Args:
        decode: tokens -> their text.
        is_terminal: break lines between words, and show nothing that a terminal would obey.

    Attributes:
        text: so far.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_terminal: bool):
        self._decode, self._is_terminal = decode, is_terminal
        self._shown, self._column, self._blank = 0, 0, ""
        self.text = ""

    def __call__(self, tokens: Sequence[int]) -> None:
        self.text = self._decode(tokens)
        ready = self.text.rstrip(UNFINISHED)
        if self._is_terminal:  # the last word may go on
            ready = ready[: len(ready) - len(re.split(r"\s", ready)[-1])]
        self._show(ready)

    def close(self) -> None:
        """Show the rest, and end the line."""
        self._show(self.text)
        print(flush=True)

    def _show(self, text: str) -> None:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        sys.stdout.write(self._wrapped(CONTROL.sub("", new)) if self._is_terminal else new)
        sys.stdout.flush()

    def _wrapped(self, text: str) -> str:
        """With line breaks between words that do not fit on a line; spaces wait for the word that follows."""
        width, written = shutil.get_terminal_size().columns, []
        for piece in PIECES.findall(text):
            if piece == "\n":
                written.append(piece)
                self._column, self._blank = 0, ""
            elif piece.isspace():
                self._blank += piece
            else:
                if self._column and self._column + cell_len(self._blank + piece) > width:
                    self._column, self._blank = 0, "\n"
                written.append(self._blank + piece)
                self._column, self._blank = self._column + cell_len(self._blank + piece), ""
        return "".join(written)
