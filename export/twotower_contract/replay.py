"""An answer as it came about, token by token, and the page that replays it.

`twotower run --html` and `twotower generate --html` write the page; the OpenAI front end serves the
same board. A page is one file: style, script and data are in it, and nothing is fetched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower_contract.atomic import write_text

PAGES = Path(__file__).parent / "pages"


@dataclass(frozen=True, slots=True)
class Token:
    """A committed token.

    Attributes:
        text: Text that the token adds to the answer.
        call: Denoiser call of its block that committed it, from 1; 0 in the modes that mask
            nothing.
        confidence: Probability that the denoiser gave it then, from 0 to 1; None where not known.
    """

    text: str
    call: int
    confidence: float | None


def tokens_of(
    texts: Sequence[str], steps: Sequence[int], logprobs: Sequence[float], is_denoised: bool
) -> tuple[Token, ...]:
    """Return the tokens of a block.

    Args:
        texts: Text that each adds.
        steps: Denoiser call of the block that committed each, from 0; -1 where the request gave it.
        logprobs: Log-probability of each.
        is_denoised: Whether the mode masks positions; else all come at once.
    """
    return tuple(
        Token(text, step + 1 if is_denoised else 0, round(math.exp(logprob), 4))
        for text, step, logprob in zip(texts, steps, logprobs, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """A whole answer.

    Attributes:
        prompt: Text of the prompt, or its ids in words.
        blocks: Tokens of each block, in their order in the text.
        figures: One line of figures.
    """

    prompt: str
    blocks: Sequence[Sequence[Token]]
    figures: str

    def page(self) -> str:
        """Return the page."""
        blocks = [[[token.text, token.call, token.confidence] for token in b] for b in self.blocks]
        data = {"prompt": self.prompt, "figures": self.figures, "blocks": blocks}
        return filled_page("replay.html", data=script_json(data))

    def write(self, path: Path) -> None:
        """Write the page to a file, complete or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_text(path, self.page())


def filled_page(name: str, /, **values: str) -> str:
    """Return a page of this package with its parts and values put in.

    Args:
        name: File of the page.
        **values: Text for each `{{NAME}}`; the other marks are names of files.
    """
    page = (PAGES / name).read_text(encoding="utf-8")
    for part in ("replay.css", "board.html", "replay.js"):
        page = page.replace(f"{{{{{part}}}}}", (PAGES / part).read_text(encoding="utf-8").strip())
    for key, value in values.items():  # last, as a value may hold anything
        page = page.replace(f"{{{{{key}}}}}", value)
    return page


def script_json(data: Any) -> str:
    """Return data as JSON that may stand between script tags: no text can end the script."""
    return json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
